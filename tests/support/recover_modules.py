"""Modules whose sizes are arguments, to be cut and made anew."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from jaxprune.structured import Verification, recover, select_channels, shrink, trace, verify_module
from tests.support.structured_zoo import KEY, noisy


class CNN(nn.Module):
    """The network of `examples/cnn.py` with its sizes as arguments."""

    features: tuple[int, ...] = (6, 8)
    hidden: int = 10
    activation: Callable[..., Any] = nn.relu

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for features in self.features:
            x = nn.max_pool(self.activation(nn.Conv(features, (3, 3))(x)), (2, 2), strides=(2, 2))
        x = self.activation(nn.Dense(self.hidden)(x.reshape(len(x), -1)))
        return nn.Dense(3)(x)


class ResNet(nn.Module):
    """A stem, and a block for each width; blocks of another width than the stream's project it."""

    stem: int
    widths: Sequence[dict[str, int]]

    @nn.compact
    def __call__(self, x: Any) -> Any:
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = nn.relu(norm()(nn.Conv(self.stem, (3, 3), use_bias=False)(x)))
        for width in self.widths:
            y = nn.relu(norm()(nn.Conv(width["inner"], (3, 3), use_bias=False)(x)))
            y = norm()(nn.Conv(width["outer"], (3, 3), use_bias=False)(y))
            if x.shape != y.shape:
                x = norm()(nn.Conv(width["outer"], (1, 1), use_bias=False)(x))
            x = nn.relu(x + y)
        return nn.Dense(3)(x.mean((1, 2)))


class Transformer(nn.Module):
    """Blocks of attention and a dense block."""

    width: int
    heads: tuple[int, ...]
    qkv: tuple[int, ...] | None
    hidden: tuple[int, ...]

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(self.width)(x)
        for block, (heads, hidden) in enumerate(zip(self.heads, self.hidden, strict=True)):
            y = nn.LayerNorm()(x)
            qkv = None if self.qkv is None else self.qkv[block]
            x = x + nn.MultiHeadDotProductAttention(heads, qkv_features=qkv)(y, y)
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(hidden)(nn.LayerNorm()(x))))
        return nn.Dense(3)(nn.LayerNorm()(x).mean(1))


class NnxCNN(nnx.Module):
    """The network of `examples/cnn_nnx.py` with its sizes as arguments."""

    def __init__(self, image_shape: tuple[int, int, int], features: list[int], hidden: int, *, rngs: nnx.Rngs):
        height, width, channels = image_shape
        self.conv_1 = nnx.Conv(channels, features[0], (3, 3), rngs=rngs)
        self.conv_2 = nnx.Conv(features[0], features[1], (3, 3), rngs=rngs)
        self.dense_1 = nnx.Linear((height // 4) * (width // 4) * features[1], hidden, rngs=rngs)
        self.dense_2 = nnx.Linear(hidden, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv in (self.conv_1, self.conv_2):
            x = nnx.max_pool(nnx.relu(conv(x)), (2, 2), strides=(2, 2))
        return self.dense_2(nnx.relu(self.dense_1(x.reshape(len(x), -1))))


class NnxBlock(nnx.Module):
    """Attention and a dense block."""

    def __init__(self, width: int, heads: int, qkv: int, hidden: int, *, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(heads, width, qkv, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(x)
        return x + self.down(nnx.gelu(self.up(self.norm(x))))


class Cut:
    """A module, what is cut of it, and the module made anew."""

    def __init__(self, module: Callable[..., Any], x: jax.Array, hyperparameters: dict, sparsity: Any):
        self.module, self.x = module, x
        self.params = noisy(jax.eval_shape(lambda: self.init(**hyperparameters)))
        self.graph = trace(self.function(hyperparameters), self.params, x)
        self.plan = select_channels(self.graph, self.params, sparsity)
        self.hyperparameters = hyperparameters

    def init(self, **hyperparameters: Any) -> Any:
        if issubclass(self.module, nn.Module):
            return self.module(**hyperparameters).init(KEY, self.x)
        return nnx.state(self.module(**hyperparameters, rngs=nnx.Rngs(0)), nnx.Param)

    def function(self, hyperparameters: dict) -> Callable[..., Any]:
        if issubclass(self.module, nn.Module):
            return self.module(**hyperparameters).apply
        model = nnx.eval_shape(lambda: self.module(**hyperparameters, rngs=nnx.Rngs(0)))
        static, _, rest = nnx.split(model, nnx.Param, ...)
        return lambda params, x: nnx.merge(static, params, rest)(x)

    def recovered(self) -> dict[str, Any]:
        return recover(self.init, self.hyperparameters, shrink(self.plan, self.params))

    def verified(self, hyperparameters: dict) -> Verification:
        return verify_module(self.graph, self.plan, self.function(hyperparameters), self.params, self.x)
