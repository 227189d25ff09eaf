"""Masks that prune and splice while the weights behind them go on learning (dynamic network surgery)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxprune.transforms._enforce import enforce, masks_like, require_params
from jaxprune.transforms._mask_log import Log, tell
from jaxprune.transforms._prune import Make, PruneState, require_scheduled, try_out
from jaxprune.transforms._steps import Steps


def prune_and_splice(
    make: Make,
    schedule: optax.ScalarOrSchedule,
    *,
    back: optax.ScalarOrSchedule | None = None,
    every: int = 1,
    begin: int = 0,
    until: int,
    log: Log | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prune weights that go on learning behind their mask, and splice them in again when they have grown (network surgery).

    The loss is to see `straight_through` of the parameters under the masks of this state, so that pruned weights get the
    gradient of a network without them, and move::

        def loss_under(params, state, batch):
            return loss(straight_through(params, masks_in(state)), batch)

    At the updates begin, begin + every, ... a weight that is kept goes where ``make(params, schedule(count))`` does not keep
    it, and a pruned one comes back where ``make(params, back(count))`` keeps it. With `back` the stronger of the two, a weight
    between them stays what it is, so that few go to and fro; the number kept is then at most that of `schedule`, and exactly
    that without `back`. Updates pass as they are. From the update `until` on masks stay, and pruned weights are exactly
    ``+0.0`` after every ``optax.apply_updates``. (The paper changes masks with a probability that falls; here it is every so
    many updates.)

    `prune_and_regrow` sets pruned weights to zero at every update, so one comes back by a single large update alone; here by
    many small ones.

    The paper trains by SGD, with a threshold for each layer, and both matter: Adam moves a pruned weight as far as any other, however
    small its gradient, and one threshold for all layers may then leave hardly a weight of the last.

    Placement: last in the chain, as `prune`; the masks must be those of the same state that the update is given. Inside
    ``optax.MultiSteps`` it counts the updates that are emitted.

    Args:
        make: ``(params, k) -> masks``, for example ``functools.partial(make_masks, rule=rules.global_sparsity)``. The paper has
            a multiple of each layer's statistic, `jaxprune.rules.std_threshold`.
        schedule: k at which weights go, a number or an optax schedule of the update's number.
        back: k at which they come back, the same; at least as strong. None takes `schedule`.
        every: updates from one change of masks to the next, >= 1.
        begin: the number of the update that makes the first masks, >= 0.
        until: the number of the update that makes the last masks, >= begin, and from which they are held.
        log: as in `prune`; until the end all pruned weights count as ``escaped``, since they live on.

    Returns:
        A transform whose state is a `PruneState`; `masks_in` finds the masks.

    Raises:
        TypeError: make, schedule or back is none.
        ValueError: every < 1, begin < 0, until < begin; by ``init`` where `make` refuses a k or makes masks of another tree; by
            ``update`` without params.

    >>> import functools, jax, jax.numpy as jnp, optax
    >>> from jaxprune import make_masks, masks_in, rules
    >>> from jaxprune.transforms import straight_through
    >>> make = functools.partial(make_masks, rule=rules.absolute_threshold)
    >>> tx = optax.chain(optax.sgd(1.0), prune_and_splice(make, 0.9, back=1.1, until=3))
    >>> params = {"kernel": jnp.array([[3.0, 0.5]])}
    >>> state = tx.init(params)
    >>> for _ in range(5):  # the loss wants the second weight; it grows behind its mask by 0.25 at each update
    ...     grads = jax.grad(lambda p: -0.25 * straight_through(p, masks_in(state))["kernel"][0, 1])(params)
    ...     updates, state = tx.update(grads, state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(params["kernel"][0, 1], masks_in(state)["kernel"][0, 1])
    0.75 False
    1.0 False
    1.25 False
    1.5 True
    1.75 True

    Reference: Guo, Yao, Chen, "Dynamic Network Surgery for Efficient DNNs", 2016, equations 2 and 3.
    """
    steps = Steps(every, begin, until)
    require_scheduled("prune_and_splice", make, schedule, steps)
    if back is not None:
        require_scheduled("prune_and_splice", make, back, steps)

    def init_fn(params: Any) -> PruneState:
        if jax.tree.leaves(params):  # optax.tree.map_params initialises with a placeholder that has none
            for k in (schedule, back):
                if k is not None:
                    try_out(make, params, steps.range_of("prune_and_splice", k))
        return PruneState(jnp.zeros([], jnp.int32), jax.tree.map(lambda leaf: jnp.ones_like(leaf, dtype=bool), params))

    def update_fn(updates: Any, state: PruneState, params: Any = None, **extra_args: Any) -> tuple[Any, PruneState]:
        del extra_args
        require_params(params, "prune_and_splice")

        def change(masks: Any, params: Any) -> Any:
            k = _at(schedule, state.count)
            changed = masks_like(masks, make(params, k), params)
            if back is not None:
                strong = masks_like(masks, make(params, _at(back, state.count)), params)
                # Equation 3: 0 below the one threshold, 1 above the other, between them what it was.
                changed = jax.tree.map(lambda weak, strong, was: strong | (was & weak), changed, strong, masks)
            if log is not None:
                tell(log, {"step": state.count, "k": k}, params, params, masks, changed)
            return changed

        masks = steps.when_due(state.count, change, state.masks, params)
        held = jax.tree.map(lambda mask: mask | (state.count < until), masks)
        return enforce(updates, params, held), PruneState(optax.safe_increment(state.count), masks)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _at(k: optax.ScalarOrSchedule, count: jax.Array) -> Any:
    return k(count) if callable(k) else k
