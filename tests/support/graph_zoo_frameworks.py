"""The zoo's models of Linen, NNX, Equinox and Haiku, and what their inputs are taken apart with."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True)
class Case:
    """A function and what it multiplies.

    `met` gives for each path the inputs of each use, ``[N, T, I]``, in float64; a row of a table read is one-hot.
    """

    fn: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    met: dict[str, list[np.ndarray]]


def normal(*shape: int, salt: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([salt, *shape]).normal(size=shape), jnp.float32)


def f64(x: Any) -> np.ndarray:
    return (
        np.asarray(x, np.float64) if jnp.asarray(x).dtype != jnp.bfloat16 else np.asarray(x, np.float32).astype(float)
    )


def rows(x: Any, features: int = 1) -> np.ndarray:
    """Data whose last axes are features, as ``[1, T, I]``."""
    x = f64(x)
    return x.reshape(1, -1, math.prod(x.shape[x.ndim - features :]))


def one_hot(indices: Any, size: int) -> np.ndarray:
    return np.eye(size)[np.asarray(indices).reshape(-1)][None]


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Attention over ``[batch, time, heads, size]``."""
    weights = softmax(np.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1]))
    return np.einsum("bhqk,bkhd->bqhd", weights, v)


def patches(
    x: Any,
    size: tuple[int, int],
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    groups: int = 1,
    dilation: int = 1,
) -> np.ndarray:
    """The windows of images ``[n, height, width, channels]``, as ``[groups, T, channels of a group x window]``."""
    x = np.pad(f64(x), ((0, 0), padding, padding, (0, 0)))
    reach = [(s - 1) * dilation + 1 for s in size]
    found = [
        x[:, i : i + reach[0] : dilation, j : j + reach[1] : dilation]
        for i in range(0, x.shape[1] - reach[0] + 1, stride)
        for j in range(0, x.shape[2] - reach[1] + 1, stride)
    ]
    windows = np.stack(found, 1)  # n, places, height, width, channels
    windows = np.moveaxis(windows, -1, 2)
    n, places, channels = windows.shape[:3]
    split = windows.reshape(n, places, groups, channels // groups, -1)
    return np.moveaxis(split, 2, 0).reshape(groups, n * places, -1)


def linen(module: nn.Module, *inputs: Any) -> tuple[Callable[..., Any], Any]:
    params = jax.jit(lambda: jax.tree.map(lambda p: p + 0.1, module.init(KEY, *inputs)["params"]))()
    return lambda params, *inputs: module.apply({"params": params}, *inputs), params


# ---- Linen


def linen_embed() -> Case:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens: Any) -> Any:
            return nn.Dense(3)(nn.Embed(7, 5)(tokens))

    tokens = jnp.array([[0, 2, 2], [6, 1, 0]])
    fn, params = linen(Model(), tokens)
    read = f64(params["Embed_0"]["embedding"])[np.asarray(tokens)]
    return Case(fn, params, (tokens,), {"Embed_0/embedding": [one_hot(tokens, 7)], "Dense_0/kernel": [rows(read)]})


def linen_attention() -> Case:
    x = normal(2, 5, 6)
    fn, params = linen(nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8), x)
    met = {f"{name}/kernel": [rows(x)] for name in ("query", "key", "value")}
    q, k, v = (
        np.einsum("btd,dhk->bthk", f64(x), f64(params[name]["kernel"])) + f64(params[name]["bias"])
        for name in ("query", "key", "value")
    )
    return Case(fn, params, (x,), {**met, "out/kernel": [rows(attended(q, k, v), 2)]})


def linen_dense_general() -> Case:
    x = normal(4, 3, 5)
    fn, params = linen(nn.DenseGeneral((2, 6), axis=(-2, -1)), x)
    return Case(fn, params, (x,), {"kernel": [rows(x, 2)]})


def linen_dense_general_swapped() -> Case:
    x = normal(3, 4, 5)
    fn, params = linen(nn.DenseGeneral(6, axis=(2, 0)), x)
    return Case(fn, params, (x,), {"kernel": [f64(x).transpose(1, 0, 2).reshape(1, 4, 15)]})


