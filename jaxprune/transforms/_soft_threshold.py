"""Learnt thresholds in the forward pass."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._tree._paths import flatten, spread
from jaxprune._tree._prunable import Predicate, Stacked, choose, stack_axes
from jaxprune.rules._layers import is_scalar


def soft_threshold(
    params: Any, thresholds: Any, *, prunable: Predicate | Any = None, stacked: Stacked | None = None
) -> Any:
    """Shrink every prunable weight by its layer's learnt threshold: ``sign(w) * relu(|w| - sigmoid(s))`` (STR).

    Train `params` and `thresholds` together, with weight decay on both; the sparsity that results is the optimizer's
    choice. At the end the value is the pruned network: its zeros are exactly ``+0.0``, also where a weight is NaN.

    Args:
        params: a pytree of arrays.
        thresholds: s, one number or scalar array, or a tree prefix of `params` of these; an entry for stacked layers
            may have the shape of the stack.
        prunable: which leaves are shrunk, as in `make_masks`.
        stacked: as in `make_masks`.

    Returns:
        The parameters as the forward pass is to see them, of the treedef of `params`.

    Raises:
        ValueError: a prunable leaf has no threshold, or one of another shape; the message names it.

    >>> import jax.numpy as jnp
    >>> soft_threshold({"kernel": jnp.array([[2.0, -0.25]])}, 0.0)["kernel"].tolist()  # sigmoid(0) = 0.5
    [[1.5, 0.0]]

    Reference: Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", 2020, eq. 3.
    """
    flat = flatten(params, "params")
    stacks = stack_axes(stacked, flat)
    chosen = choose(prunable, params, flat, stacks)
    alone = is_scalar(thresholds)
    given = [thresholds] * len(flat.paths) if alone else spread(thresholds, flat.paths, "thresholds")
    return flat.treedef.unflatten(
        [
            _shrink(leaf, s, name, stack) if fits else leaf
            for name, leaf, s, fits, stack in zip(flat.names, flat.leaves, given, chosen, stacks, strict=True)
        ]
    )


def _shrink(weight: jax.Array, s: Any, name: str, stack: int) -> jax.Array:
    if s is None:
        raise ValueError(f"thresholds has no entry for {name}; it must cover every prunable leaf.")
    shape = jnp.shape(s)
    if shape not in ((), weight.shape[:stack]):
        raise ValueError(
            f"the threshold for {name} has shape {list(shape)}; it must be a scalar"
            + (f" or of shape {list(weight.shape[:stack])}, one for each stacked layer." if stack else ".")
        )
    threshold = jax.nn.sigmoid(jnp.reshape(jnp.asarray(s, weight.dtype), shape + (1,) * (weight.ndim - len(shape))))
    size = jnp.abs(weight)
    return jnp.where(size > threshold, jnp.sign(weight) * (size - threshold), jnp.zeros_like(weight))
