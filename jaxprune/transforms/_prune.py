"""Optax transforms that prune while training: masks follow a schedule and live in the optimizer state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune._dtypes import common
from jaxprune._masks import require_make
from jaxprune._tree._given import described, takes
from jaxprune._tree._leaves import is_floating
from jaxprune._tree._masks import align_masks
from jaxprune._tree._paths import flatten
from jaxprune.transforms._enforce import enforce, masks_like, require_params
from jaxprune.transforms._mask_log import Log, tell
from jaxprune.transforms._steps import Steps

Make = Callable[[Any, Any], Any]
# (weights, masks so far, k) -> masks.
_Remask = Callable[[Any, Any, Any], Any]
# The weights that masks are made from: (params, updates) -> weights.
_Judged = Callable[[Any, Any], Any]


class PruneState(NamedTuple):
    """State of `prune` and `prune_and_regrow`.

    Attributes:
        count: updates seen so far, int32.
        masks: True = keep.
    """

    count: jax.Array  # type: ignore[assignment]  # optax names it so, and a tuple has a method of that name
    masks: Any


def prune(
    make: Make,
    schedule: optax.ScalarOrSchedule,
    *,
    every: int = 1,
    begin: int = 0,
    until: int | None = None,
    log: Log | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prune gradually while training: new masks from the weights as the step finds them, at strengths from a schedule.

    At the updates begin, begin + every, ... and at `until`, the last one, masks become ``make(params, schedule(count))``
    and hold from that update on; in between, and after, they stay. They are enforced at every update: a pruned weight
    is exactly ``+0.0`` after every ``optax.apply_updates``, as with `keep_pruned`. A pruned weight stays pruned: it
    enters `make` as zero, below any weight that is kept, and comes back under no schedule (`prune_and_regrow` lets it).
    An update that changes no masks costs what it costs with `keep_pruned`.

    Placement: last in the chain, as `keep_pruned`. Inside ``optax.MultiSteps`` it counts the updates that are emitted
    (what it makes of the others is thrown away); after it, every mini-step.

    From a dense run: with ``tx = optax.chain(dense, prune(...))`` and the parameters and the state of `dense` from its
    checkpoint, go on with the state ``(dense_state, *tx.init(params)[1:])``; the schedule begins at that update.

    Args:
        make: ``(params, k) -> masks``, for example ``functools.partial(make_masks, rule=rules.global_sparsity)``.
        schedule: k as an optax schedule of the update's number (from 0), or a number; one for all layers (to give each
            its own, scale k inside `make`). The cubic of Zhu & Gupta is
            ``optax.polynomial_schedule(0.0, final, power=3, transition_steps=n, transition_begin=start)``.
        every: updates from one change of masks to the next, >= 1.
        begin: the number of the update that makes the first masks, >= 0; until then nothing is pruned.
        until: the number of the update that makes the last masks, with ``schedule(until)`` exactly, whether or not
            `every` divides it; None never ends.
        log: called from inside the compiled step with a dict of numbers each time masks change: ``step``, ``k``,
            ``sparsity`` (of the leaves that are pruned at all), ``churn`` (the fraction of their weights whose mask
            changed), ``dead_units`` (output units without any weight; in a stack of layers, without one in any of
            them), ``escaped`` (pruned weights that were no longer zero: this transform does not stand last) and, by
            leaf, ``threshold/<path>`` (the smallest magnitude kept).

    Returns:
        A transform whose state is a `PruneState`; `masks_in` finds the masks. Under ``optax.inject_hyperparams`` all
        arguments but ``schedule`` are to be named in ``static_args``.

    Raises:
        TypeError: make or schedule is none.
        ValueError: every < 1, begin < 0, until < begin; by ``init`` where `make` refuses a k of the schedule or makes masks of another
            tree; by ``update`` without params.

    >>> import functools, jax.numpy as jnp, optax
    >>> from jaxprune import make_masks, rules
    >>> make = functools.partial(make_masks, rule=rules.layer_sparsity)
    >>> tx = optax.chain(optax.sgd(0.0), prune(make, lambda count: jnp.where(count < 1, 0.25, 0.5), until=1))
    >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...     updates, state = tx.update(params, state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(params["kernel"].ravel().tolist())
    [0.0, 2.0, 3.0, 4.0]
    [0.0, 0.0, 3.0, 4.0]
    [0.0, 0.0, 3.0, 4.0]

    Reference: Zhu, Gupta, "To Prune, or Not to Prune", 2017.
    """

    def remask(weights: Any, masks: Any, k: Any) -> Any:
        made = masks_like(masks, make(_pruned_lowest(weights, masks), k), weights)
        return jax.tree.map(jnp.logical_and, made, masks)

    def judged(params: Any, updates: Any) -> Any:
        del updates  # a conditional that reads them has XLA write them out at every step
        return params

    return _scheduled("prune", judged, remask, make, schedule, Steps(every, begin, until), log)