def _conv(groups: int, out: int, stride: int, padding: tuple[int, int], dilation: int = 1) -> Case:
    x = normal(2, 6, 6, 4)
    module = nn.Conv(
        out,
        (3, 2),
        strides=stride,
        padding=[padding, padding],
        feature_group_count=groups,
        kernel_dilation=dilation,
    )
    fn, params = linen(module, x)
    return Case(fn, params, (x,), {"kernel": [patches(x, (3, 2), stride, padding, groups, dilation)]})


def linen_conv() -> Case:
    return _conv(1, 5, 1, (1, 1))


def linen_conv_strided() -> Case:
    return _conv(1, 5, 2, (1, 0))


def linen_conv_dilated() -> Case:
    return _conv(1, 5, 1, (2, 2), dilation=2)


def linen_conv_grouped() -> Case:
    return _conv(2, 6, 1, (0, 0))


def linen_conv_depthwise() -> Case:
    return _conv(4, 8, 1, (1, 1))


def linen_conv_transpose() -> Case:
    x = normal(2, 4, 4, 3)
    fn, params = linen(nn.ConvTranspose(5, (2, 2), strides=(2, 2), padding="VALID"), x)
    spread = np.zeros((2, 9, 9, 3))
    spread[:, 1:8:2, 1:8:2] = f64(x)
    return Case(fn, params, (x,), {"kernel": [patches(spread, (2, 2))]})


def linen_remat_bfloat16() -> Case:
    x = normal(4, 6)
    fn, params = linen(nn.remat(nn.Dense)(5, dtype=jnp.bfloat16), x)
    return Case(fn, params, (x,), {"kernel": [rows(x.astype(jnp.bfloat16))]})


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        y = nn.Dense(7)(nn.LayerNorm()(x))
        return x + nn.Dense(4)(nn.relu(y)), None


