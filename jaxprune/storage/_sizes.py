"""What a pruned model takes to store: bytes in a file."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune._selection import _counts
from jaxprune._tree._leaves import is_complex, is_floating
from jaxprune._tree._masks import align_masks
from jaxprune._tree._paths import read_arrays


def stored_bytes(params: Any, masks: Any, *, bits: int | None = None) -> int:
    """Count the bytes that `save_sparse` writes for parameters under masks, the file's header and compression aside.

    A leaf that is kept whole is stored densely; of others the kept values and a bit for every weight.

    Args:
        params: a pytree of arrays, of which shapes and dtypes matter.
        masks: their masks, True = keep.
        bits: of a quantised kept value, 8 or 4; None stores values as they are.

    Returns:
        Bytes.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((2, 16)), "bias": jnp.ones(16)}
    >>> masks = {"kernel": jnp.arange(32).reshape(2, 16) < 4, "bias": jnp.ones(16, bool)}
    >>> stored_bytes(params, masks)  # 4 floats, 2 rows of 2 bytes, 2 row offsets, the shape; 16 floats
    116
    """
    flat = read_arrays(params, "params")
    total = 0
    for leaf, mask in zip(flat.leaves, align_masks(masks, flat), strict=True):
        shape, itemsize = np.shape(leaf), np.dtype(getattr(leaf, "dtype", np.float32)).itemsize
        kept = (
            math.prod(shape)
            if mask is None
            else int(_counts.to_numpy(_counts.count_true(jnp.asarray(mask), tuple(range(mask.ndim)))))
        )
        total += leaf_bytes(shape, itemsize, kept, bits if is_floating(leaf) and not is_complex(leaf) else None)
    return total


def leaf_bytes(shape: tuple[int, ...], itemsize: int, kept: int, bits: int | None = None) -> int:
    """Count the bytes of one leaf: densely if it is kept whole, else with a bitmask; quantised with a scale a channel."""
    size = math.prod(shape)
    if kept == size:
        return size * itemsize
    rows = math.prod(shape[:-1])
    index = rows * -(-shape[-1] // 8) + 8 * rows + 8 * len(shape)
    return index + (kept * itemsize if bits is None else -(-kept * bits // 8) + 4 * shape[-1])
