"""Pruned matrices in compressed rows, for inference on CPUs at very high sparsity."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._masks import apply_masks
from jaxprune._tree._axes import Axes, conventional
from jaxprune._tree._masks import align_masks
from jaxprune._tree._paths import flatten
from jaxprune.storage._bitmask import take

if TYPE_CHECKING:
    from jax.experimental.sparse import BCSR

# XLA's CPU kernel takes as long for one vector as for about eight (at one it takes several times longer).
_LEAST_VECTORS = 8


def to_bcsr(params: Any, masks: Any) -> Any:
    """Turn every pruned matrix into a `jax.experimental.sparse.BCSR` of shape (outputs, inputs), for `multiply_bcsr`.

    Zeros alone make no dense kernel faster, and neither does this below a break-even that depends on the machine and on
    how many vectors are multiplied at once; measure yours with ``python -m benchmarks.bcsr``. Kept zeros are stored. Other
    leaves (biases, convolutions, matrices that are kept whole) come back dense, zero where they are pruned.

    Args:
        params: a pytree of arrays. A matrix is ``(inputs, outputs)``, or ``(outputs, inputs)`` where it is called
            ``weight``, as in Equinox and PyTorch.
        masks: their masks, as `apply_masks` takes them. Read on the host: not under jit.

    Returns:
        A tree like `params` with a BCSR in place of each pruned matrix; it passes through jit as any pytree.

    Raises:
        ValueError: a mask does not fit, or the name of a pruned matrix does not tell which axis is inputs; the message
            names the leaf.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.array([[0.0, 2.0], [3.0, 0.0], [0.0, 5.0]])}
    >>> masks = {"kernel": params["kernel"] != 0}
    >>> multiply_bcsr(jnp.array([[1.0, 1.0, 1.0]]), to_bcsr(params, masks)["kernel"]).tolist()
    [[3.0, 7.0]]
    """
    flat = flatten(apply_masks(params, masks), "params")
    leaves = []
    for path, name, leaf, mask in zip(flat.paths, flat.names, flat.leaves, align_masks(masks, flat), strict=True):
        if mask is None or leaf.ndim != 2 or bool(np.all(mask)):
            leaves.append(leaf)
        else:
            leaves.append(_rows(conventional(path, leaf.shape), name, np.asarray(leaf), np.asarray(mask)))
    return flat.build(leaves)


def multiply_bcsr(x: jax.Array, matrix: "BCSR") -> jax.Array:
    """Multiply vectors by a matrix that `to_bcsr` made: ``x @ kernel``.

    Args:
        x: of shape ``(..., inputs)``; may be traced.
        matrix: of shape ``(outputs, inputs)``, of the same dtype; float32 has a kernel of its own on CPUs.

    Returns:
        An array of shape ``(..., outputs)``.

    Raises:
        ValueError: the inputs do not fit.
    """
    outputs, inputs = matrix.shape
    if x.ndim == 0 or x.shape[-1] != inputs:
        raise ValueError(
            f"x has shape {x.shape}; its last axis must be the {inputs} inputs of a matrix {matrix.shape}."
        )
    vectors = x.reshape(-1, inputs)
    padded = jnp.pad(vectors, ((0, max(0, _LEAST_VECTORS - len(vectors))), (0, 0)))
    return (matrix @ padded.T).T[: len(vectors)].reshape(*x.shape[:-1], outputs)


def _rows(axes: Axes, name: str, values: np.ndarray, mask: np.ndarray) -> "BCSR":
    from jax.experimental.sparse import BCSR

    if axes.outputs is None:
        raise ValueError(f"{name} {axes.why}. Give it a name that tells, or leave it whole in masks.")
    if axes.outputs == (1,):
        values, mask = values.T, mask.T
    ends = np.cumsum(np.count_nonzero(mask, axis=1))
    columns = np.flatnonzero(mask) % mask.shape[1]
    pointers = np.concatenate([[0], ends]).astype(np.int32)
    data, indices, indptr = jax.device_put((take(values, mask), columns.astype(np.int32), pointers))
    return BCSR((data, indices, indptr), shape=mask.shape, indices_sorted=True, unique_indices=True)
