"""Masks and the zeros of parameters: read off, required, counted."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._masks import make_masks
from jaxprune._selection import _counts
from jaxprune._tree._axes import Stacked
from jaxprune._tree._leaves import is_floating
from jaxprune._tree._masks import align_masks
from jaxprune._tree._params import read_params
from jaxprune._tree._paths import read_arrays
from jaxprune._tree._prunable import Prunable
from jaxprune.sites._sites import Sites


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

    Raises:
        ValueError: a mask is traced; the message names it.

    >>> count_kept({"kernel": jnp.array([[True, False]]), "bias": jnp.ones(2, bool)})
    1
    """
    tree = read_params(masks, what="masks", prunable=prunable, stacked=stacked, sites=sites, eligible=lambda leaf: True)
    chosen = [leaf for leaf, fits in zip(tree.leaves, tree.prunable, strict=True) if fits]
    traced = [name for name, leaf in zip(tree.names, tree.leaves, strict=True) if isinstance(leaf, jax.core.Tracer)]
    if traced:
        raise ValueError(
            f"count_kept reads the values of {traced[0]}, which are traced; call it outside jit, or sparsity inside."
        )
    return sum(int(_counts.to_numpy(_counts.count_true(jnp.asarray(leaf), tuple(range(leaf.ndim))))) for leaf in chosen)
