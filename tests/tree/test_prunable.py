"""What the default predicate prunes, in real models of every framework: kernels, and nothing else."""

from collections.abc import Callable

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxprune import is_kernel, make_masks
from jaxprune.rules._layers import Layer

KEY = jax.random.key(0)
IMAGE, TOKENS, IDS = jnp.ones((1, 4, 4, 6)), jnp.ones((1, 3, 6)), jnp.zeros((1, 3), int)


def pruned(params: object, **options: object) -> set[str]:
    """Paths of the leaves that the default predicate prunes, as a rule is given them. Shapes are enough."""
    found = set()

    def rule(scores: object, k: float) -> object:
        layers = jax.tree.leaves(scores, is_leaf=lambda node: isinstance(node, Layer))
        found.update(layer.path for layer in layers)
        return jax.tree.map(lambda score: score > k, scores)

    jax.eval_shape(lambda params: make_masks(params, 1.0, rule=rule, **options), params)
    return found


def linen(module: nn.Module, *inputs: jax.Array) -> dict:
    return jax.eval_shape(module.init, KEY, *inputs)["params"]


def linen_parts() -> dict:
    class Model(nn.Module):
        @nn.compact
        def __call__(self) -> None:
            embedded = nn.Embed(5, 6)(IDS)
            nn.MultiHeadDotProductAttention(2)(embedded, embedded)
            nn.BatchNorm(use_running_average=True)(nn.LayerNorm()(nn.GroupNorm(2)(nn.RMSNorm()(embedded))))
            nn.RNN(nn.OptimizedLSTMCell(4))(nn.RNN(nn.GRUCell(4))(embedded))
            nn.DenseGeneral((2, 3))(nn.Dense(4)(embedded))
            nn.ConvTranspose(2, (2, 2))(nn.Conv(3, (3, 3))(IMAGE))
            nn.ConvLocal(2, (3, 3))(IMAGE)
            nn.Einsum((6, 2), "...a,ab->...b")(TOKENS)
            nn.WeightNorm(nn.Dense(3, name="normalised"))(TOKENS)
            self.param("pos_embedding", nn.initializers.normal(), (1, 3, 6))
            self.param("cls_token", nn.initializers.zeros, (1, 1, 6))

    return linen(Model())


def linen_scan() -> dict:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, carry: jax.Array, _: None) -> tuple[jax.Array, None]:
            return nn.LayerNorm()(nn.MultiHeadDotProductAttention(2)(nn.Dense(6)(carry))), None

    stack = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    return linen(stack(), TOKENS, None)


def linen_boxed() -> dict:
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    return linen(nn.Dense(3, kernel_init=init), TOKENS)


class NNX(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.general = nnx.LinearGeneral(3, (2, 4), rngs=rngs)
        self.einsum = nnx.Einsum("ab,bcd->acd", (3, 2, 4), (2, 4), rngs=rngs)
        self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.embed = nnx.Embed(5, 6, rngs=rngs)
        self.norms = nnx.List([norm(6, rngs=rngs) for norm in (nnx.LayerNorm, nnx.RMSNorm, nnx.BatchNorm)])
        self.adapted = nnx.LoRALinear(3, 4, lora_rank=2, rngs=rngs)
        self.cells = nnx.List([nnx.GRUCell(3, 4, rngs=rngs), nnx.OptimizedLSTMCell(3, 4, rngs=rngs)])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.stack = nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs))(rngs.split(3))


class Equinox(eqx.Module):
    parts: list

    def __init__(self) -> None:
        convs = [eqx.nn.Conv2d(2, 3, 3, key=KEY), eqx.nn.ConvTranspose2d(2, 3, 3, key=KEY)]
        norms = [eqx.nn.LayerNorm((4, 5)), eqx.nn.RMSNorm((4, 5)), eqx.nn.GroupNorm(2, 4)]
        cells = [eqx.nn.GRUCell(3, 4, key=KEY), eqx.nn.LSTMCell(3, 4, key=KEY)]
        attention = eqx.nn.MultiheadAttention(2, 6, use_query_bias=True, key=KEY)
        normalised = eqx.nn.WeightNorm(eqx.nn.Linear(3, 4, key=KEY))
        stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(4, 4, key=key))(jax.random.split(KEY, 3))
        self.parts = [
            eqx.nn.MLP(3, 4, 5, 1, key=KEY),
            eqx.nn.Embedding(5, 6, key=KEY),
            *[convs, norms, cells, attention, normalised, stack],
        ]


def haiku() -> dict:
    def model() -> None:
        embedded = hk.Embed(5, 6)(IDS)
        hk.MultiHeadAttention(2, 3, w_init=hk.initializers.VarianceScaling())(embedded, embedded, embedded)
        hk.BatchNorm(True, True, 0.9)(IMAGE, is_training=True)
        hk.LayerNorm((-2, -1), True, True)(embedded)
        hk.Conv2D(3, 3)(IMAGE)
        hk.Conv2D(3, 3, data_format="NCHW", name="channels_first")(IMAGE)
        for cell in (hk.GRU(4), hk.LSTM(4)):
            hk.dynamic_unroll(cell, TOKENS, cell.initial_state(1), time_major=False)
        hk.nets.MLP([3, 4])(hk.Bias(bias_dims=[1, 2])(embedded))
        hk.experimental.layer_stack(3)(lambda x: hk.LayerNorm(-1, True, True)(hk.Linear(6)(x)))(TOKENS)

    with jax.numpy_dtype_promotion("standard"):  # Haiku's batch norm raises a float to its count, a whole number
        return jax.eval_shape(hk.transform_with_state(model).init, KEY)[0]


