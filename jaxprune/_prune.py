"""Optax transforms that prune while training: masks follow a schedule and live in the optimizer state."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune._masks import align_masks
from jaxprune._paths import flatten, is_floating
from jaxprune._transforms import enforce, require_params

Make = Callable[[Any, Any], Any]
# What a logging hook is told each time masks change: scalars by name.
Log = Callable[[dict[str, Any]], None]


class PruneState(NamedTuple):
    """State of `prune`: updates seen so far (int32) and the masks, True = keep."""

    count: jax.Array
    masks: Any


def prune(
    make: Make, schedule: optax.ScalarOrSchedule, *, every: int = 1, until: int | None = None, log: Log | None = None
) -> optax.GradientTransformationExtraArgs:
    """Prune gradually while training: new masks from the weights as they will be, at strengths from a schedule.

    At the updates 0, every, 2 * every, ... and at `until`, the last one, masks become ``make(p + u, schedule(count))``;
    in between, and after, they stay. They are enforced at every update: a pruned weight is exactly ``+0.0`` after every
    ``optax.apply_updates``, as with `keep_pruned`. A pruned weight stays pruned: it enters `make` as zero, below any
    weight that is kept, and comes back under no schedule (`prune_and_regrow` lets it).

    Placement: last in the chain, as `keep_pruned`. Inside ``optax.MultiSteps`` it counts mini-steps.

    Args:
        make: ``(params, k) -> masks``, for example ``functools.partial(make_masks, rule=rules.global_sparsity)``.
        schedule: k as an optax schedule of the update's number (from 0), or a number. The cubic of Zhu & Gupta is
            ``optax.polynomial_schedule(0.0, final, power=3, transition_steps=n, transition_begin=start)``.
        every: updates from one change of masks to the next, >= 1.
        until: the number of the update that makes the last masks, with ``schedule(until)`` exactly, whether or not
            `every` divides it; None never ends.
        log: called from inside the compiled step with a dict of scalars each time masks change: ``step``, ``k``,
            ``sparsity`` (of the leaves that are pruned at all), ``churn`` (the fraction of their weights whose mask
            changed) and ``dead_units`` (output units, along the last axis, without any weight).

    Returns:
        A transform whose state is a `PruneState`; `masks_in` finds the masks. Under ``optax.inject_hyperparams`` name
        ``make`` and ``log`` in ``static_args``.

    Raises:
        ValueError: every < 1, until < 0; by ``init`` where `make` refuses a k of the schedule or makes masks of another
            tree; by ``update`` without params.

    >>> import functools, jax.numpy as jnp, optax
    >>> from jaxprune import make_masks, rules
    >>> make = functools.partial(make_masks, rule=rules.layer_sparsity)
    >>> tx = optax.chain(optax.sgd(0.0), prune(make, lambda count: 0.25 * (1 + count), every=1, until=1))
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

    def remask(params: Any, updates: Any, masks: Any, k: jax.Array) -> Any:
        made = make(_as_they_will_be(params, updates, masks), k)
        return _combine(made, masks, params, lambda new, old: new & old)

    return _scheduled(remask, make, schedule, every, until, log, "prune")