def prune_and_regrow(
    make: Make,
    schedule: optax.ScalarOrSchedule,
    *,
    every: int = 1,
    begin: int = 0,
    until: int | None = None,
    log: Log | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prune as `prune` does, but let pruned weights come back: masks are made anew each time.

    `make` sees ``params + updates``, the weights as they would be without masks, pruned ones included: a weight that the
    optimizer wants far from zero returns; with a schedule that falls, weights return in any case, starting at that
    update. The optimizer's moments of pruned weights are left alone. A schedule that jumps between 0 and a sparsity is
    AC/DC (see `ac_dc_schedule`).

    Cost: the updates are needed whole before masks are known, so that XLA cannot compute them while it applies them:
    they are written to memory and read back at every step, also where no mask changes (about twice a dense step of Adam
    where weights, not activations, take the time). `prune` does without.

    Placement, arguments, state and errors as in `prune`.

    >>> import functools, jax.numpy as jnp, optax
    >>> from jaxprune import make_masks, rules
    >>> make = functools.partial(make_masks, rule=rules.layer_sparsity)
    >>> tx = prune_and_regrow(make, lambda count: jnp.where(count < 1, 0.5, 0.0))
    >>> params = {"kernel": jnp.array([[1.0, 2.0]])}
    >>> updates, state = tx.update({"kernel": jnp.zeros((1, 2))}, tx.init(params), params)
    >>> params = optax.apply_updates(params, updates)
    >>> updates, state = tx.update({"kernel": jnp.full((1, 2), 3.0)}, state, params)
    >>> optax.apply_updates(params, updates)["kernel"].tolist()
    [[3.0, 5.0]]
    """

    def remask(weights: Any, masks: Any, k: Any) -> Any:
        return masks_like(masks, make(weights, k), weights)

    return _scheduled("prune_and_regrow", _moved, remask, make, schedule, Steps(every, begin, until), log)


def ac_dc_schedule(k: float, *, every: int, begin: int = 0, until: int) -> optax.Schedule:
    """Alternate between sparse and dense phases, ending sparse (AC/DC), for `prune_and_regrow`.

    Dense before `begin`; then phases of `every` updates, sparse and dense in turn, the first one sparse; sparse from
    `until` on. To be used as ``prune_and_regrow(make, schedule, every=every, until=until)``: the masks of a phase
    are made at its first update.

    Args:
        k: the sparsity of the sparse phases, in [0, 1].
        every: updates in a phase, >= 1.
        begin: the update at which the first sparse phase begins, a multiple of `every`.
        until: the update at which the last sparse phase begins, > begin.

    Returns:
        A schedule, 0 or `k`.

    Raises:
        ValueError: an argument is outside its range.

    >>> schedule = ac_dc_schedule(0.9, every=10, begin=10, until=40)
    >>> [round(float(schedule(count)), 1) for count in (0, 10, 20, 30, 40, 50)]
    [0.0, 0.9, 0.0, 0.9, 0.9, 0.9]

    Reference: Peste, Iofinova, Vladu, Alistarh, "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural
    Networks", 2021, algorithm 1.
    """
    if not 0 <= k <= 1 or every < 1 or not 0 <= begin < until or begin % every:
        raise ValueError(
            "ac_dc_schedule takes 0 <= k <= 1, every >= 1 and 0 <= begin < until, begin a multiple of every; "
            f"got {k=}, {every=}, {begin=}, {until=}."
        )

    def schedule(count: Any) -> jax.Array:
        sparse = (count >= begin) & ((count - begin) // every % 2 == 0) | (count >= until)
        return jnp.where(sparse, jnp.float32(k), jnp.float32(0))

    return schedule


def _scheduled(
    title: str,
    judged: _Judged,
    remask: _Remask,
    make: Make,
    schedule: optax.ScalarOrSchedule,
    steps: Steps,
    log: Log | None,
) -> optax.GradientTransformationExtraArgs:
    require_scheduled(title, make, schedule, steps)

    def init_fn(params: Any) -> PruneState:
        if jax.tree.leaves(params):  # optax.tree.map_params initialises with a placeholder that has none
            try_out(make, params, steps.range_of(title, schedule))
        masks = jax.tree.map(lambda leaf: jnp.ones_like(leaf, dtype=bool), params)
        return PruneState(jnp.zeros([], jnp.int32), masks)

    def update_fn(updates: Any, state: PruneState, params: Any = None, **extra_args: Any) -> tuple[Any, PruneState]:
        del extra_args
        require_params(params, title)

        def change(masks: Any, params: Any, weights: Any) -> Any:
            k = schedule(state.count) if callable(schedule) else schedule
            changed = remask(weights, masks, k)
            if log is not None:
                tell(log, {"step": state.count, "k": k}, params, weights, masks, changed)
            return changed

        masks = steps.when_due(state.count, change, state.masks, params, judged(params, updates))
        return enforce(updates, params, masks), PruneState(optax.safe_increment(state.count), masks)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def require_scheduled(title: str, make: Make, schedule: optax.ScalarOrSchedule, steps: Steps) -> None:
    """Raise a TypeError or a ValueError unless these can be the arguments of `prune`."""
    require_make(make, f"{title}(make, schedule)")
    require_schedule(title, schedule, steps)


def require_schedule(title: str, schedule: optax.ScalarOrSchedule, steps: Steps) -> None:
    """Raise a TypeError or a ValueError unless a schedule and its steps can be those of `prune`."""
    if callable(schedule) and not takes(schedule, 0):
        raise TypeError(
            f"{title}(make, schedule) was given {described(schedule)} for schedule, which is a number or a function of the "
            "update's number alone; make, which takes params and k, comes first."
        )
    steps.check(title)


def try_out(make: Make, params: Any, bounds: tuple[float, float] | None) -> None:
    """Let `make` see the tree and the extremes of k without computing, so that its errors come before training."""
    flat = flatten(params, "params")
    if bounds is None:
        align_masks(jax.eval_shape(make, params, jax.ShapeDtypeStruct((), jnp.float32)), flat)
        return
    for k in sorted(set(bounds)):
        align_masks(jax.eval_shape(lambda params, k=k: make(params, k), params), flat)


def _moved(params: Any, updates: Any) -> Any:
    """Return the weights as the updates would leave them; None stays, as in ``optax.apply_updates``."""

    def move(param: Any, update: Any) -> Any:
        if param is None or not is_floating(param):
            return param
        dtype = common((param.dtype, update.dtype))
        return (param.astype(dtype) + update.astype(dtype)).astype(param.dtype)

    return jax.tree.map(move, params, updates, is_leaf=lambda leaf: leaf is None)


def _pruned_lowest(weights: Any, masks: Any) -> Any:
    """Return the weights with pruned ones at zero and kept ones distinctly above it."""
    flat = flatten(weights, "params")

    def settle(leaf: Any, mask: Any) -> Any:
        if mask is None or not is_floating(leaf):
            return leaf
        # Among zeros a rule cannot know which are pruned already; a kept one must not be taken for them.
        kept = jnp.where(leaf == 0, jnp.full_like(leaf, jnp.finfo(leaf.dtype).tiny), leaf)
        return jnp.where(mask, kept, jnp.zeros_like(leaf))

    return flat.build([settle(leaf, mask) for leaf, mask in zip(flat.leaves, align_masks(masks, flat), strict=True)])