def linen_scan() -> Case:
    x = normal(3, 4)
    stacked = nn.scan(nn.remat(_Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    module = stacked()
    params = jax.jit(lambda: module.init(KEY, x, None)["params"])()

    def fn(params: Any, x: Any) -> Any:
        return module.apply({"params": params}, x, None)[0]

    up, down, h = [], [], x
    for i in range(3):
        layer = jax.tree.map(lambda p, i=i: p[i], params)
        normed = nn.LayerNorm().apply({"params": layer["LayerNorm_0"]}, h)
        hidden = nn.relu(nn.Dense(7).apply({"params": layer["Dense_0"]}, normed))
        up.append(rows(normed))
        down.append(rows(hidden))
        h = h + nn.Dense(4).apply({"params": layer["Dense_1"]}, hidden)
    return Case(fn, params, (x,), {"Dense_0/kernel": [np.concatenate(up)], "Dense_1/kernel": [np.concatenate(down)]})


def _recurrent(cell: nn.RNNCellBase, hidden: Callable[[Any], Any], inputs: list[str], states: list[str]) -> Case:
    x = normal(2, 5, 3)
    module = nn.RNN(cell)
    fn, params = linen(module, x)
    carry = cell.initialize_carry(KEY, x[:, 0].shape)
    before = []
    for t in range(5):
        before.append(hidden(carry))
        carry, _ = cell.apply({"params": params["cell"]}, carry, x[:, t])
    h = rows(np.stack([f64(b) for b in before]))
    met = {f"cell/{name}/kernel": [rows(x)] for name in inputs}
    return Case(fn, params, (x,), {**met, **{f"cell/{name}/kernel": [h] for name in states}})


def linen_simple_cell() -> Case:
    return _recurrent(nn.SimpleCell(8), lambda carry: carry, ["i"], ["h"])


def linen_gru() -> Case:
    return _recurrent(nn.GRUCell(4), lambda carry: carry, ["in", "ir", "iz"], ["hn", "hr", "hz"])


def linen_lstm() -> Case:
    gates = "ifgo"
    return _recurrent(nn.LSTMCell(4), lambda carry: carry[1], ["i" + g for g in gates], ["h" + g for g in gates])


def linen_optimized_lstm() -> Case:
    gates = "ifgo"
    return _recurrent(
        nn.OptimizedLSTMCell(4), lambda carry: carry[1], ["i" + g for g in gates], ["h" + g for g in gates]
    )


# ---- NNX


def _split(model: Any) -> tuple[Any, Any, Any]:
    return nnx.split(model, nnx.Param, ...)


def nnx_attention() -> Case:
    model = nnx.MultiHeadAttention(2, 6, 8, rngs=nnx.Rngs(0), decode=False)
    graph, params, rest = _split(model)
    x = normal(2, 5, 6)

    def fn(params: Any, x: Any) -> Any:
        return nnx.merge(graph, params, rest)(x)

    q, k, v = (f64(getattr(model, name)(x)) for name in ("query", "key", "value"))
    met = {f"{name}/kernel": [rows(x)] for name in ("query", "key", "value")}
    return Case(fn, params, (x,), {**met, "out/kernel": [rows(attended(q, k, v), 2)]})


def nnx_scanned() -> Case:
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(key: Any) -> Any:
        return nnx.Linear(8, 8, rngs=nnx.Rngs(key))

    graph, params, rest = _split(stack(jax.random.split(KEY, 3)))
    x = normal(5, 8)

    def fn(params: Any, x: Any) -> Any:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x: Any, layer: Any) -> Any:
            return jnp.tanh(layer(x))

        return forward(x, nnx.merge(graph, params, rest))

    kernel, bias, h, seen = f64(params["kernel"][...]), f64(params["bias"][...]), f64(x), []
    for i in range(3):
        seen.append(h)
        h = np.tanh(h @ kernel[i] + bias[i])
    return Case(fn, params, (x,), {"kernel": [np.stack(seen)]})


def nnx_tied() -> Case:
    graph, params, rest = _split(nnx.Embed(7, 4, rngs=nnx.Rngs(0)))
    tokens = jnp.array([[0, 2, 2], [6, 1, 0]])

    def fn(params: Any, tokens: Any) -> Any:
        embed = nnx.merge(graph, params, rest)
        return embed.attend(jnp.tanh(embed(tokens)))

    h = np.tanh(f64(params["embedding"][...])[np.asarray(tokens)])
    return Case(fn, params, (tokens,), {"embedding": [one_hot(tokens, 7), rows(h)]})


# ---- Equinox and Haiku


def _equinox(model: Any, *inputs: Any) -> tuple[Callable[..., Any], Any]:
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return lambda params, *inputs: jax.vmap(eqx.combine(params, static))(*inputs), params


def equinox_attention() -> Case:
    model = eqx.nn.MultiheadAttention(2, 6, use_output_bias=False, key=KEY)
    x = normal(3, 5, 6)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def fn(params: Any, x: Any) -> Any:
        return jax.vmap(lambda x: eqx.combine(params, static)(x, x, x))(x)

    q, k, v = (
        (f64(x) @ f64(projection.weight).T).reshape(3, 5, 2, 3)
        for projection in (model.query_proj, model.key_proj, model.value_proj)
    )
    met = {f"{name}_proj/weight": [rows(x)] for name in ("query", "key", "value")}
    return Case(fn, params, (x,), {**met, "output_proj/weight": [rows(attended(q, k, v), 2)]})


def equinox_conv() -> Case:
    model = eqx.nn.Conv2d(4, 6, 3, stride=2, groups=2, key=KEY)
    x = normal(2, 4, 7, 7)
    fn, params = _equinox(model)
    return Case(fn, params, (x,), {"weight": [patches(jnp.moveaxis(x, 1, -1), (3, 3), 2, groups=2)]})


def equinox_mlp() -> Case:
    model = eqx.nn.MLP(3, 2, 5, 1, key=KEY)
    x = normal(6, 3)
    fn, params = _equinox(model)
    hidden = np.maximum(f64(x) @ f64(model.layers[0].weight).T + f64(model.layers[0].bias), 0)
    return Case(fn, params, (x,), {"layers/0/weight": [rows(x)], "layers/1/weight": [rows(hidden)]})


def equinox_embedding() -> Case:
    model = eqx.nn.Embedding(7, 4, key=KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    tokens = jnp.array([[0, 2, 2], [6, 1, 0]])

    def fn(params: Any, tokens: Any) -> Any:
        return jax.vmap(jax.vmap(eqx.combine(params, static)))(tokens)

    return Case(fn, params, (tokens,), {"weight": [one_hot(tokens, 7)]})


def haiku_mlp() -> Case:
    model = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([5, 2], activation=jnp.tanh)(x)))
    x = normal(6, 3)
    params = model.init(KEY, x)
    first = params["mlp/~/linear_0"]
    hidden = np.tanh(f64(x) @ f64(first["w"]) + f64(first["b"]))
    return Case(model.apply, params, (x,), {"mlp/~/linear_0/w": [rows(x)], "mlp/~/linear_1/w": [rows(hidden)]})
