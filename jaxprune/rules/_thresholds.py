"""Rules that compare each weight with a threshold: k times a statistic of its layer, or k itself."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._dtypes import real, wide
from jaxprune._selection import _counts, _moments
from jaxprune._selection._alike import Kind, for_each
from jaxprune._selection._largest import keep_largest
from jaxprune._tree._leaves import is_known
from jaxprune.rules import _guard
from jaxprune.rules._layers import Layer, read_layers, strengths
from jaxprune.rules._rule import Rule, says

# A statistic: (values, whether they are weights, the axes of one layer) -> one number a layer, axes kept.
_Statistic = Callable[[jax.Array, bool, tuple[int, ...]], jax.Array]


def _std(values: jax.Array, magnitude: bool, axes: tuple[int, ...]) -> jax.Array:
    del magnitude  # the deviation of the weights themselves, not of their magnitudes
    return _moments.std(values, axes)


def _mean(values: jax.Array, magnitude: bool, axes: tuple[int, ...]) -> jax.Array:
    return _moments.mean(values, axes, magnitude=magnitude)


def _max(values: jax.Array, magnitude: bool, axes: tuple[int, ...]) -> jax.Array:
    return _moments.largest(values, axes, magnitude=magnitude)


def _one(values: jax.Array, magnitude: bool, axes: tuple[int, ...]) -> jax.Array:
    del magnitude
    shape = [1 if axis in axes else n for axis, n in enumerate(values.shape)]
    return jnp.ones(shape, wide(real(values.dtype)))


class _Static(NamedTuple):
    """What is static of one layer: whether its values are weights, its axes, its kind."""

    magnitude: bool
    axes: tuple[int, ...]
    kind: Kind


class _Found(NamedTuple):
    """Of one layer the threshold that was asked for and the largest score, which the threshold may not exceed."""

    asked: jax.Array
    largest: jax.Array


@functools.partial(jax.jit, static_argnames=("layers", "statistic"))
def _keep(
    values: list[jax.Array], strengths: list[jax.Array], *, layers: tuple[_Static, ...], statistic: _Statistic
) -> tuple[list[jax.Array], list[_Found]]:
    """Return for each layer its mask and what was found of it."""
    values = jax.lax.stop_gradient(values)

    def find(i: int, values: jax.Array, k: jax.Array) -> _Found:
        magnitude, axes, _ = layers[i]
        found = statistic(values, magnitude, axes)
        k = jnp.expand_dims(k, axes) if jnp.ndim(k) else k
        return _Found(k.astype(found.dtype) * found, _max(values, magnitude, axes))

    kinds = [(layer.kind, k.shape, k.dtype) for layer, k in zip(layers, strengths, strict=True)]
    found = for_each(find, values, strengths, kinds)
    return [_mask(*entry) for entry in zip(values, layers, found, strict=True)], found


def _mask(values: jax.Array, layer: _Static, found: _Found) -> jax.Array:
    score = (jnp.abs(values) if layer.magnitude else values).astype(found.asked.dtype)
    # A layer without one finite weight has no largest one (NaN): it is left as it is.
    return (score >= jnp.fmin(found.asked, found.largest)) | jnp.isnan(found.largest)


def _threshold(scores: Any, k: Any, statistic: _Statistic, rule: Rule, max_sparsity: float) -> Any:
    layers, build = read_layers(scores)
    _guard.check_max_sparsity(max_sparsity, rule.name)
    given = strengths(k, layers, rule)
    masks = [jnp.ones_like(layer.values, dtype=bool) for layer in layers]
    lines: list[str] = []
    filled = [i for i, layer in enumerate(layers) if layer.values.size]
    made, found = _keep(
        [layers[i].values for i in filled],
        [jnp.asarray(given[i]) for i in filled],
        layers=tuple(_Static(layers[i].magnitude, layers[i].axes, layers[i].kind) for i in filled),
        statistic=statistic,
    )
    for i, mask, (asked, largest) in zip(filled, made, found, strict=True):
        layer = layers[i]
        allowed = _guard.most_removed(max_sparsity, layer.size)
        lost = _counts.to_float(_counts.count_true(~mask, layer.axes)) if max_sparsity < 1 else None
        lines += _acted(layer, given[i], asked, largest, lost, allowed)
        masks[i] = _cap(mask, layer, allowed) if max_sparsity < 1 else mask
    _guard.warn(lines, rule.name)
    return build(masks)


def _cap(mask: jax.Array, layer: Layer, allowed: int) -> jax.Array:
    """Keep at least the largest scores, so many that no more than `allowed` go."""
    granted = keep_largest(layer.values, _counts.from_int(allowed), batch=layer.stack, magnitude=layer.magnitude)
    # Each of the two keeps a set of largest scores, so one contains the other and the union is the larger one.
    return mask | granted


def _acted(
    layer: Layer, k: Any, asked: jax.Array, largest: jax.Array, lost: jax.Array | None, allowed: int
) -> Iterator[str]:
    """Say in a line a layer where the guard acted; nothing where values are not known (under jit)."""
    if not all(is_known(array) for array in (k, asked, largest)):
        return
    threshold, most = (np.squeeze(np.asarray(array), layer.axes) for array in (asked, largest))
    gone = np.where(threshold > most, layer.size, 0 if lost is None else np.asarray(lost))
    strength = np.broadcast_to(k, threshold.shape)
    for index in map(tuple, np.argwhere((threshold > most) | (gone > allowed))):
        where = layer.name + "".join(f"[{i}]" for i in index)
        yield (
            f"  {where}: k = {strength[index]:g} asks for |w| >= {threshold[index]:.4g}, which {gone[index]:,.0f} of "
            f"{layer.size:,} do not reach; the largest is {most[index]:.4g}"
        )


@says(scope="layer", strength="how many times the standard deviation of its layer a weight must reach", low=0.0)
def std_threshold(scores: Any, k: Any, *, max_sparsity: float = 1.0) -> Any:
    """Keep the weights whose magnitude is at least k standard deviations of their layer.

    The deviation is the population's, over all entries of the layer, zeros included, accumulated in float32 or wider
    and blind to NaN and infinity; of complex weights, the root mean square distance from their mean. Pruning again with
    the same k therefore changes nothing, as long as pruning has not widened the distribution (it cannot where the mean is
    near zero). No layer is emptied: a threshold above the largest magnitude is lowered to it, and a layer without a finite weight is
    left as it is. A NaN weight goes.

    Args:
        scores: a tree of scores, as `make_masks` hands it to a rule; without `scores=` they are the weights.
        k: >= 0, a number, a scalar array (may be traced) or a tree prefix.
        max_sparsity: the most that may be removed of any layer, in [0, 1]; a layer that would lose more keeps its
            largest weights, exactly ``n - floor(max_sparsity * n)`` of them (static).

    Returns:
        A tree of bool masks, True = keep.

    Raises:
        ValueError: k is negative, NaN or infinite, or fits no layer; max_sparsity is outside [0, 1].

    >>> import jax.numpy as jnp, jaxprune
    >>> params = {"kernel": jnp.array([[3.0, -1.0], [1.0, -3.0]])}  # std = sqrt(5) = 2.236
    >>> jaxprune.make_masks(params, 1.0)["kernel"].tolist()
    [[True, False], [False, True]]

    Reference: Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural Networks", 2015,
    section 3.1 (k is their quality parameter).
    """
    return _threshold(scores, k, _std, std_threshold, max_sparsity)


@says(scope="layer", strength="how many times the mean magnitude of its layer a weight must reach", low=0.0)
def mean_threshold(scores: Any, k: Any, *, max_sparsity: float = 1.0) -> Any:
    """Keep the weights whose magnitude is at least k times the mean magnitude of their layer.

    Guards, ties, NaN, arguments and errors as in `std_threshold`; idempotent for any weights, since zeros only lower
    the mean.

    >>> import jax.numpy as jnp, jaxprune
    >>> params = {"kernel": jnp.array([[3.0, -1.0], [1.0, -3.0]])}  # the mean magnitude is 2
    >>> jaxprune.make_masks(params, 1.0, rule=mean_threshold)["kernel"].tolist()
    [[True, False], [False, True]]
    """
    return _threshold(scores, k, _mean, mean_threshold, max_sparsity)


@says(scope="layer", strength="how many times the largest magnitude of its layer a weight must reach", low=0.0)
def max_threshold(scores: Any, k: Any, *, max_sparsity: float = 1.0) -> Any:
    """Keep the weights whose magnitude is at least k times the largest magnitude of their layer.

    Guards, ties, NaN, arguments and errors as in `std_threshold`; idempotent for any weights.

    >>> import jax.numpy as jnp, jaxprune
    >>> params = {"kernel": jnp.array([[4.0, -1.0], [2.0, -3.0]])}
    >>> jaxprune.make_masks(params, 0.5, rule=max_threshold)["kernel"].tolist()
    [[True, False], [True, True]]
    """
    return _threshold(scores, k, _max, max_threshold, max_sparsity)


@says(scope="layer", strength="the magnitude that a weight must reach", low=0.0)
def absolute_threshold(scores: Any, k: Any, *, max_sparsity: float = 1.0) -> Any:
    """Keep the weights whose magnitude is at least k.

    Guards, ties, NaN, arguments and errors as in `std_threshold`; idempotent for any weights.

    >>> import jax.numpy as jnp, jaxprune
    >>> params = {"kernel": jnp.array([[4.0, -1.0], [2.0, -3.0]])}
    >>> jaxprune.make_masks(params, 2.5, rule=absolute_threshold)["kernel"].tolist()
    [[True, False], [False, True]]
    """
    return _threshold(scores, k, _one, absolute_threshold, max_sparsity)
