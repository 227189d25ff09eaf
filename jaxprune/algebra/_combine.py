"""Masks of the same parameters combined and compared."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._selection import _counts
from jaxprune._tree._paths import Tree
from jaxprune.algebra._read import arrays_of, read


def intersect(a: Any, b: Any) -> Any:
    """Keep the weights that both masks keep: ``a & b``.

    Args:
        a: a tree of boolean masks, True = keep; a leaf that is None keeps its parameter whole. May be traced.
        b: masks with the same paths and shapes; the containers may be of other classes.

    Returns:
        Masks of the treedef of `a`.

    Raises:
        ValueError: the masks are of different parameters, or not bool; the message names the leaf.

    >>> import jax.numpy as jnp
    >>> intersect([jnp.array([True, True, False])], [jnp.array([True, False, False])])[0].tolist()
    [True, False, False]
    """
    return _combine(operator.and_, a, b)


def union(a: Any, b: Any) -> Any:
    """Keep the weights that at least one of the masks keeps: ``a | b``.

    Args:
        a: as in `intersect`.
        b: as in `intersect`.

    Returns:
        Masks of the treedef of `a`.

    Raises:
        ValueError: as in `intersect`.

    >>> import jax.numpy as jnp
    >>> union([jnp.array([True, True, False])], [jnp.array([True, False, False])])[0].tolist()
    [True, True, False]
    """
    return _combine(operator.or_, a, b)


def invert(masks: Any) -> Any:
    """Keep exactly the weights that the masks remove: ``~masks``.

    A leaf that is kept whole, such as a bias, is then removed whole; intersect the result with masks that say which
    weights are meant, if these should stay.

    Args:
        masks: a tree of boolean masks, True = keep. May be traced.

    Returns:
        Masks of the same treedef.

    Raises:
        ValueError: a leaf is not a boolean array.

    >>> import jax.numpy as jnp
    >>> invert({"kernel": jnp.array([True, False])})["kernel"].tolist()
    [False, True]
    """
    flat = read(masks, "masks")
    return flat.build([~mask for mask in arrays_of(flat, "inverted")])


def overlap(a: Any, b: Any) -> jax.Array:
    """Measure how much two masks agree: the Jaccard index ``|a & b| / |a | b|`` of the weights they keep.

    1 for equal masks, 0 where no weight is kept by both; ``1 - overlap(before, after)`` is the churn of masks that
    change while training. Leaves that both keep whole, such as biases, do not count. Two masks that keep the same
    fraction d at random overlap by about d / (2 - d). Counts are exact, also beyond 2**31 weights.

    Args:
        a: as in `intersect`.
        b: as in `intersect`.

    Returns:
        A float32 scalar in [0, 1]; 1 where neither removes anything.

    Raises:
        ValueError: as in `intersect`.

    >>> import jax.numpy as jnp
    >>> a = {"kernel": jnp.array([True, True, False, False]), "bias": jnp.ones(9, bool)}
    >>> b = {"kernel": jnp.array([True, False, True, False]), "bias": jnp.ones(9, bool)}
    >>> round(float(overlap(a, b)), 4)  # one weight is kept by both, three by one at least
    0.3333

    Reference: Jaccard, "The Distribution of the Flora in the Alpine Zone", 1912.
    """
    common = either = none = _counts.from_int(0)
    for x, y in _pairs(a, b)[1]:
        if x is None:
            continue
        both, one = (_counts.count_true(mask, tuple(range(mask.ndim))) for mask in (x & y, x | y))
        counts = ~_counts.equal(both, _counts.from_int(x.size))
        common = _counts.add(common, _counts.where(counts, both, none))
        either = _counts.add(either, _counts.where(counts, one, none))
    index = _counts.to_float(common) / jnp.maximum(_counts.to_float(either), 1.0)
    return jnp.where(_counts.equal(either, none), 1.0, index)


def _combine(operation: Callable[[jax.Array, jax.Array], jax.Array], a: Any, b: Any) -> Any:
    flat, pairs = _pairs(a, b)
    return flat.build([None if x is None else operation(x, y) for x, y in pairs])


def _pairs(a: Any, b: Any) -> tuple[Tree, list[tuple[Any, Any]]]:
    """Pair the leaves of two trees of masks as arrays; (None, None) where both keep the leaf whole."""
    flat = read(a, "a")
    pairs = []
    for name, x, y in zip(flat.names, flat.leaves, flat.aligned(read(b, "b")), strict=True):
        if x is not None and y is not None and x.shape != y.shape:
            raise ValueError(f"{name} has shape {x.shape}, but b has {y.shape} there; combine masks of the same tree.")
        if x is None and y is not None:
            x = jnp.ones_like(y)
        elif y is None and x is not None:
            y = jnp.ones_like(x)
        pairs.append((x, y))
    return flat, pairs
