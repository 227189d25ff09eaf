"""Networks of attention, of recurrence, and what else a function may do, with their channels worked out by hand."""

import math
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from tests.support.structured_zoo import KEY, Case, linen, noisy, normal

# ---- attention


class _Transformer(nn.Module):
    gated: bool = False

    @nn.compact
    def __call__(self, x: Any, _: Any = None) -> Any:
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2, qkv_features=8)(y, y)
        y = nn.LayerNorm()(x)
        if self.gated:
            a, b = jnp.split(nn.Dense(20)(y), 2, -1)
            y = nn.gelu(a) * b
        else:
            y = nn.gelu(nn.Dense(12)(y))
        return x + nn.Dense(6)(y), None


class _Embedded(nn.Module):
    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(7, 6)(tokens) + self.param("pos", nn.initializers.normal(), (1, 5, 6))
        x, _ = _Transformer(True)(x)
        x, _ = _Transformer()(x)
        return nn.Dense(7)(nn.LayerNorm()(x))


def _attention_groups(name: str) -> dict[str, Any]:
    """Heads; dimensions that queries and keys meet in; those of values."""
    heads = f"{name}/key/kernel[1]"
    return {
        # Kernel and bias of three projections, and the one that reads them.
        heads: (2, 7),
        f"{name}/key/kernel[2]": (4, 4, (heads,)),
        f"{name}/value/kernel[2]": (4, 3, (heads,)),
    }


KEY_BIAS = "softmax does not see what is added to all scores of a query"


def transformer() -> Case:
    tokens = jnp.arange(10).reshape(2, 5) % 7
    fn, params = linen(_Embedded(), tokens)
    block = "_Transformer_{}/MultiHeadDotProductAttention_0"
    groups = {
        # The stream: embedding, positions; in each block two norms (2 each), query, key, value, the output projection
        # and its bias, two dense layers and a bias; the last norm and the last layer.
        "Embed_0/embedding[1]": (6, 2 + 2 * (4 + 3 + 2 + 3) + 3),
        **_attention_groups(block.format(0)),
        **_attention_groups(block.format(1)),
        # Both halves of the gate, in one kernel, are multiplied.
        "_Transformer_0/Dense_0/kernel[1]": (10, 3),
        "_Transformer_1/Dense_0/kernel[1]": (12, 3),
    }
    inert = {f"{block.format(i)}/key/bias": KEY_BIAS for i in range(2)}
    return Case(fn, params, (tokens,), groups, inert)


