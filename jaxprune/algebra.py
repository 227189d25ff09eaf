"""Mask algebra: masks of the same parameters combined, compared, packed to bits, read off and checked."""

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

from jaxprune._masks import make_masks
from jaxprune._selection import _counts
from jaxprune._tree._leaves import is_floating, is_nothing
from jaxprune._tree._masks import align_masks
from jaxprune._tree._params import Prunable, Stacked, read_params
from jaxprune._tree._paths import Tree, flatten, read_arrays
from jaxprune._tree._sharding import sharded_as
from jaxprune.sites._sites import Sites


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
    flat = _read(masks, "masks")
    return flat.build([~mask for mask in _arrays(flat, "inverted")])


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
    flat = _read(a, "a")
    pairs = []
    for name, x, y in zip(flat.names, flat.leaves, flat.aligned(_read(b, "b")), strict=True):
        if x is not None and y is not None and x.shape != y.shape:
            raise ValueError(f"{name} has shape {x.shape}, but b has {y.shape} there; combine masks of the same tree.")
        if x is None and y is not None:
            x = jnp.ones_like(y)
        elif y is None and x is not None:
            y = jnp.ones_like(x)
        pairs.append((x, y))
    return flat, pairs


def _read(masks: Any, what: str) -> Tree:
    """Flatten a tree of masks, each a boolean array or None."""
    flat = flatten(masks, what, is_leaf=is_nothing)
    leaves = []
    for name, mask in zip(flat.names, flat.leaves, strict=True):
        if not is_nothing(mask) and getattr(mask, "dtype", None) != np.bool_:
            found = f"{getattr(mask, 'dtype', type(mask).__name__)}{list(np.shape(mask))}"
            raise ValueError(f"{name} is {found}, not a boolean mask (True = keep).")
        leaves.append(None if is_nothing(mask) else jnp.asarray(mask))
    return dataclasses.replace(flat, leaves=leaves)


def _arrays(flat: Tree, verb: str) -> list[jax.Array]:
    for name, mask in zip(flat.names, flat.leaves, strict=True):
        if mask is None:
            raise ValueError(f"{name} is None, which has no shape and cannot be {verb}. Give a boolean array.")
    return flat.leaves


def pack(masks: Any) -> Any:
    """Pack masks to bits: an eighth of their bytes.

    Each leaf becomes ``ceil(size / 8)`` bytes, as by ``numpy.packbits(mask, bitorder="little")``: row-major, the first
    entry in the lowest bit, the last byte filled up with zeros. Shapes are not stored: `unpack` reads them off a tree.
    On an Explicit mesh the bits are replicated, since they follow no axis of the parameters.

    Args:
        masks: a tree of boolean masks. May be traced.

    Returns:
        A tree of the same treedef, of vectors of ``uint8``.

    Raises:
        ValueError: a leaf is not a boolean array.

    >>> import jax.numpy as jnp
    >>> pack([jnp.array([[True, False, False], [True, False, False]])])[0].tolist()  # 1 + 8
    [9]
    """
    flat = _read(masks, "masks")
    return flat.build([_pack_leaf(mask) for mask in _arrays(flat, "packed")])


@jax.jit
def _pack_leaf(mask: jax.Array) -> jax.Array:
    mesh = jax.typeof(mask).sharding.mesh
    if AxisType.Explicit in mesh.axis_types:
        # A sharded axis cannot be flattened there.
        mask = jax.sharding.reshard(mask, jax.sharding.NamedSharding(mesh, PartitionSpec()))
    return jnp.packbits(mask, bitorder="little")


