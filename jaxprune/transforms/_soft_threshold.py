"""Learnt thresholds in the forward pass."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._tree._axes import Stacked
from jaxprune._tree._leaves import own
from jaxprune._tree._params import read_params
from jaxprune._tree._prunable import Prunable
from jaxprune.rules._layers import is_scalar
from jaxprune.sites._sites import Sites


def soft_threshold(
    params: Any,
    thresholds: Any,
    *,
    prunable: Prunable = None,
    stacked: Stacked = None,
    sites: Sites | None = None,
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
        sites: as in `make_masks`.

    Returns:
        The parameters as the forward pass is to see them, of the treedef of `params`.

    Raises:
        ValueError: a prunable leaf has no threshold, or one of another shape; the message names it.

    >>> import jax.numpy as jnp
    >>> soft_threshold({"kernel": jnp.array([[2.0, -0.25]])}, 0.0)["kernel"].tolist()  # sigmoid(0) = 0.5
    [[1.5, 0.0]]

    Reference: Kusupati et al., "Soft Threshold Weight Reparameterization for Learnable Sparsity", 2020, eq. 3.
    """
    tree = read_params(params, prunable=prunable, stacked=stacked, sites=sites)
    given = [thresholds] * len(tree.paths) if is_scalar(thresholds) else tree.spread(thresholds, "thresholds")
    return tree.build(
        [
            _shrink(leaf, s, name, stack) if fits else own(leaf)
            for name, leaf, s, fits, stack in zip(
                tree.names, tree.leaves, given, tree.prunable, tree.stacks, strict=True
            )
        ]
    )


def _shrink(weight: jax.Array, s: Any, name: str, stack: tuple[int, ...]) -> jax.Array:
    if s is None:
        raise ValueError(f"thresholds has no entry for {name}; it must cover every prunable leaf.")
    shape, layers = jnp.shape(s), tuple(weight.shape[axis] for axis in stack)
    if shape not in ((), layers):
        raise ValueError(
            f"the threshold for {name} has shape {list(shape)}; it must be a scalar"
            + (f" or of shape {list(layers)}, one for each stacked layer." if stack else ".")
        )
    size = jnp.abs(weight)
    threshold = jax.nn.sigmoid(jnp.asarray(s, size.dtype))
    if shape:
        threshold = jnp.expand_dims(threshold, [axis for axis in range(weight.ndim) if axis not in stack])
    shrunk = jnp.sign(weight) * (size - threshold).astype(weight.dtype)
    return jnp.where(size > threshold, shrunk, jnp.zeros_like(weight))
