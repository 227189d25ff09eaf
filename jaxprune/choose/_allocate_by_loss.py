"""One sparsity for all layers together becomes one for each, by what a loss bears."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import rules
from jaxprune._masks import make_masks
from jaxprune._tree._axes import Stacked
from jaxprune._tree._leaves import is_known
from jaxprune._tree._params import read_params
from jaxprune._tree._paths import as_prefix, flatten
from jaxprune._tree._prunable import Prunable
from jaxprune.sites._sites import Sites


def allocate_by_loss(
    params: Any,
    k: Any,
    *,
    scores: Any,
    max_sparsity: float = 0.95,
    prunable: Prunable = None,
    stacked: Stacked = None,
    sites: Sites | None = None,
) -> Any:
    """Share a sparsity out among layers by second-order loss: to each what one threshold for all would remove of it.

    Give the result to any method as its k: ``k = allocate_by_loss(params, 0.7, scores=scores.fisher(params, squares))``, then
    ``admm(params, grams, k)``. Together the layers lose as many weights as `rules.global_sparsity` removes, exactly.

    Args:
        params: a pytree of arrays.
        k: the sparsity of all prunable weights together, in [0, 1]; may be traced.
        scores: the loss that every weight's removal costs, comparable between layers: `scores.fisher` (the diagonal of
            the Fisher information), or `scores.obs` (from Gram matrices, without gradients).
        max_sparsity: the most that may be removed of any layer (static).
        prunable: as in `make_masks`.
        stacked: as in `make_masks`; a stack then has a sparsity for each of its layers.
        sites: as in `make_masks`.

    Returns:
        A tree prefix of the parameters, nested dicts as `allocate` returns them: a float for each prunable leaf (an array
        for a stack, or where k is traced).

    Raises:
        ValueError: as `make_masks`.

    >>> import jax.numpy as jnp
    >>> params = {"a": {"kernel": jnp.ones((2, 2))}, "b": {"kernel": jnp.full((2, 2), 3.0)}}
    >>> losses = {"a": {"kernel": jnp.array([[1.0, 2.0], [3.0, 8.0]])}, "b": {"kernel": jnp.array([[4.0, 5.0], [6.0, 7.0]])}}
    >>> allocate_by_loss(params, 0.5, scores=losses)
    {'a': {'kernel': 0.75}, 'b': {'kernel': 0.25}}
    """

    def rule(scores: Any, k: Any) -> Any:
        return rules.global_sparsity(scores, k, max_sparsity=max_sparsity)

    which: dict[str, Any] = {"prunable": prunable, "stacked": stacked, "sites": sites}
    masks = flatten(make_masks(params, k, rule=rule, scores=scores, **which), "masks")
    flat = read_params(params, **which)
    return as_prefix(
        {
            path: _removed(mask, stack)
            for path, mask, stack, fits in zip(flat.paths, masks.leaves, flat.stacks, flat.prunable, strict=True)
            if fits
        }
    )


def _removed(mask: jax.Array, stack: tuple[int, ...]) -> Any:
    axes = tuple(axis for axis in range(mask.ndim) if axis not in stack)
    if not is_known(mask):
        return jnp.mean(~mask, axes, dtype=jnp.float32)
    found = np.mean(~np.asarray(mask), axes, dtype=np.float64)
    return float(found) if found.ndim == 0 else jnp.asarray(found, jnp.float32)
