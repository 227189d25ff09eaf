"""The masks that an optimizer state holds."""

from typing import Any

import jax
import optax
from jax.tree_util import keystr

from jaxprune._tree._leaves import own
from jaxprune._tree._paths import flatten


def masks_in(opt_state: Any) -> Any:
    """Find the masks in an optimizer state, in any nesting of chains and wrappers.

    Where several transforms hold masks (the branches of ``optax.partition``, two in one chain), a weight is kept if
    each of them that knows the leaf keeps it.

    Args:
        opt_state: the state of any optax transform that has one of jaxprune's inside.

    Returns:
        A tree of boolean masks, True = keep; new arrays, which stay when the state is donated.

    Raises:
        ValueError: no masks are there.

    >>> import jax.numpy as jnp, optax
    >>> from jaxprune import keep_pruned
    >>> tx = optax.chain(optax.adam(0.1), keep_pruned([jnp.array([True, False])]))
    >>> masks_in(tx.init([jnp.array([1.0, 2.0])]))[0].tolist()
    [True, False]
    """
    found = [node.masks for node in jax.tree.leaves(opt_state, is_leaf=_holds_masks) if _holds_masks(node)]
    if not found:
        raise ValueError("This optimizer state holds no masks. " + _remedy(opt_state))
    merged, *others = found
    for other in others:
        merged = _intersect(merged, other)
    return jax.tree.map(own, merged)


def _remedy(opt_state: Any) -> str:
    if isinstance(opt_state, optax.GradientTransformation):
        return "It is the transform itself: pass the state that its init(params) returned."
    for path, _ in jax.tree_util.tree_leaves_with_path(opt_state):
        for depth, key in enumerate(path, 1):
            if getattr(key, "key", None) == "masks":
                return (
                    f"What it has at opt_state{keystr(path[:depth])} stands in plain dicts, as a checkpoint does that was "
                    "restored without a target. Restore it as the state that it was: "
                    "checkpointer.restore(path, jax.eval_shape(tx.init, params))."
                )
    return "Put keep_pruned(masks) last in the chain."


def _holds_masks(node: Any) -> bool:
    """Whether a node is a state of jaxprune's: they all are NamedTuples with a field of this name."""
    return "masks" in getattr(type(node), "_fields", ())


def _intersect(a: Any, b: Any) -> Any:
    """Intersect two trees of masks, each of which may lack leaves (MaskedNode) that the other has."""

    def is_leaf(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    one, two = flatten(a, "masks", is_leaf), flatten(b, "masks", is_leaf)
    return one.treedef.unflatten(
        [
            right if is_leaf(left) else left if is_leaf(right) else left & right
            for left, right in zip(one.leaves, one.aligned(two), strict=True)
        ]
    )
