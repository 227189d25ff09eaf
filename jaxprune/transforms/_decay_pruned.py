"""An optax transform that pulls pruned weights towards zero."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from jaxprune._tree._leaves import is_floating
from jaxprune._tree._masks import align_masks
from jaxprune._tree._paths import flatten
from jaxprune.transforms._enforce import require_params


def decay_pruned(make: Callable[[Any, Any], Any], k: Any, *, rate: float) -> optax.GradientTransformationExtraArgs:
    """Pull the weights that masks prune towards zero: the sparse-refined part of SR-STE.

    Adds ``rate * param`` to the gradient wherever the mask is False. Together with `straight_through` in the loss,
    under masks made the same way, this is SR-STE: it steadies which weights of an N:M group are kept.

    Placement: first in the chain, before the optimizer, as weight decay that is part of the gradient.

    Args:
        make: ``(params, k) -> masks``, the function that also makes the forward masks.
        k: what it is given.
        rate: the decay, >= 0 (the paper's lambda, 2e-4 there).

    Returns:
        A transform with an empty state.

    Raises:
        ValueError: rate < 0; by ``update`` without params.

    >>> import jax.numpy as jnp, optax
    >>> tx = decay_pruned(lambda params, k: [jnp.array([True, False])], 0.5, rate=0.5)
    >>> tx.update([jnp.zeros(2)], tx.init(None), [jnp.array([3.0, 2.0])])[0][0].tolist()
    [0.0, 1.0]

    Reference: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", 2021, eq. 8.
    """
    if isinstance(rate, int | float) and rate < 0:
        raise ValueError(f"decay_pruned takes rate >= 0; got {rate}.")

    def decay(updates: Any, params: Any) -> Any:
        require_params(params, "decay_pruned")
        flat, pruned = flatten(updates, "updates"), flatten(params, "params")
        masks = dict(zip(pruned.paths, align_masks(make(params, k), pruned), strict=True))

        def add(path: str, update: Any) -> Any:
            param, mask = pruned.by_path[path], masks[path]
            if mask is None or not is_floating(param):
                return update
            return update + jnp.where(mask, jnp.zeros_like(param), rate * param).astype(update.dtype)

        return flat.build([add(path, leaf) for path, leaf in zip(flat.paths, flat.leaves, strict=True)])

    return optax.with_extra_args_support(optax.stateless(decay))