def prune_and_regrow(
    make: Make, schedule: optax.ScalarOrSchedule, *, every: int = 1, until: int | None = None, log: Log | None = None
) -> optax.GradientTransformationExtraArgs:
    """Prune as `prune` does, but let pruned weights come back: masks are made anew each time.

    `make` sees ``p + u`` with pruned weights at what the optimizer's update would make of them, so a weight that the
    optimizer wants far from zero returns; with a schedule that falls, weights return in any case. A schedule that jumps
    between 0 and a sparsity is AC/DC (see `ac_dc_schedule`).

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

    def remask(params: Any, updates: Any, masks: Any, k: jax.Array) -> Any:
        made = make(optax.apply_updates(params, updates), k)
        return _combine(made, masks, params, lambda new, old: new)

    return _scheduled(remask, make, schedule, every, until, log, "prune_and_regrow")


def ac_dc_schedule(sparsity: float, *, period: int, begin: int = 0, finish: int) -> optax.Schedule:
    """Alternate between dense and sparse phases, ending sparse: AC/DC, for `prune_and_regrow` with every=period.

    Dense before `begin`; then phases of `period` updates, sparse and dense in turn, the first one sparse; sparse from
    `finish` on.

    Args:
        sparsity: k in the sparse phases, in [0, 1].
        period: updates in a phase, >= 1.
        begin: the update at which the first sparse phase begins.
        finish: the update at which the last sparse phase begins, > begin.

    Returns:
        A schedule, 0 or `sparsity`.

    Raises:
        ValueError: an argument is outside its range.

    >>> schedule = ac_dc_schedule(0.9, period=10, begin=10, finish=40)
    >>> [round(float(schedule(count)), 1) for count in (0, 10, 20, 30, 40, 50)]
    [0.0, 0.9, 0.0, 0.9, 0.9, 0.9]

    Reference: Peste, Iofinova, Vladu, Alistarh, "AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural
    Networks", 2021, algorithm 1.
    """
    if not 0 <= sparsity <= 1 or period < 1 or not 0 <= begin < finish:
        raise ValueError(
            "ac_dc_schedule takes 0 <= sparsity <= 1, period >= 1 and 0 <= begin < finish; "
            f"got {sparsity=}, {period=}, {begin=}, {finish=}."
        )

    def schedule(count: Any) -> jax.Array:
        sparse = (count >= begin) & ((count - begin) // period % 2 == 0) | (count >= finish)
        return jnp.where(sparse, jnp.float32(sparsity), jnp.float32(0))

    return schedule


def _scheduled(
    remask: Callable[[Any, Any, Any, jax.Array], Any],
    make: Make,
    schedule: optax.ScalarOrSchedule,
    every: int,
    until: int | None,
    log: Log | None,
    title: str,
) -> optax.GradientTransformationExtraArgs:
    check_steps(title, every, until)

    def strength(count: Any) -> Any:
        return schedule(count) if callable(schedule) else schedule

    def init_fn(params: Any) -> PruneState:
        if jax.tree.leaves(params):
            _try_out(make, strength, params, every, until)
        masks = jax.tree.map(lambda leaf: jnp.ones_like(leaf, dtype=bool), params)
        return PruneState(jnp.zeros([], jnp.int32), masks)

    def update_fn(updates: Any, state: PruneState, params: Any = None, **extra_args: Any) -> tuple[Any, PruneState]:
        del extra_args
        require_params(params, title)

        def change(masks: Any) -> Any:
            k = strength(state.count)
            changed = remask(params, updates, masks, k)
            if log is not None:
                jax.debug.callback(log, _figures(state.count, k, masks, changed))
            return changed

        masks = jax.lax.cond(is_due(state.count, every, until), change, lambda masks: masks, state.masks)
        return enforce(updates, params, masks), PruneState(optax.safe_increment(state.count), masks)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def check_steps(title: str, every: int, until: int | None) -> None:
    """Raise a ValueError unless every >= 1 and until >= 0, as far as they are known."""
    if isinstance(every, int) and every < 1:
        raise ValueError(f"{title} takes every >= 1, the updates from one change of masks to the next; got {every}.")
    if isinstance(until, int) and until < 0:
        raise ValueError(f"{title} takes until >= 0, the number of the update that changes masks last; got {until}.")


def is_due(count: jax.Array, every: int, until: int | None) -> jax.Array:
    """Whether masks change at this update: every so often, and at the last one."""
    due = count % every == 0
    return due if until is None else (due & (count < until)) | (count == until)


def _try_out(make: Make, strength: Callable[[Any], Any], params: Any, every: int, until: int | None) -> None:
    """Let `make` see the extremes of the schedule and the tree, without computing: its errors come before training."""
    if not all(isinstance(n, int) for n in (every, until or 0)):
        return
    steps = np.unique([*range(0, (until if until is not None else 100 * every) + 1, every)[:1000], until or 0])
    ks = [strength(int(step)) for step in (steps if callable(strength) else steps[:1])]
    if any(isinstance(k, jax.core.Tracer) or np.ndim(k) for k in ks):
        return
    for k in {float(min(ks)), float(max(ks))}:
        masks = jax.eval_shape(lambda params, k=k: make(params, k), params)
        align_masks(masks, flatten(params, "params"))


def _as_they_will_be(params: Any, updates: Any, masks: Any) -> Any:
    """Return the parameters after the update, pruned ones at zero and kept ones distinctly above it."""
    flat = flatten(optax.apply_updates(params, updates), "params")

    def settle(leaf: Any, mask: Any) -> Any:
        if mask is None or not is_floating(leaf):
            return leaf
        # Among zeros the rule cannot know which are pruned already; a kept one must not be taken for them.
        tiny = jnp.finfo(leaf.dtype).tiny
        return jnp.where(mask, jnp.where(leaf == 0, jnp.full_like(leaf, tiny), leaf), jnp.zeros_like(leaf))

    return flat.treedef.unflatten(
        [settle(leaf, mask) for leaf, mask in zip(flat.leaves, align_masks(masks, flat), strict=True)]
    )


def _combine(made: Any, masks: Any, params: Any, pair: Callable[[Any, Any], Any]) -> Any:
    """Combine new and old masks leaf by leaf, in the treedef of the old ones."""
    flat = flatten(params, "params")
    old = flatten(masks, "masks")
    new = dict(zip(flat.paths, align_masks(made, flat), strict=True))
    return old.treedef.unflatten(
        [mask if new[path] is None else pair(new[path], mask) for path, mask in zip(old.paths, old.leaves, strict=True)]
    )


def _figures(count: jax.Array, k: Any, before: Any, after: Any) -> dict[str, jax.Array]:
    """Return the scalars for the log; leaves that were and stay whole do not count."""
    pairs = list(zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))
    touched = [jnp.any(~new) | jnp.any(~old) for old, new in pairs]

    def share(leaves: list[jax.Array]) -> jax.Array:
        parts = [
            jnp.where(hit, jnp.sum(leaf, dtype=jnp.float32), 0.0) for hit, leaf in zip(touched, leaves, strict=True)
        ]
        size = sum(jnp.where(hit, float(leaf.size), 0.0) for hit, leaf in zip(touched, leaves, strict=True))
        return sum(parts) / jnp.maximum(size, 1.0)

    dead = [jnp.sum(~jnp.any(new, tuple(range(new.ndim - 1)))) for _, new in pairs if new.ndim >= 2]
    return {
        "step": count,
        "k": jnp.asarray(k, jnp.float32),
        "sparsity": share([~new for _, new in pairs]),
        "churn": share([old ^ new for old, new in pairs]),
        "dead_units": sum(dead, jnp.zeros((), jnp.int32)),
    }
