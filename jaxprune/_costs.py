"""What a pruned model costs to keep: weights, and bytes in a file."""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune._masks import align_masks
from jaxprune._paths import flatten, is_floating, require_arrays
from jaxprune._prunable import Predicate, Stacked, choose, stack_axes


def count_kept(mask: Any, axes: Sequence[int] | None = None) -> np.ndarray:
    """Count True exactly along `axes` (all when None), int64: modulo 2**32, with a float to tell how often that wrapped.

    >>> count_kept(jnp.array([[True, False], [True, True]]), (1,)).tolist()
    [1, 2]
    """
    along = None if axes is None else tuple(axes)
    low = np.asarray(jnp.sum(mask, along, dtype=jnp.uint32), np.int64)
    near = np.asarray(jnp.sum(mask, along, dtype=jnp.float32), np.float64)
    return low + 2**32 * np.round((near - low) / 2**32).astype(np.int64)


def kept_weights(masks: Any, *, prunable: Predicate | Any = None, stacked: Stacked | None = None) -> int:
    """Count the weights that the masks keep of the prunable leaves, exactly.

    Args:
        masks: a tree of boolean masks, True = keep.
        prunable: which leaves count, as in `make_masks`.
        stacked: as in `make_masks`.

    >>> kept_weights({"kernel": jnp.array([[True, False]]), "bias": jnp.ones(2, bool)})
    1
    """
    flat = flatten(masks, "masks")
    chosen = choose(prunable, masks, flat, stack_axes(stacked, flat), eligible=lambda leaf: True)
    return sum(int(count_kept(leaf)) for leaf, fits in zip(flat.leaves, chosen, strict=True) if fits)


def stored_bytes(params: Any, masks: Any, *, bits: int | None = None) -> int:
    """Count the bytes that `save_sparse` writes for parameters under masks, the file's header and compression aside.

    A leaf that is kept whole is stored densely; of others the kept values and a bit for every weight.

    Args:
        params: a pytree of arrays, of which shapes and dtypes matter.
        masks: their masks, True = keep.
        bits: of a quantised kept value, 8 or 4; None stores values as they are.

    Returns:
        Bytes.

    >>> params = {"kernel": jnp.ones((2, 16)), "bias": jnp.ones(16)}
    >>> masks = {"kernel": jnp.arange(32).reshape(2, 16) < 4, "bias": jnp.ones(16, bool)}
    >>> stored_bytes(params, masks)  # 4 floats, 2 rows of 2 bytes, 2 row offsets, the shape; 16 floats
    116
    """
    flat = flatten(params, "params")
    require_arrays(flat)
    total = 0
    for leaf, mask in zip(flat.leaves, align_masks(masks, flat), strict=True):
        shape, itemsize = np.shape(leaf), np.dtype(getattr(leaf, "dtype", np.float32)).itemsize
        kept = math.prod(shape) if mask is None else int(count_kept(mask))
        total += leaf_bytes(shape, itemsize, kept, bits if is_floating(leaf) else None)
    return total


def leaf_bytes(shape: tuple[int, ...], itemsize: int, kept: int, bits: int | None = None) -> int:
    """Count the bytes of one leaf: densely if it is kept whole, else with a bitmask; quantised with a scale a channel."""
    size = math.prod(shape)
    if kept == size:
        return size * itemsize
    rows = math.prod(shape[:-1])
    index = rows * -(-shape[-1] // 8) + 8 * rows + 8 * len(shape)
    return index + (kept * itemsize if bits is None else -(-kept * bits // 8) + 4 * shape[-1])
