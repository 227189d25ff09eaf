"""Optax transforms that keep pruned weights at zero."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune._masks import align_masks, check_masks
from jaxprune._paths import Flat, align, flatten, is_floating, is_nothing
from jaxprune._prunable import Predicate, Stacked, choose, stack_axes


def require_params(params: Any, title: str) -> None:
    """Raise a ValueError when an update comes without the parameters."""
    if params is None:
        raise ValueError(
            f"{title} needs the parameters to set pruned weights to zero: call update(grads, state, params), "
            "as Linen's TrainState and nnx.Optimizer do."
        )


class KeepPrunedState(NamedTuple):
    """State of `keep_pruned`: the masks, True = keep."""

    masks: Any


def keep_pruned(masks: Any) -> optax.GradientTransformationExtraArgs:
    """Keep pruned weights at exactly ``+0.0`` through any optimizer: ``where(mask, update, -param)``.

    After every ``optax.apply_updates`` a weight whose mask is False is ``+0.0``, in any dtype, under jit and scan,
    whatever the optimizer's moments say; other updates pass bit for bit. The masks live in the state, so that they
    are saved with it, and a step compiled once serves other masks of the same shapes. A weight that is NaN or
    infinite stays so (no update turns it into zero): prune with `apply_masks` first.

    Placement: last in the chain, and outside anything that scales, averages or delays updates, since only ``-param``
    itself lands on zero. Inside ``optax.lookahead``, ``optax.contrib.sam`` or ``optax.contrib.schedule_free`` the
    zeros do not hold; there put `apply_masks` into the forward pass and apply it once more at the end.

    Args:
        masks: a tree of boolean masks with the paths of the parameters, True = keep, or a function of the
            parameters that makes one (evaluated by ``init``).

    Returns:
        A transform whose state is a `KeepPrunedState`.

    Raises:
        ValueError: by ``init`` for masks of other paths, shapes or dtype than the parameters; by ``update`` without
            params.

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(0.1), keep_pruned([jnp.array([True, False])]))
    >>> params = [jnp.array([1.0, 2.0])]
    >>> updates, state = tx.update([jnp.array([1.0, 1.0])], tx.init(params), params)
    >>> optax.apply_updates(params, updates)[0].tolist()
    [0.8999999761581421, 0.0]
    """

    def init_fn(params: Any) -> KeepPrunedState:
        return KeepPrunedState(masks_for(masks, params))

    def update_fn(
        updates: Any, state: KeepPrunedState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, KeepPrunedState]:
        del extra_args
        require_params(params, "keep_pruned")
        return enforce(updates, params, state.masks), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def keep_zeros(
    *, prunable: Predicate | Any = None, stacked: Stacked | None = None
) -> optax.GradientTransformationExtraArgs:
    """Keep at zero whatever is zero now, with no state at all.

    `keep_pruned` without masks: a prunable weight that is zero stays ``+0.0``. Costs no memory; but a weight that
    is zero by chance, or that an update lands on zero, is pruned too.

    Placement: as `keep_pruned`; the weights must be pruned (`apply_masks`) before the first step.

    Args:
        prunable: which leaves it holds for, as in `make_masks`.
        stacked: as in `make_masks`.

    Returns:
        A transform with an empty state.

    Raises:
        ValueError: by ``update`` without params, or where nothing is prunable.

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.sgd(0.1), keep_zeros())
    >>> params = {"kernel": jnp.array([[1.0, 0.0]])}
    >>> updates, state = tx.update({"kernel": jnp.ones((1, 2))}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["kernel"].tolist()
    [[0.8999999761581421, 0.0]]
    """

    def init_fn(params: Any) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update_fn(
        updates: Any, state: optax.EmptyState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, optax.EmptyState]:
        del extra_args
        require_params(params, "keep_zeros")
        flat = flatten(params, "params")
        chosen = choose(prunable, params, flat, stack_axes(stacked, flat))
        masks = [leaf != 0 if fits else None for leaf, fits in zip(flat.leaves, chosen, strict=True)]
        return _enforce(updates, flat, masks), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def masks_for(masks: Any, params: Any) -> Any:
    """Return a copy of the masks, or of what a function makes of the parameters, in the tree of the parameters.

    A copy, because an optimizer state is often donated, which would delete the caller's masks. Masks of more leaves
    than `params` has are right where `optax.masked` or `optax.partition` hides some; without that they are an error.
    """
    flat = flatten(params, "params")
    if not flat.leaves:  # optax.tree.map_params initialises with a placeholder that has no leaves
        return params
    masks = masks(params) if callable(masks) else masks
    given = flatten(masks, "masks", is_leaf=is_nothing)
    if any(isinstance(node, optax.MaskedNode) for node in _nodes(params)):
        known = set(flat.paths)
        shown = [i for i, path in enumerate(given.paths) if path in known]
        masks = {given.paths[i]: given.leaves[i] for i in shown}
    return flat.treedef.unflatten(
        [
            jnp.ones_like(leaf, dtype=bool) if mask is None else jnp.array(mask, copy=True)
            for leaf, mask in zip(flat.leaves, align_masks(masks, flat), strict=True)
        ]
    )


def _nodes(tree: Any) -> Sequence[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, optax.MaskedNode))


def enforce(updates: Any, params: Any, masks: Any) -> Any:
    """Replace the updates of pruned weights by what takes them to zero; trees are aligned by path."""
    flat = flatten(params, "params")
    return _enforce(updates, flat, check_masks(align(flatten(masks, "masks"), flat, "masks", "params"), flat))


def _enforce(updates: Any, params: Flat, masks: Sequence[Any]) -> Any:
    flat = flatten(updates, "updates")
    held = dict(zip(params.paths, zip(params.leaves, masks, strict=True), strict=True))
    missing = [name for path, name in zip(flat.paths, flat.names, strict=True) if path not in held]
    if missing:
        raise ValueError(f"{missing[0]} has no counterpart in params; pass gradients of the same tree as params.")
    return flat.treedef.unflatten(
        [_land_on_zero(update, *held[path]) for update, path in zip(flat.leaves, flat.paths, strict=True)]
    )


def _land_on_zero(update: Any, param: Any, mask: Any) -> Any:
    if mask is None or not is_floating(param):
        return update
    # Never narrower than the parameter: -param rounded would not cancel it.
    dtype = jnp.promote_types(update.dtype, param.dtype)
    return jnp.where(mask, update.astype(dtype), -param.astype(dtype))


def masks_in(opt_state: Any) -> Any:
    """Find the masks in an optimizer state, in any nesting of chains and wrappers.

    Where several transforms hold masks (the branches of ``optax.partition``, two in one chain), a weight is kept if
    each of them that knows the leaf keeps it.

    Args:
        opt_state: the state of any optax transform that has one of jaxprune's inside.

    Returns:
        A tree of boolean masks, True = keep.

    Raises:
        ValueError: no masks are there.

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.chain(optax.adam(0.1), keep_pruned([jnp.array([True, False])]))
    >>> masks_in(tx.init([jnp.array([1.0, 2.0])]))[0].tolist()
    [True, False]
    """
    found = [node.masks for node in jax.tree.leaves(opt_state, is_leaf=_holds_masks) if _holds_masks(node)]
    if not found:
        raise ValueError("This optimizer state holds no masks. Put keep_pruned(masks) last in the chain.")
    merged, *others = found
    for other in others:
        merged = _intersect(merged, other)
    return merged


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
            for left, right in zip(one.leaves, align(two, one, "masks", "masks"), strict=True)
        ]
    )
