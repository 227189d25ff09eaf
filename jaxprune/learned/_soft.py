"""Trees of gates and of soft masks, and parameters under soft masks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._dtypes import widen
from jaxprune._tree._leaves import is_complex, is_floating, is_nothing, own
from jaxprune._tree._paths import Tree, flatten, read_arrays


def read_gates(gates: Any, what: str = "gates") -> Tree:
    """Read gates, or soft masks; leaves that have none are no leaves of what is returned."""
    tree = flatten(gates, what)
    if not tree.leaves:
        raise ValueError(f"{what} is empty. Make gates by learned.weight_gates or learned.pattern_gates.")
    return Tree(what, tree.paths, tree.names, _numbers(tree), tree.treedef)


def beside(params: Any, given: Any, what: str = "gates") -> tuple[Tree, list[jax.Array | None]]:
    """Read parameters, and beside each leaf the numbers that `given` has for it, or None."""
    tree, numbers = read_arrays(params, "params"), flatten(given, what, is_leaf=is_nothing)
    numbers = Tree(what, numbers.paths, numbers.names, _numbers(numbers), numbers.treedef)
    return tree, tree.aligned(numbers)


def _numbers(tree: Tree) -> list[jax.Array | None]:
    for name, leaf in tree.named():
        if not is_nothing(leaf) and (not is_floating(leaf) or is_complex(leaf)):
            hint = " Boolean masks go to apply_masks." if getattr(leaf, "dtype", None) == np.bool_ else ""
            raise TypeError(f"{name} is {getattr(leaf, 'dtype', leaf)}, not real floating-point numbers.{hint}")
    return [None if is_nothing(leaf) else jnp.asarray(leaf, jnp.float32) for leaf in tree.leaves]


def soft_beside(params: Any, soft: Any) -> tuple[Tree, list[jax.Array | None]]:
    """Read parameters, and beside each leaf its soft mask, or None; raise a ValueError where one does not fit."""
    tree, masks = beside(params, soft, "soft")
    for name, leaf, mask in zip(tree.names, tree.leaves, masks, strict=True):
        if mask is not None and mask.shape != np.shape(leaf):
            raise ValueError(
                f"soft has for {name} an array of shape {mask.shape}; its leaf has shape {np.shape(leaf)}."
            )
    return tree, masks


def apply_soft_masks(params: Any, soft: Any) -> Any:
    """Multiply parameters by soft masks, ``param * mask``, in float32 or wider, and return them in their own dtypes.

    Differentiable in both; take the gradient for the gates alone, and the weights cost neither a gradient nor an optimizer's
    memory.

    Args:
        params: a pytree of arrays.
        soft: from `soft_masks` or `soft_patterns`; where it has None, a leaf stays as it is.

    Returns:
        The parameters, of the treedef and dtypes of `params`.

    Raises:
        ValueError: a soft mask is missing or has another shape; the message names the leaf.
        TypeError: a soft mask is not of real floating-point numbers.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.array([[2.0, 4.0]]), "bias": jnp.array([1.0])}
    >>> apply_soft_masks(params, {"kernel": jnp.array([[1.0, 0.25]]), "bias": None})["kernel"].tolist()
    [[2.0, 1.0]]
    """
    tree, masks = soft_beside(params, soft)
    leaves = zip(tree.leaves, masks, strict=True)
    return tree.build(
        [own(leaf) if mask is None else times(leaf, mask).astype(jnp.result_type(leaf)) for leaf, mask in leaves]
    )


def times(leaf: Any, mask: jax.Array) -> jax.Array:
    """Return the product of a leaf and its soft mask, in the dtype to compute in."""
    values = widen(jnp.asarray(leaf))
    return values * mask.astype(values.dtype)
