"""Scores of whole channels: one number for all the weights of a channel."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from jaxprune._tree._leaves import is_floating
from jaxprune._tree._sharding import without_explicit_axes
from jaxprune.scores._leaves import nan_lowest, widen


def channel_norm(kernel: jax.Array, axes: int | tuple[int, ...], *, ord: Literal[1, 2] = 2) -> jax.Array:
    """Score each channel by the norm of its weights, of complex ones that of their moduli.

    A channel with a NaN weight scores minus infinity.

    Args:
        kernel: a floating-point array of any shape; summed up in float32 (float64 stays).
        axes: the axes over which a channel's weights extend, to be reduced: ``(0, 1, 2)`` for the filters of
            a Flax convolution, ``(1, 2, 3)`` in Equinox's layout (static).
        ord: 1 for the sum of magnitudes, 2 for the root of the sum of squares (static).

    Returns:
        float32 of the shape of the axes that are left, larger = keep.

    Raises:
        ValueError: the kernel has no such axis, or ord is neither 1 nor 2.
        TypeError: the kernel is not floating-point.

    >>> import jax.numpy as jnp
    >>> kernel = jnp.array([[3.0, 1.0], [-4.0, 1.0]])  # two inputs, two outputs
    >>> channel_norm(kernel, 0).tolist()[0], channel_norm(kernel, 0, ord=1).tolist()
    (5.0, [7.0, 2.0])

    Reference: Li, Kadav, Durdanovic, Samet, Graf, "Pruning Filters for Efficient ConvNets", 2017, section
    3.1.
    """
    if ord not in (1, 2):
        raise ValueError(f"channel_norm takes ord=1 or ord=2; got {ord!r}.")
    return _channel_norm(kernel, axes=_checked(kernel, axes, "channel_norm"), ord=ord)


@functools.partial(jax.jit, static_argnames=("axes", "ord"))
def _channel_norm(kernel: jax.Array, *, axes: tuple[int, ...], ord: int) -> jax.Array:
    sizes = jnp.abs(widen(kernel))
    sums = jnp.sum(sizes if ord == 1 else jnp.square(sizes), axes)
    return nan_lowest(sums if ord == 1 else jnp.sqrt(sums))


def fpgm(kernel: jax.Array, axes: int | tuple[int, ...]) -> jax.Array:
    """Score each filter by the sum of its distances to the others; the one nearest their median goes first.

    A filter near the geometric median can be replaced by the rest, however large its norm is. The distances
    are computed from differences, one filter against all, so that equal filters score the same; the cost is
    the number of filters times the size of the kernel. A filter with a NaN weight scores minus infinity and
    is left out of the others' sums.

    Args:
        kernel: a floating-point array of any shape, the weights of one layer with their signs; computed in
            float32 (float64 stays).
        axes: the axes over which a filter's weights extend, to be reduced, as in `channel_norm` (static).

    Returns:
        float32 of the shape of the axes that are left, larger = keep.

    Raises:
        ValueError: the kernel has no such axis.
        TypeError: the kernel is not floating-point.

    >>> import jax.numpy as jnp
    >>> fpgm(jnp.array([[0.0, 1.0, 5.0]]), 0).tolist()  # one input, three filters
    [6.0, 5.0, 9.0]

    Reference: He, Liu, Wang, Hu, Yang, "Filter Pruning via Geometric Median for Deep Convolutional Neural
    Networks Acceleration", 2019, section 3.
    """
    return _fpgm(kernel, axes=_checked(kernel, axes, "fpgm"))


@functools.partial(jax.jit, static_argnames="axes")
def _fpgm(kernel: jax.Array, *, axes: tuple[int, ...]) -> jax.Array:
    channels = jnp.sum(widen(kernel), axes)  # of the shape and the sharding of the result, for no other use

    def sums_of_distances(kernel: jax.Array) -> jax.Array:
        last = tuple(range(kernel.ndim - len(axes), kernel.ndim))
        filters = jnp.moveaxis(widen(kernel), axes, last).reshape(channels.size, -1)
        broken = jnp.isnan(filters).any(axis=1)
        filters = jnp.where(broken[:, None], 0.0, filters)

        def to_others(one: jax.Array) -> jax.Array:
            distances = jnp.sqrt(jnp.sum(jnp.square(jnp.abs(filters - one[None])), axis=1))
            return jnp.sum(jnp.where(broken, 0.0, distances))

        return jnp.where(broken, -jnp.inf, lax.map(to_others, filters)).reshape(channels.shape)

    found: jax.Array = without_explicit_axes(sums_of_distances, channels)(kernel)
    return found


def batch_norm_scale(scale: jax.Array) -> jax.Array:
    """Score each channel by the magnitude of the scale of the batch norm behind it, ``|gamma|``.

    Meant for networks trained with an L1 penalty on the scales. A NaN scale scores minus infinity.

    Args:
        scale: the norm's scale, floating-point, one number for each channel.

    Returns:
        float32 of the shape of scale, larger = keep.

    Raises:
        TypeError: the scale is not floating-point.

    >>> import jax.numpy as jnp
    >>> batch_norm_scale(jnp.array([0.5, -2.0, 0.0])).tolist()
    [0.5, 2.0, 0.0]

    Reference: Liu, Li, Shen, Huang, Yan, Zhang, "Learning Efficient Convolutional Networks through Network
    Slimming", 2017, section 3.
    """
    _require_floating(scale, "batch_norm_scale")
    return nan_lowest(jnp.abs(widen(scale)))


def _require_floating(array: jax.Array, what: str) -> None:
    if not is_floating(array):
        raise TypeError(f"{what} takes an array of floating-point numbers; got {jnp.result_type(array)}.")


def _checked(kernel: jax.Array, axes: int | tuple[int, ...], what: str) -> tuple[int, ...]:
    """Return the axes as numbers from 0 on."""
    _require_floating(kernel, what)
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    ndim = len(kernel.shape)
    if any(not -ndim <= axis < ndim for axis in axes) or len({axis % ndim for axis in axes}) < len(axes):
        raise ValueError(f"{what} got axes {axes} for a kernel of shape {kernel.shape}; name axes it has, once each.")
    return tuple(axis % ndim for axis in axes)
