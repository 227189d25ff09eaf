"""A small perceptron in Linen and in NNX, its pruned parameters, and how qwix quantises it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import qwix
from flax import nnx

import jaxprune
from jaxprune import rules

X = jax.random.normal(jax.random.key(0), (16, 32))
QTYPES = {
    "int8": {"weight_qtype": "int8"},
    "int4, tiled": {"weight_qtype": "int4", "tile_size": 16},
    "fp8": {"weight_qtype": "float8_e4m3fn"},
    "nf4": {"weight_qtype": "nf4"},
    "int8, asymmetric": {"weight_qtype": "int8", "weight_calibration_method": "minmax"},
    "int4, asymmetric and tiled": {"weight_qtype": "int4", "weight_calibration_method": "minmax", "tile_size": 16},
}


class Linen(nn.Module):
    hidden: int = 64

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(self.hidden, name="a")(x))
        return nn.Dense(16, name="b")(nn.LayerNorm(name="norm")(x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(32, 64, rngs=rngs), nnx.Linear(64, 16, rngs=rngs)
        self.norm = nnx.LayerNorm(64, rngs=rngs)

    def __call__(self, x):
        return self.b(self.norm(nnx.relu(self.a(x))))


def pruned():
    """Parameters of `Linen` and their masks: of every output the largest weights stay, so that no scale moves."""
    params = Linen().init(jax.random.key(1), X)["params"]
    masks = jaxprune.make_masks(params, 0.7, rule=rules.row_sparsity)
    return params, jaxprune.apply_masks(params, masks), masks


def provider(**how):
    return qwix.PtqProvider([qwix.QuantizationRule(module_path=".*", **how)])


def quantize(params, hidden=64, **how):
    """The model that computes with integers, and the integers."""
    model = qwix.quantize_model(Linen(hidden), provider(**how))
    return model, qwix.quantize_params(params, jax.eval_shape(model.init, jax.random.key(1), X)["params"])


def is_quantized(node) -> bool:
    return hasattr(node, "array") or isinstance(node, qwix.QArray)


def dequantize(tree):
    """The numbers that a tree stands for."""
    number = lambda node: qwix.dequantize(getattr(node, "array", node)) if is_quantized(node) else node  # noqa: E731
    return jax.tree.map(number, tree, is_leaf=is_quantized)


def lost_zeros(tree, masks) -> int:
    """How many pruned weights are not zero."""
    return sum(
        int(np.sum(np.asarray(leaf)[~np.asarray(mask)] != 0))
        for leaf, mask in zip(*map(jax.tree.leaves, (tree, masks)), strict=True)
    )


def from_nnx(model):
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def to_float32(tree):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
