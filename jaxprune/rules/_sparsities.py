"""Rules that remove an exact number of weights: of each layer, each row, or all layers together."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune._selection import _counts
from jaxprune._selection._counts import Count
from jaxprune._selection._largest import Each, keep_largest_each, keep_largest_jointly
from jaxprune.rules import _erk, _guard
from jaxprune.rules._layers import Layer, is_scalar, read_layers, strengths
from jaxprune.rules._rule import Rule, says

_FRACTION = "the fraction removed"


@says(scope="layer", strength=_FRACTION, low=0.0, high=1.0)
def layer_sparsity(scores: Any, k: Any, *, max_sparsity: float = 1.0) -> Any:
    """Remove exactly ``round(k * n)`` weights of every layer, those of the smallest scores.

    Exact whatever the ties and the dtype: among equals the lower row-major index is kept. A NaN ranks lowest. A higher
    k removes a superset. The last weight of a layer is never removed.

    Args:
        scores: a tree of scores, as `make_masks` hands it to a rule.
        k: the sparsity, in [0, 1]: a number, a scalar array (may be traced) or a tree prefix. A traced float32 is taken
            at its word: the float32 next to 0.9 removes 24 more or fewer of a thousand million weights than 0.9 would.
        max_sparsity: the most that may be removed of any layer, in [0, 1]: at most ``floor(max_sparsity * n)`` go
            (static).

    Returns:
        A tree of bool masks, True = keep.

    Raises:
        ValueError: k is outside [0, 1] or NaN, or fits no layer; max_sparsity is outside [0, 1].

    >>> import jax.numpy as jnp, jaxprune
    >>> params = {"kernel": jnp.array([[1.0, 1.0], [1.0, 2.0]])}
    >>> jaxprune.make_masks(params, 0.5, rule=layer_sparsity)["kernel"].tolist()
    [[True, False], [False, True]]
    """
    return _per_pool(scores, k, layer_sparsity, max_sparsity, lambda layer: ())


@says(scope="unit", strength=_FRACTION + " of every output unit", low=0.0, high=1.0)
def row_sparsity(scores: Any, k: Any, *, axis: int | None = None, max_sparsity: float = 1.0) -> Any:
    """Remove exactly ``round(k * n)`` of the n input weights of every output unit.

    Counts, ties, NaN, arguments and errors as in `layer_sparsity`; a unit never loses its last weight.

    Args:
        scores: as in `layer_sparsity`.
        k: as in `layer_sparsity`.
        axis: the axis of one layer that numbers the output units; None takes the framework's (the last one in Flax and
            Haiku, heads and head_dim of an attention projection, the first one of an Equinox or PyTorch ``weight``), and
            raises where neither name nor shape tells.
        max_sparsity: as in `layer_sparsity`, of any unit.

    Returns:
        A tree of bool masks, True = keep.

    >>> import jax.numpy as jnp, jaxprune
    >>> params = {"kernel": jnp.array([[1.0, 4.0], [2.0, 3.0]])}  # columns are units
    >>> jaxprune.make_masks(params, 0.5, rule=row_sparsity)["kernel"].tolist()
    [[False, True], [True, False]]

    Reference: Sun, Liu, Bair, Kolter, "A Simple and Effective Pruning Approach for Large Language Models", 2023,
    section 3 (comparison group: per output).
    """
    return _per_pool(scores, k, row_sparsity, max_sparsity, lambda layer: layer.output_axes(row_sparsity.name, axis))


def _per_pool(scores: Any, k: Any, rule: Rule, max_sparsity: float, units: Callable[[Layer], tuple[int, ...]]) -> Any:
    layers, build = read_layers(scores)
    _guard.check_max_sparsity(max_sparsity, rule.name)
    counts, lines = [], []
    each: list[Each] = []
    known: dict[tuple[Any, int, int], Count] = {}  # of layers of one size, for one k
    for layer, strength in zip(layers, strengths(k, layers, rule), strict=True):
        batch = tuple(sorted({*layer.stack, *units(layer)}))
        shape = layer.values.shape
        size = math.prod(n for axis, n in enumerate(shape) if axis not in batch)
        allowed = min(max(0, size - 1), _guard.most_removed(max_sparsity, size))
        if isinstance(strength, float) and size and round(strength * size) > allowed:
            lines.append(f"  {layer.name}: k = {strength:g} asks for {round(strength * size):,} of {size:,} to go")
        asked = (strength if isinstance(strength, float) else id(strength), size, allowed)
        if asked not in known:
            known[asked] = _counts.minimum(_counts.rounded(strength, size), _counts.from_int(allowed))
        removed = known[asked]
        if removed.low.ndim:
            # One count for each layer of a stack serves all units of that layer.
            others = [i for i, axis in enumerate(batch) if axis not in layer.stack]
            pools = tuple(shape[axis] for axis in batch)
            removed = Count(*(jnp.broadcast_to(jnp.expand_dims(word, others), pools) for word in removed))
        counts.append(removed)
        each.append(Each(batch, layer.magnitude, layer.kind))
    _guard.warn(lines, rule.name)
    return build(keep_largest_each([layer.values for layer in layers], counts, each))


@says(scope="model", shares="threshold", strength=_FRACTION + " of all layers together", low=0.0, high=1.0)
def global_sparsity(scores: Any, k: Any, *, max_sparsity: float = 1.0) -> Any:
    """Remove exactly ``round(k * n)`` weights of all layers together, by one threshold for all.

    Exact whatever the ties: among equals the earlier leaf is kept, then the earlier layer of a stack, then the lower
    row-major index. A NaN ranks lowest. No layer is emptied and none loses more than `max_sparsity`: the largest weights
    that this protects are left out of the ranking, so that the total stays exact.

    Args:
        scores: a tree of scores, comparable between layers; as `make_masks` hands it to a rule.
        k: the sparsity, in [0, 1]: one number or scalar array (may be traced).
        max_sparsity: the most that may be removed of any layer, in [0, 1]: at most ``floor(max_sparsity * n)`` go, and
            never the last weight (static).

    Returns:
        A tree of bool masks, True = keep.

    Raises:
        ValueError: k is outside [0, 1], NaN or a tree; or above what max_sparsity allows (a traced k is lowered).

    >>> import jax.numpy as jnp, jaxprune
    >>> params = {"a": {"kernel": jnp.array([[1.0, 9.0]])}, "b": {"kernel": jnp.array([[2.0, 3.0]])}}
    >>> masks = jaxprune.make_masks(params, 0.5, rule=global_sparsity)
    >>> masks["a"]["kernel"].tolist(), masks["b"]["kernel"].tolist()
    ([[False, True]], [[False, True]])
    """
    layers, build = read_layers(scores)
    removed = _total_removed(layers, k, global_sparsity, max_sparsity)
    return build(
        keep_largest_jointly(
            [layer.values for layer in layers],
            removed,
            magnitude=all(layer.magnitude for layer in layers),
            batches=[layer.stack for layer in layers],
            most=[most_removed_of(layer, max_sparsity) for layer in layers],
            kinds=[layer.kind for layer in layers],
        )
    )


@says(scope="model", shares="shapes", strength=_FRACTION + " of all layers together", low=0.0, high=1.0)
def erk_sparsity(scores: Any, k: Any, *, max_sparsity: float = 1.0) -> Any:
    """Remove exactly ``round(k * n)`` weights of all layers together, allocated by Erdos-Renyi-Kernel.

    A layer's share of the weights kept is proportional to the sum of its dimensions, so that small layers stay denser
    than large ones; a layer whose share exceeds its size is kept whole, and the others share what remains. Inside a
    layer the largest scores are kept, exactly, as in `layer_sparsity`. No layer is emptied and none loses more than
    `max_sparsity`; the total stays exact.

    Args:
        scores: as in `layer_sparsity`.
        k: the sparsity over all layers, in [0, 1]: one number or scalar array (may be traced).
        max_sparsity: as in `global_sparsity`.

    Returns:
        A tree of bool masks, True = keep.

    Raises:
        ValueError: as in `global_sparsity`.

    >>> import jax.numpy as jnp, jaxprune
    >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.ones((6, 6))}}
    >>> masks = jaxprune.make_masks(params, 0.6, rule=erk_sparsity)  # 16 of 40 stay, shared as 4 to 12
    >>> int(masks["a"]["kernel"].sum()), int(masks["b"]["kernel"].sum())
    (4, 12)

    Reference: Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets Winners", 2020, section 3.
    """
    layers, build = read_layers(scores)
    removed = _total_removed(layers, k, erk_sparsity, max_sparsity)
    least = [layer.size - most_removed_of(layer, max_sparsity) for layer in layers]
    sizes, dims = [layer.size for layer in layers], [sum(layer.shape) for layer in layers]
    counts = _erk.allocate(sizes, dims, [layer.stack_shape for layer in layers], removed, least)
    each = [Each(layer.stack, layer.magnitude, layer.kind) for layer in layers]
    return build(keep_largest_each([layer.values for layer in layers], counts, each))


def most_removed_of(layer: Layer, max_sparsity: float) -> int:
    """How many weights one layer may lose: never its last one."""
    return min(max(0, layer.size - 1), _guard.most_removed(max_sparsity, layer.size))


def _total_removed(layers: Sequence[Layer], k: Any, rule: Rule, max_sparsity: float) -> Count:
    """Return round(k * n) over all layers, checked or, when traced, lowered to what the layers may lose together."""
    _guard.check_max_sparsity(max_sparsity, rule.name)
    if not is_scalar(k) or np.ndim(k):
        raise ValueError(f"{rule.name} takes one k for all layers, not a tree or an array; got {k!r}.")
    strength = strengths(k, layers, rule)[0]
    size = sum(layer.size * layer.depth for layer in layers)
    most = sum(most_removed_of(layer, max_sparsity) * layer.depth for layer in layers)
    if isinstance(strength, float) and round(strength * size) > most:
        asked = f"k = {strength:g} asks for {round(strength * size):,} of {size:,} weights to go"
        if max_sparsity < 1:
            raise ValueError(
                f"{rule.name}: {asked}, but with max_sparsity={max_sparsity:g} only {most:,} can (k <= {most / size:.6g})."
            )
        _guard.warn([f"  all layers: {asked}; each keeps its largest"], rule.name)
    return _counts.minimum(_counts.rounded(strength, size), _counts.from_int(most))