def transformer_scan() -> Case:
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            stack = nn.scan(nn.remat(_Transformer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            x, _ = stack()(nn.Dense(6)(x), None)
            return nn.Dense(2)(x)

    x = normal(2, 5, 3)
    fn, params = linen(Stack(), x)
    block = next(name for name in params if "Dense" not in name)
    attention = f"{block}/MultiHeadDotProductAttention_0"
    groups = {
        f"{attention}/key/kernel[2]": (2, 7),
        f"{attention}/key/kernel[3]": (4, 4, (f"{attention}/key/kernel[2]",)),
        f"{attention}/value/kernel[3]": (4, 3, (f"{attention}/key/kernel[2]",)),
        f"{block}/Dense_0/kernel[2]": (12, 3),
        "Dense_0/kernel[1]": (6, 2 + 4 + 3 + 2 + 3 + 1),
    }
    return Case(fn, params, (x,), groups, {f"{attention}/key/bias": KEY_BIAS})


def llama() -> Case:
    width, kv, repeat, size, ffn, length = 8, 2, 2, 4, 12, 5
    params = {
        "embed": normal(7, width),
        "norm": 1 + 0.3 * normal(width),
        "q": normal(width, kv * repeat * size) / 3,
        "k": normal(width, kv * size) / 3,
        "v": normal(width, kv * size, salt=1) / 3,
        "o": normal(kv * repeat * size, width) / 4,
        "gate": normal(width, ffn) / 3,
        "up": normal(width, ffn, salt=1) / 3,
        "down": normal(ffn, width) / 3,
    }

    def rms(x: Any, scale: Any) -> Any:
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale[None, None]

    def rotated(x: Any) -> Any:
        angles = jnp.arange(length)[:, None] / 10 ** jnp.arange(size // 2)[None]
        cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
        a, b = jnp.split(x, 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def fn(params: Any, tokens: Any) -> Any:
        x = params["embed"][tokens]
        n = len(tokens)
        y = rms(x, params["norm"])
        q = rotated((y @ params["q"]).reshape(n, length, kv * repeat, size))
        k = rotated((y @ params["k"]).reshape(n, length, kv, size))
        v = (y @ params["v"]).reshape(n, length, kv, size)
        k, v = jnp.repeat(k, repeat, 2), jnp.repeat(v, repeat, 2)
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(size)
        scores = jnp.where(jnp.tril(jnp.ones((length, length), bool))[None, None], scores, -1e9)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(n, length, -1)
        x = x + y @ params["o"]
        y = rms(x, params["norm"])
        x = x + (jax.nn.silu(y @ params["gate"]) * (y @ params["up"])) @ params["down"]
        return x @ params["embed"].T

    tokens = jnp.arange(10).reshape(2, 5) % 7
    heads = "k[1]"
    groups = {
        "down[1]": (8, 9),
        heads: (2, 4),  # heads of keys and values, and with each two of queries
        "k[1]#2": (2, 2, (heads,)),  # pairs that are rotated together
        "v[1]": (4, 2, (heads,)),
        "q[1]": (2, 2, (heads,)),  # the queries of one head of keys
        "gate[1]": (12, 3),
    }
    return Case(fn, params, (tokens,), groups)


def vit() -> Case:
    """Patches, a class token, queries, keys and values in one projection."""
    params = {
        "patch": normal(16, 8) / 4,
        "token": normal(1, 1, 8),
        "pos": normal(1, 5, 8),
        "qkv": normal(8, 24) / 3,
        "out": normal(8, 8) / 3,
        "head": normal(8, 3),
    }

    def fn(params: Any, images: Any) -> Any:
        n = len(images)
        x = images.reshape(n, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4).reshape(n, 4, 16) @ params["patch"]
        x = jnp.concatenate([jnp.tile(params["token"], (n, 1, 1)), x], 1) + params["pos"]
        q, k, v = jnp.moveaxis((x @ params["qkv"]).reshape(n, 5, 3, 2, 4), 2, 0)
        y = jax.nn.dot_product_attention(q, k, v).reshape(n, 5, 8)
        return (x + y @ params["out"])[:, 0] @ params["head"]

    groups = {
        "out[1]": (8, 6),
        # The three projections are cut alike.
        "qkv[1]": (2, 2),
        "qkv[1]#2": (4, 2, ("qkv[1]",)),
    }
    return Case(fn, params, (normal(2, 8, 8),), groups)


def attention_equinox() -> Case:
    model = eqx.nn.MultiheadAttention(2, 8, use_key_bias=True, key=KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def fn(params: Any, x: Any) -> Any:
        attend = eqx.combine(params, static)
        return jax.vmap(lambda x: attend(x, x, x))(x)

    heads = "query_proj/weight[0]"
    groups = {
        heads: (2, 5),
        "query_proj/weight[0]#2": (4, 3, (heads,)),
        "value_proj/weight[0]": (4, 2, (heads,)),
    }
    return Case(fn, noisy(params), (normal(2, 5, 8),), groups, {"key_proj/bias": KEY_BIAS})


# ---- other networks


def mixer() -> Case:
    class Mixer(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Dense(6)(x)
            y = nn.LayerNorm()(x).swapaxes(1, 2)
            x = x + nn.Dense(5)(nn.gelu(nn.Dense(7)(y))).swapaxes(1, 2)
            x = x + nn.Dense(6)(nn.gelu(nn.Dense(9)(nn.LayerNorm()(x))))
            return nn.Dense(3)(x.mean(1))

    x = normal(2, 5, 4)
    fn, params = linen(Mixer(), x)
    groups = {
        # The stream: three layers with biases or a norm write it or scale it, two dense layers read it.
        "Dense_0/kernel[1]": (6, 10),
        "Dense_2/kernel[1]": (7, 3),
        "Dense_4/kernel[1]": (9, 3),
    }
    return Case(fn, params, (x,), groups)


def _recurrent(cell: Any, name: str, members: int) -> Case:
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(2)(nn.RNN(cell)(x))

    x = normal(2, 5, 3)
    fn, params = linen(Model(), x)
    return Case(fn, params, (x,), {name: (6, members)})


def gru() -> Case:
    return _recurrent(nn.GRUCell(6), "RNN_0/cell/hn/kernel[1]", 3 * 2 + 1 + 3 * 2 + 1)


def lstm() -> Case:
    return _recurrent(nn.OptimizedLSTMCell(6), "RNN_0/cell/hf/kernel[1]", 4 * 2 + 4 + 4 + 1)


def swin() -> Case:
    """A cyclic shift, windows, and merging of patches: places are frozen, channels are not."""
    params = {"a": normal(3, 6), "b": normal(6, 6), "merge": normal(24, 4), "out": normal(4, 2)}

    def fn(params: Any, x: Any) -> Any:
        x = x @ params["a"]
        y = jnp.roll(x, (-1, -1), (1, 2)).reshape(len(x), 2, 2, 2, 2, 6).swapaxes(2, 3).reshape(len(x), 4, 4, 6)
        y = jax.nn.softmax(jnp.einsum("nwic,nwjc->nwij", y, y)) @ y
        y = y.reshape(len(x), 2, 2, 2, 2, 6).swapaxes(2, 3).reshape(len(x), 4, 4, 6)
        x = x + jnp.roll(y, (1, 1), (1, 2)) @ params["b"]
        parts = [x[:, i::2, j::2] for i in range(2) for j in range(2)]
        return jnp.tanh(jnp.concatenate(parts, -1) @ params["merge"]) @ params["out"]

    return Case(fn, params, (normal(2, 4, 4, 3),), {"a[1]": (6, 4), "merge[1]": (4, 2)})


def experts() -> Case:
    """Tokens choose experts: these can be cut, with the router's outputs, and so can whatever an expert does inside."""
    params = {"router": normal(4, 3), "up": normal(3, 4, 8), "down": normal(3, 8, 4)}

    def fn(params: Any, x: Any) -> Any:
        best, chosen = lax.top_k(jax.nn.softmax(x @ params["router"]), 2)
        weights = (jax.nn.one_hot(chosen, 3) * best[..., None]).sum(1)
        y = jnp.einsum("tef,efd->ted", jnp.tanh(jnp.einsum("td,edf->tef", x, params["up"])), params["down"])
        return (y * weights[..., None]).sum(1)

    return Case(fn, params, (normal(5, 4),), {"router[1]": (3, 3), "up[2]": (8, 2, ("router[1]",))})


def loops() -> Case:
    """A recurrence in a while loop, and a branch."""
    params = {"w": normal(6, 6) / 3, "a": normal(3, 6), "b": normal(3, 6, salt=1), "out": normal(6, 2)}

    def fn(params: Any, x: Any) -> Any:
        h = lax.cond(x.sum() > 0, lambda: x @ params["a"], lambda: 2 * x @ params["b"])
        h = lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ params["w"]), h)
        _, h = lax.while_loop(lambda s: s[0] < 2, lambda s: (s[0] + 1, jnp.sin(2 * s[1])), (0, h))
        return h @ params["out"]

    return Case(fn, params, (jnp.abs(normal(4, 3)),), {"a[1]": (6, 5)}, {"b": "the other branch is taken"})


def derivatives() -> Case:
    """A straight-through estimator and a tie: both bring a derivative that is not that of what they compute."""

    @jax.custom_vjp
    def binary(x: Any) -> Any:
        return jnp.sign(x)

    binary.defvjp(lambda x: (binary(x), x), lambda x, g: (g * (jnp.abs(x) < 1).astype(g.dtype),))
    params = {"a": normal(3, 8), "b": normal(8, 6), "tie": jnp.zeros((3, 8)), "c": normal(6, 2)}

    def fn(params: Any, x: Any) -> Any:
        h = binary(x @ params["a"]) + jax.nn.relu(x @ params["tie"])
        return jax.nn.softplus(h @ params["b"]) @ params["c"]

    groups = {"a[1]": (8, 3), "b[1]": (6, 2)}
    return Case(fn, params, (normal(4, 3),), groups, {"a": "a sign changes at few places", "tie": "zeros"})


def closed_over() -> Case:
    """Constants are cut as well: a weight, a mask, noise that belongs to places, random bits."""
    weight, key = normal(8, 6), jax.random.key(1)

    def fn(params: Any, x: Any) -> Any:
        h = x @ params["a"] + jnp.arange(8.0)[None] / 8
        h = h * jax.random.bernoulli(key, 0.5, (4, 8)).astype(h.dtype)
        return jnp.tanh(h @ weight) @ params["b"]

    return Case(
        fn, {"a": normal(3, 8), "b": normal(6, 2)}, (normal(4, 3),), {"a[1]": (8, 1), "b[0]": (6, 1)}, batch=False
    )


def weird() -> Case:
    """Nothing can be cut: channels are reversed, rolled, summed up, sorted, or chosen by an index."""
    params = {"a": normal(3, 8), "b": normal(3, 8, salt=1), "c": normal(3, 8, salt=2), "d": normal(3, 8, salt=3)}

    def fn(params: Any, x: Any) -> Any:
        a, b, c, d = (x @ params[name] for name in "abcd")
        return (
            jnp.flip(a, 1).sum(1) + jnp.cumsum(b, 1).sum(1) + jnp.sort(c, 1)[:, :2].sum(1) + d[:, x[0, 0].astype(int)]
        )

    return Case(fn, params, (normal(4, 3),), {})


NETWORKS = [
    transformer,
    transformer_scan,
    llama,
    vit,
    attention_equinox,
    mixer,
    gru,
    lstm,
    swin,
    experts,
    loops,
    derivatives,
    closed_over,
    weird,
]