def unpack(packed: Any, like: Any) -> Any:
    """Unpack what `pack` made.

    Args:
        packed: a tree of vectors of ``uint8``. May be traced.
        like: a tree with the same paths whose leaves have the masks' shapes: parameters, masks, or
            ``jax.ShapeDtypeStruct``.

    Returns:
        Masks of the treedef of `like`; sharded as its leaves, where these are arrays.

    Raises:
        ValueError: a leaf is missing, or not the ``ceil(size / 8)`` bytes that its shape needs; the message names it.

    >>> import jax.numpy as jnp
    >>> unpack([jnp.array([9], jnp.uint8)], [jnp.zeros((2, 3))])[0].tolist()
    [[True, False, False], [True, False, False]]
    """
    flat = flatten(like, "like")
    given = flat.aligned(flatten(packed, "packed"))
    leaves = []
    for name, bits, leaf in zip(flat.names, given, flat.leaves, strict=True):
        size = -(-math.prod(np.shape(leaf)) // 8)
        if getattr(bits, "dtype", None) != np.uint8 or np.shape(bits) != (size,):
            found = f"{getattr(bits, 'dtype', type(bits).__name__)}{list(np.shape(bits))}"
            raise ValueError(f"packed has for {name} {found}; its shape {list(np.shape(leaf))} takes uint8[{size}].")
        leaves.append(_unpack_leaf(bits, leaf))
    return flat.build(leaves)


def _unpack_leaf(bits: Any, leaf: Any) -> jax.Array:
    shape = np.shape(leaf)
    bits = jnp.unpackbits(jnp.asarray(bits), count=math.prod(shape), bitorder="little")
    mask = bits.astype(bool).reshape(shape)
    return sharded_as(mask, leaf) if isinstance(leaf, jax.Array) else mask


def masks_of(params: Any, *, prunable: Prunable = None, stacked: Stacked = None, sites: Sites | None = None) -> Any:
    """Read masks off parameters that have been pruned: what is zero now is removed.

    Leaves that are not prunable are kept whole. A weight that is zero by chance counts as pruned, and a layer of zeros
    as empty; a NaN is kept, since it is not zero. Prefer masks that were saved with the parameters.

    Args:
        params: a pytree of arrays. May be traced.
        prunable: which leaves are read, as in `make_masks`.
        stacked: as in `make_masks`.
        sites: as in `make_masks`.

    Returns:
        Masks of the treedef of `params`, True = keep.

    Raises:
        ValueError: nothing is prunable.
        TypeError: a leaf is no array.

    >>> import jax.numpy as jnp
    >>> masks = masks_of({"kernel": jnp.array([[0.0, 2.0]]), "bias": jnp.zeros(2)})
    >>> masks["kernel"].tolist(), masks["bias"].tolist()
    ([[False, True]], [True, True])
    """
    return make_masks(params, 1.0, rule=_nonzero, prunable=prunable, stacked=stacked, sites=sites)


def _nonzero(scores: Any, k: Any) -> Any:
    del k
    return jax.tree.map(lambda score: score != 0, scores)


def require_pruned(params: Any, masks: Any) -> None:
    """Raise an error unless the masks fit the parameters and every pruned weight is exactly zero.

    For a test or a check before export: it reads every weight, so it cannot run under ``jit``. Leaves that are not
    floating-point are never pruned, and only their masks' shapes are checked.

    Args:
        params: a pytree of arrays.
        masks: masks for them, as `apply_masks` takes them.

    Raises:
        ValueError: a mask is missing, is not bool or has another shape, or a pruned weight is not zero (a NaN is not);
            the message names the leaf.
        TypeError: a leaf of `params` is no array.

    >>> import jax.numpy as jnp
    >>> masks = {"kernel": jnp.array([[True, False]])}
    >>> require_pruned({"kernel": jnp.array([[2.0, 0.0]])}, masks)
    >>> require_pruned({"kernel": jnp.array([[2.0, 0.5]])}, masks)
    Traceback (most recent call last):
        ...
    ValueError: params['kernel'] has 1 pruned weight(s) of 1 that are not zero; the largest is 0.5. ...
    """
    flat = read_arrays(params, "params")
    for name, leaf, mask in zip(flat.names, flat.leaves, align_masks(masks, flat), strict=True):
        if mask is None or not is_floating(leaf):
            continue
        if isinstance(leaf, jax.core.Tracer) or isinstance(mask, jax.core.Tracer):
            raise ValueError(f"require_pruned reads the values of {name}, which are traced; call it outside jit.")
        wrong, removed, largest = _unpruned(leaf, mask)
        if wrong:
            raise ValueError(
                f"{name} has {int(wrong):,} pruned weight(s) of {int(removed):,} that are not zero; the largest is "
                f"{float(largest):g}. Apply the masks with apply_masks(params, masks), and keep them with "
                "keep_pruned(masks) last in the optimizer's chain."
            )


@jax.jit
def _unpruned(leaf: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    wrong = ~mask & (leaf != 0)
    largest = jnp.max(jnp.where(wrong, jnp.abs(leaf), 0), initial=0)
    hits, pruned = (_counts.to_float(_counts.count_true(x, tuple(range(x.ndim)))) for x in (wrong, ~mask))
    return hits, pruned, largest


def count_kept(masks: Any, *, prunable: Prunable = None, stacked: Stacked = None, sites: Sites | None = None) -> int:
    """Count the weights that the masks keep of the prunable leaves, exactly.

    Args:
        masks: a tree of boolean masks, True = keep.
        prunable: which leaves count, as in `make_masks`.
        stacked: as in `make_masks`.
        sites: as in `make_masks`.

    >>> count_kept({"kernel": jnp.array([[True, False]]), "bias": jnp.ones(2, bool)})
    1
    """
    tree = read_params(masks, what="masks", prunable=prunable, stacked=stacked, sites=sites, eligible=lambda leaf: True)
    chosen = [leaf for leaf, fits in zip(tree.leaves, tree.prunable, strict=True) if fits]
    return sum(int(_counts.to_numpy(_counts.count_true(leaf, tuple(range(leaf.ndim))))) for leaf in chosen)