LSTM = [f"OptimizedLSTMCell_0/{gate}/kernel" for gate in ("hf", "hg", "hi", "ho", "if", "ig", "ii", "io")]
GRU = [f"GRUCell_0/{gate}/kernel" for gate in ("hn", "hr", "hz", "in", "ir", "iz")]
QKVO = ("query", "key", "value", "out")
EQX_ATTENTION = [f"parts/5/{name}_proj/weight" for name in ("query", "key", "value", "output")]
HAIKU_ATTENTION = [f"multi_head_attention/{name}/w" for name in ("query", "key", "value", "linear")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "stacked", "kernels"),
    [
        (
            linen_parts,
            None,
            [f"MultiHeadDotProductAttention_0/{part}/kernel" for part in QKVO]
            + [f"{part}/kernel" for part in ("Dense_0", "DenseGeneral_0", "Conv_0", "ConvTranspose_0", "ConvLocal_0")]
            + ["Einsum_0/kernel", "normalised/kernel", *LSTM, *GRU],
        ),
        (
            linen_scan,
            "*",
            ["Dense_0/kernel"] + [f"MultiHeadDotProductAttention_0/{part}/kernel" for part in QKVO],
        ),
        (linen_boxed, None, ["kernel"]),
        (
            lambda: nnx.state(nnx.eval_shape(lambda: NNX(nnx.Rngs(0))), nnx.Param),
            "stack",
            [f"{part}/kernel" for part in ("linear", "general", "einsum", "conv", "adapted", "stack")]
            + [f"attention/{part}/kernel" for part in QKVO]
            + [f"cells/{i}/dense_{side}/kernel" for i in (0, 1) for side in "hi"],
        ),
        (
            lambda: eqx.filter(eqx.filter_eval_shape(Equinox), lambda leaf: hasattr(leaf, "shape")),
            "parts/7",
            [f"parts/{part}/weight" for part in ("0/layers/0", "0/layers/1", "2/0", "2/1", "6/layer", "7")]
            + [f"parts/4/{i}/weight_{side}" for i in (0, 1) for side in ("hh", "ih")]
            + EQX_ATTENTION,
        ),
        (
            haiku,
            "*layer_stack*",
            ["conv2_d/w", "channels_first/w", "gru/w_h", "gru/w_i", "lstm/linear/w", *HAIKU_ATTENTION]
            + ["mlp/~/linear_0/w", "mlp/~/linear_1/w", "__layer_stack_no_per_layer/linear/w"],
        ),
    ],
    ids=["linen", "linen scan", "linen boxed", "nnx", "equinox", "haiku"],
)
def test_kernels_and_nothing_else(make: Callable, stacked: str | None, kernels: list[str]) -> None:
    params = make()
    assert pruned(params, stacked=stacked) == set(kernels)
    # The names alone would do without saying what is stacked, but the statistics would be of the whole stack.
    assert pruned(params) == set(kernels)


def test_a_whole_nnx_module_with_its_counters_and_keys() -> None:
    model = nnx.eval_shape(lambda: NNX(nnx.Rngs(0)))
    assert any(jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(model))
    assert pruned(model) == pruned(nnx.state(model, nnx.Param))


@pytest.mark.parametrize("kind", [dict, tuple, list])
def test_bare_arrays(kind: type) -> None:
    arrays = [jnp.ones((4, 3)), jnp.ones(3), jnp.ones((3, 3, 4, 8)), jnp.ones(())]
    params = {f"layer{i}": array for i, array in enumerate(arrays)} if kind is dict else kind(arrays)
    if kind is dict:
        assert pruned(params) == {"layer0", "layer2"}
    else:
        with pytest.warns(UserWarning, match=r"params has no names \(params\[0\], params\[1\], ...\).*by sites="):
            assert pruned(params) == {"0", "2"}
        # Whoever says which leaves are pruned has said it.
        assert pruned(params, prunable=lambda path, leaf: leaf.ndim == 4) == {"2"}
    assert pruned(arrays[0]) == {""}


@pytest.mark.parametrize(
    "path",
    ["kernel", "w", "w1", "w_2", "wq", "wo", "w_in", "weight", "weight_ih", "head", "a/b/w1", "attn/qkv"]
    + ["layers/0/weight", "embedding/kernel", "patch_embed/kernel", "layer_norm_mlp/kernel", "logits/kernel", "0", ""],
)
def test_names_of_kernels(path: str) -> None:
    assert is_kernel(path, np.ones((4, 3)))
    assert not is_kernel(path, np.ones(3)), "one axis is never a kernel"


@pytest.mark.parametrize(
    "path",
    ["bias", "b", "b1", "bias_q", "query/bias", "scale", "norm/scale", "offset", "gamma", "beta", "gain", "mean", "var"]
    + ["pos_embedding", "posEmbed", "wpe", "wte", "cls_token", "class_token", "mask_token", "embed/weight"]
    + [
        "Embed_0/embedding",
        "embeddings",
        "token_table",
        "LayerNorm_0/scale",
        "ln_1/weight",
        "bn1/weight",
        "norm2/weight",
    ]
    + ["lora_a", "lora/lora_b", "relative_position_bias_table", "final_logits_bias", "A_log", "1/bias", "b_in"]
    + ["kernel/array/qvalue", "kernel/array/scale", "kernel/zero_point", "kernel_lora_a", "kernel_gptq/sum_of_hessian"],
)
def test_names_that_are_none(path: str) -> None:
    assert not is_kernel(path, np.ones((4, 3)))
