"""Optax transforms that keep pruned weights at zero."""

from typing import Any, NamedTuple

import optax

from jaxprune._tree._axes import Stacked
from jaxprune._tree._params import read_params
from jaxprune._tree._prunable import Prunable
from jaxprune.sites._sites import Sites
from jaxprune.transforms._enforce import enforce, enforce_masks, masks_for, require_params


class KeepPrunedState(NamedTuple):
    """State of `keep_pruned`.

    Attributes:
        masks: True = keep.
    """

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
    *, prunable: Prunable = None, stacked: Stacked = None, sites: Sites | None = None
) -> optax.GradientTransformationExtraArgs:
    """Keep at zero whatever is zero now, with no state at all.

    `keep_pruned` without masks: a prunable weight that is zero stays ``+0.0``. Costs no memory; but a weight that
    is zero by chance, or that an update lands on zero, is pruned too.

    Placement: as `keep_pruned`; the weights must be pruned (`apply_masks`) before the first step.

    Args:
        prunable: which leaves it holds for, as in `make_masks`.
        stacked: as in `make_masks`.
        sites: as in `make_masks`.

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

    def hold(updates: Any, params: Any) -> Any:
        require_params(params, "keep_zeros")
        flat = read_params(params, prunable=prunable, stacked=stacked, sites=sites)
        masks = [leaf != 0 if fits else None for leaf, fits in zip(flat.leaves, flat.prunable, strict=True)]
        return enforce_masks(updates, flat, masks)

    return optax.with_extra_args_support(optax.stateless(hold))
