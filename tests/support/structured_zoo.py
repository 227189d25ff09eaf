"""Networks of every kind, small: for each the channels that can be cut, worked out by hand; first convolutions."""

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
    """A function and its channels.

    Attributes:
        fn: the function.
        params: its parameters, of both signs and not small.
        inputs: its other arguments.
        groups: for the name of each group how many channels it has, how many members, and the groups it is a part of.
        inert: paths of parameters of which a coupled slice may be rolled without effect, with the reason.
        outputs: which outputs may be cut.
        batch: whether the leading axis of inputs may change.
    """

    fn: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    groups: dict[str, tuple[int, int] | tuple[int, int, tuple[str, ...]]]
    inert: dict[str, str] = dataclasses.field(default_factory=dict)
    outputs: Callable[[str], bool] | None = None
    batch: bool = True


def normal(*shape: int, salt: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng((*shape, salt)).normal(size=shape), jnp.float32)


def noisy(params: Any) -> Any:
    """Draw kernels of both signs, vectors of positive numbers, none of them constant; scales and variances near one."""
    entries, treedef = jax.tree_util.tree_flatten_with_path(params)
    rng = np.random.default_rng(0)

    def drawn(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path)
        noise = rng.normal(size=leaf.shape) / (math.sqrt(math.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 3)
        if len(leaf.shape) == 1:  # no unit is dead for want of an offset
            noise = np.abs(noise) + (0.5 if "scale" in name or "var" in name else 0)
        return jnp.asarray(noise, leaf.dtype)

    return jax.tree.unflatten(treedef, [drawn(path, leaf) for path, leaf in entries])


def linen(module: nn.Module, *inputs: Any) -> tuple[Callable[..., Any], Any]:
    variables = noisy(jax.eval_shape(module.init, KEY, *inputs))
    if set(variables) == {"params"}:
        return lambda params, *inputs: module.apply({"params": params}, *inputs), variables["params"]
    return module.apply, variables


def mlp() -> Case:
    params = {"a": normal(3, 8), "b": normal(8), "c": normal(8, 6), "d": normal(6, 2)}

    def fn(params: Any, x: Any) -> Any:
        return jnp.tanh(jax.nn.relu(x @ params["a"] + params["b"][None]) @ params["c"]) @ params["d"]

    return Case(fn, params, (normal(4, 3),), {"a[1]": (8, 3), "c[1]": (6, 2)})


class _CNN(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        for features in (6, 8):
            x = nn.max_pool(nn.relu(nn.Conv(features, (3, 3))(x)), (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(10)(x.reshape(len(x), -1)))
        return nn.Dense(3)(x)


CNN_GROUPS = {"Conv_0/kernel[3]": (6, 3), "Conv_1/kernel[3]": (8, 3), "Dense_0/kernel[1]": (10, 3)}


def cnn_linen() -> Case:
    x = normal(2, 8, 8, 1)
    fn, params = linen(_CNN(), x)
    return Case(fn, params, (x,), CNN_GROUPS)


def cnn_nnx() -> Case:
    class CNN(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv1 = nnx.Conv(1, 6, (3, 3), rngs=rngs)
            self.conv2 = nnx.Conv(6, 8, (3, 3), rngs=rngs)
            self.dense1 = nnx.Linear(32, 10, rngs=rngs)
            self.dense2 = nnx.Linear(10, 3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = nnx.max_pool(nnx.relu(self.conv1(x)), (2, 2), strides=(2, 2))
            x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2), strides=(2, 2))
            return self.dense2(nnx.relu(self.dense1(x.reshape(len(x), -1))))

    graph, params, rest = nnx.split(nnx.eval_shape(lambda: CNN(nnx.Rngs(0))), nnx.Param, ...)
    groups = {"conv1/kernel[3]": (6, 3), "conv2/kernel[3]": (8, 3), "dense1/kernel[1]": (10, 3)}
    return Case(lambda p, x: nnx.merge(graph, p, rest)(x), noisy(params), (normal(2, 8, 8, 1),), groups)


def cnn_equinox() -> Case:
    keys = jax.random.split(KEY, 3)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(1, 8, 3, padding=1, key=keys[0]),
            eqx.nn.GroupNorm(2, 8),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.MaxPool2d(2, 2),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(128, 10, key=keys[1]),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Linear(10, 3, key=keys[2]),
        ]
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)
    # Convolution, bias, scale and offset of the norm, and the dense layer behind it; two groups of four.
    groups = {
        "layers/0/weight[0]": (2, 5),
        "layers/0/weight[0]#2": (4, 5, ("layers/0/weight[0]",)),
        "layers/5/weight[0]": (10, 3),
    }
    return Case(lambda p, x: jax.vmap(eqx.combine(p, static))(x), noisy(params), (normal(2, 1, 8, 8),), groups)


def vgg_haiku() -> Case:
    def forward(x: Any) -> Any:
        for features in (6, 8):
            x = hk.max_pool(jax.nn.relu(hk.Conv2D(features, 3)(x)), (2, 2, 1), (2, 2, 1), "SAME")
        x = hk.Linear(10)(hk.Flatten()(x))
        x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        return hk.Linear(3)(jax.nn.relu(x))

    model = hk.without_apply_rng(hk.transform(forward))
    x = normal(2, 8, 8, 1)
    groups = {"conv2_d/w[3]": (6, 3), "conv2_d_1/w[3]": (8, 3), "linear/w[1]": (10, 5)}
    return Case(model.apply, noisy(jax.eval_shape(model.init, KEY, x)), (x,), groups)


class _Block(nn.Module):
    features: int
    strides: int
    train: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        norm = lambda: nn.BatchNorm(use_running_average=not self.train)  # noqa: E731
        y = nn.relu(norm()(nn.Conv(self.features, (3, 3), (self.strides,) * 2, use_bias=False)(x)))
        y = norm()(nn.Conv(self.features, (3, 3), use_bias=False)(y))
        if x.shape != y.shape:
            x = norm()(nn.Conv(self.features, (1, 1), (self.strides,) * 2, use_bias=False)(x))
        return nn.relu(x + y)


class _ResNet(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(nn.BatchNorm(use_running_average=not self.train)(nn.Conv(4, (3, 3), use_bias=False)(x)))
        for features, strides in ((4, 1), (6, 2)):
            x = _Block(features, strides, self.train)(x)
        return nn.Dense(3)(x.mean((1, 2)))


# A norm has four parameters. The stem, the second convolution of the first block and what reads them; inside a block;
# the second block's sum, read by the dense layer.
RESNET_GROUPS = {
    "params/Conv_0/kernel[3]": (4, 13),
    "params/_Block_0/Conv_0/kernel[3]": (4, 6),
    "params/_Block_1/Conv_0/kernel[3]": (6, 6),
    "params/_Block_1/Conv_1/kernel[3]": (6, 11),
}


def resnet_eval() -> Case:
    x = normal(2, 8, 8, 1)
    fn, variables = linen(_ResNet(False), x)
    return Case(fn, variables, (x,), RESNET_GROUPS)


def resnet_train() -> Case:
    x = normal(2, 8, 8, 1)
    model = _ResNet(True)
    variables = noisy(jax.eval_shape(model.init, KEY, x))

    def fn(variables: Any, x: Any) -> Any:
        logits, state = model.apply(variables, x, mutable=["batch_stats"])
        return {"logits": logits, **state}

    return Case(fn, variables, (x,), RESNET_GROUPS, outputs=lambda path: path.startswith("batch_stats"))


def densenet() -> Case:
    class DenseNet(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Conv(4, (3, 3))(x)
            for _ in range(2):
                y = nn.BatchNorm(use_running_average=True)(x)
                x = jnp.concatenate([x, nn.Conv(3, (3, 3))(nn.relu(y))], -1)
            return nn.Dense(3)(x.mean((1, 2)))

    x = normal(2, 6, 6, 1)
    fn, variables = linen(DenseNet(), x)
    groups = {
        # Its bias; two norms of four parameters, two convolutions and the dense layer read it.
        "params/Conv_0/kernel[3]": (4, 13),
        "params/Conv_1/kernel[3]": (3, 8),
        "params/Conv_2/kernel[3]": (3, 3),
    }
    return Case(fn, variables, (x,), groups)


def mobilenet() -> Case:
    class MobileNet(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Conv(4, (3, 3))(x)
            y = jax.nn.relu6(nn.Conv(8, (1, 1))(x))
            y = jax.nn.relu6(nn.Conv(8, (3, 3), feature_group_count=8)(y))
            return nn.Dense(3)((x + nn.Conv(4, (1, 1))(y)).mean((1, 2)))

    x = normal(2, 6, 6, 1)
    fn, params = linen(MobileNet(), x)
    return Case(fn, params, (x,), {"Conv_0/kernel[3]": (4, 6), "Conv_1/kernel[3]": (8, 5)})


def resnext() -> Case:
    class ResNeXt(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.relu(nn.GroupNorm(2)(nn.Conv(8, (3, 3))(x)))
            y = nn.relu(nn.GroupNorm(4)(nn.Conv(16, (3, 3), feature_group_count=4)(x)))
            return nn.Dense(3)(y.mean((1, 2)))

    x = normal(2, 6, 6, 1)
    fn, params = linen(ResNeXt(), x)
    groups = {
        # Eight channels are two groups of the norm, each of two groups of the convolution, each of two channels.
        "Conv_0/kernel[3]": (2, 9),
        "Conv_0/kernel[3]#2": (2, 9, ("Conv_0/kernel[3]",)),
        "Conv_0/kernel[3]#3": (2, 5, ("Conv_0/kernel[3]",)),
        "Conv_1/kernel[3]": (4, 5, ("Conv_0/kernel[3]",)),
    }
    return Case(fn, params, (x,), groups)


def shufflenet() -> Case:
    class ShuffleNet(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Conv(8, (3, 3))(x)
            left, right = jnp.split(x, 2, -1)
            right = nn.relu(nn.Conv(4, (3, 3))(right))
            right = nn.relu(nn.Conv(4, (1, 1))(right))
            x = jnp.concatenate([left, right], -1)
            x = x.reshape(*x.shape[:-1], 2, 4).swapaxes(-1, -2).reshape(x.shape)
            return nn.Dense(3)(x.mean((1, 2)))

    x = normal(2, 6, 6, 1)
    fn, params = linen(ShuffleNet(), x)
    groups = {
        # The left half and what the right half becomes are shuffled: computed by two layers, read by the dense one.
        "Conv_0/kernel[3]": (4, 5),
        "Conv_0/kernel[3]#2": (4, 3),
        "Conv_1/kernel[3]": (4, 3),
    }
    return Case(fn, params, (x,), groups)


def unet() -> Case:
    class UNet(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            top = nn.relu(nn.Conv(4, (3, 3))(x))
            low = nn.relu(nn.Conv(6, (3, 3), (2, 2))(top))
            squeezed = nn.sigmoid(nn.Dense(6)(nn.relu(nn.Dense(3)(low.mean((1, 2))))))
            up = nn.ConvTranspose(4, (2, 2), strides=(2, 2))(low * squeezed[:, None, None])
            return nn.Conv(2, (1, 1))(jnp.concatenate([top, up], -1))

    x = normal(2, 8, 8, 1)
    fn, params = linen(UNet(), x)
    groups = {
        "Conv_0/kernel[3]": (4, 4),
        "Conv_1/kernel[3]": (6, 6),  # the excitation's output is multiplied with it
        "ConvTranspose_0/kernel[3]": (4, 3),
        "Dense_1/kernel[1]": (3, 3),
    }
    return Case(fn, params, (x,), groups)


NETWORKS = [
    mlp,
    cnn_linen,
    cnn_nnx,
    cnn_equinox,
    vgg_haiku,
    resnet_eval,
    resnet_train,
    densenet,
    mobilenet,
    resnext,
    shufflenet,
    unet,
]
