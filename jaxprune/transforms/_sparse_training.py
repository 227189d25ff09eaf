"""Sparse from the start: wrappers that mask the gradient, and drop and grow weights while training."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune._tree._axes import Stacked
from jaxprune._tree._given import described
from jaxprune._tree._masks import align_masks
from jaxprune._tree._params import read_params
from jaxprune._tree._paths import flatten
from jaxprune._tree._prunable import Prunable
from jaxprune._tree._sharding import without_explicit_axes
from jaxprune.sites._sites import Sites
from jaxprune.transforms._enforce import enforce, hide_pruned, masks_for, require_params
from jaxprune.transforms._mask_log import Log, tell
from jaxprune.transforms._regrowth import Moments, drop_and_grow
from jaxprune.transforms._steps import Steps

# Where new weights grow: (gradient of a leaf, number of the leaf, number of the update) -> float32, larger = first.
_Growth = Callable[[jax.Array, int, jax.Array], jax.Array]


class SparseTrainingState(NamedTuple):
    """State of `rigl`, `sparse_evolution` and `static_sparse`.

    Attributes:
        count: updates seen so far, int32.
        masks: True = keep.
        inner_state: of the optimizer that is wrapped.
    """

    count: jax.Array  # type: ignore[assignment]  # optax names it so, and a tuple has a method of that name
    masks: Any
    inner_state: Any


def static_sparse(inner: optax.GradientTransformation, masks: Any) -> optax.GradientTransformationExtraArgs:
    """Train under fixed masks, and hide pruned weights from the optimizer altogether.

    Gradients are masked before `inner` sees them, so that its moments, norms and clipping know only kept weights; and
    pruned weights are exactly ``+0.0`` after every ``optax.apply_updates``. (`keep_pruned` leaves the moments alone.)

    Placement: outermost, around the whole optimizer; what follows it must not move weights.

    Args:
        inner: the optimizer.
        masks: a tree of boolean masks with the paths of the parameters, True = keep, or a function of the parameters
            that makes one (evaluated by ``init``).

    Returns:
        A transform whose state is a `SparseTrainingState`.

    Raises:
        ValueError: by ``init`` for masks of other paths, shapes or dtype; by ``update`` without params.

    >>> import jax.numpy as jnp, optax
    >>> tx = static_sparse(optax.sgd(0.1), [jnp.array([True, False])])
    >>> params = [jnp.array([1.0, 2.0])]
    >>> updates, _ = tx.update([jnp.array([10.0, 10.0])], tx.init(params), params)
    >>> optax.apply_updates(params, updates)[0].tolist()
    [0.0, 0.0]
    """
    inner = optax.with_extra_args_support(inner)

    def update_fn(
        updates: Any, state: SparseTrainingState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SparseTrainingState]:
        require_params(params, "static_sparse")
        return _inner_update(inner, updates, state, params, extra_args)

    return optax.GradientTransformationExtraArgs(_init(inner, masks), update_fn)


def rigl(
    inner: optax.GradientTransformation,
    masks: Any,
    *,
    every: int = 100,
    begin: int = 0,
    until: int,
    drop_fraction: optax.ScalarOrSchedule | None = None,
    prunable: Prunable = None,
    stacked: Stacked = None,
    sites: Sites | None = None,
    log: Log | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Train a sparse network from the start: drop the smallest weights, grow where the gradient is largest.

    At the updates begin, begin + every, ... and at `until`, the last one, each layer loses the fraction `drop_fraction`
    of its weights (rounded down), those of the smallest magnitude, and gains as many at the positions of the largest
    gradients; its number of weights never changes. At every update `inner` steps with the gradient under the masks as
    they then are. New weights start from zero with the optimizer's state fresh, but for statistics that weights share
    (the row and column sums of a factored Adafactor), which stay. A weight that is dropped and grown at once just
    stays. Pruned weights are exactly ``+0.0`` after every ``optax.apply_updates``. (Algorithm 1 of the paper takes no
    step where masks change. Here it does, with the gradient that the new weights were chosen by: no update is lost to
    schedules and accumulated gradients, and the optimizer's state stays where it is in memory, so that an update
    without a change costs what it costs with `static_sparse`.)

    Placement: outermost, around the whole optimizer, since growing needs the gradient before the optimizer sees it; for
    accumulated gradients inside ``optax.MultiSteps``, where it counts the updates that are emitted. It needs the dense
    gradient: do not mask it in the loss. Prune the parameters before the first step (`apply_masks`), or the first
    gradient is that of the dense network.

    Args:
        inner: the optimizer, any.
        masks: the masks to start from, as in `static_sparse` (`scores.random` under ``rules.erk_sparsity``, say).
        every: updates from one change of masks to the next, >= 1.
        begin: the number of the update at which masks change first, >= 0.
        until: the number of the update at which masks change last.
        drop_fraction: the share of a layer's weights to replace, in [0, 1], a number or an optax schedule of the
            update's number; None falls from 0.3 to 0 at `until` along a cosine.
        prunable: which leaves take part, as in `make_masks`. A leaf kept whole stays whole.
        stacked: as in `make_masks`.
        sites: as in `make_masks`.
        log: as in `prune`, with ``drop_fraction`` in place of ``k``.

    Returns:
        A transform whose state is a `SparseTrainingState`; `masks_in` finds the masks.

    Raises:
        ValueError: every < 1, begin < 0, until < begin, drop_fraction outside [0, 1] (a schedule: by ``init``); by ``init`` for masks
            of another tree or where nothing is prunable; by ``update`` without params.

    >>> import jax.numpy as jnp, optax
    >>> tx = rigl(optax.sgd(1.0), {"kernel": jnp.array([[True, True, False]])}, every=1, until=9, drop_fraction=0.5)
    >>> params = {"kernel": jnp.array([[3.0, 1.0, 0.0]])}
    >>> updates, state = tx.update({"kernel": jnp.array([[0.0, 0.0, 5.0]])}, tx.init(params), params)
    >>> state.masks["kernel"].tolist(), optax.apply_updates(params, updates)["kernel"].tolist()
    ([[True, False, True]], [[3.0, 0.0, -5.0]])

    Reference: Evci, Gale, Menick, Castro, Elsen, "Rigging the Lottery: Making All Tickets Winners", 2020, algorithm 1.
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(f"rigl(inner, masks) was given {described(inner)} where the optimizer inner belongs.")

    def by_gradient(gradient: jax.Array, leaf: int, count: jax.Array) -> jax.Array:
        del leaf, count
        return jnp.abs(gradient).astype(jnp.float32)

    which = {"prunable": prunable, "stacked": stacked, "sites": sites}
    return _drop_and_grow("rigl", by_gradient, inner, masks, Steps(every, begin, until), drop_fraction, which, log)


def sparse_evolution(
    inner: optax.GradientTransformation,
    masks: Any,
    key: jax.Array,
    *,
    every: int = 100,
    begin: int = 0,
    until: int,
    drop_fraction: optax.ScalarOrSchedule | None = 0.3,
    prunable: Prunable = None,
    stacked: Stacked = None,
    sites: Sites | None = None,
    log: Log | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Train a sparse network from the start: drop the smallest weights, grow at random (SET).

    As `rigl` in all else, but new weights grow anywhere, so no dense gradient is needed. (The paper drops the weights
    nearest to zero of either sign by themselves, and gives new ones random values.)

    Args:
        inner: as in `rigl`.
        masks: as in `rigl`.
        key: a PRNG key; which weights grow depends on it and on the update's number alone, so that a resumed run grows
            the same ones.
        every: as in `rigl`.
        begin: as in `rigl`.
        until: as in `rigl`.
        drop_fraction: as in `rigl`; the paper's is constant.
        prunable: as in `rigl`.
        stacked: as in `rigl`.
        sites: as in `rigl`.
        log: as in `rigl`.

    Returns:
        A transform whose state is a `SparseTrainingState`.

    Raises:
        ValueError: as in `rigl`.

    >>> import jax, jax.numpy as jnp, optax
    >>> masks = {"kernel": jnp.array([[True, True, False, False]])}
    >>> tx = sparse_evolution(optax.sgd(1.0), masks, jax.random.key(0), every=1, until=9, drop_fraction=0.5)
    >>> params = {"kernel": jnp.array([[3.0, 1.0, 0.0, 0.0]])}
    >>> _, state = tx.update(params, tx.init(params), params)
    >>> int(state.masks["kernel"].sum()), bool(state.masks["kernel"][0, 0])
    (2, True)

    Reference: Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity
    Inspired by Network Science", 2018, algorithm 1.
    """

    def at_random(gradient: jax.Array, leaf: int, count: jax.Array) -> jax.Array:
        def draw(like: jax.Array, key: jax.Array) -> jax.Array:
            # In float32 whatever the dtype: bfloat16 has so few values that ties would favour low indices.
            return jax.random.uniform(key, like.shape, jnp.float32)

        return without_explicit_axes(draw, gradient)(gradient, jax.random.fold_in(jax.random.fold_in(key, count), leaf))

    which = {"prunable": prunable, "stacked": stacked, "sites": sites}
    title = "sparse_evolution"
    return _drop_and_grow(title, at_random, inner, masks, Steps(every, begin, until), drop_fraction, which, log)


def _init(inner: optax.GradientTransformationExtraArgs, masks: Any) -> Callable[[Any], SparseTrainingState]:
    def init_fn(params: Any) -> SparseTrainingState:
        held = masks_for(masks, params)
        return SparseTrainingState(jnp.zeros([], jnp.int32), held, inner.init(params))

    return init_fn


def _inner_update(
    inner: optax.GradientTransformationExtraArgs,
    updates: Any,
    state: SparseTrainingState,
    params: Any,
    extra_args: dict[str, Any],
) -> tuple[Any, SparseTrainingState]:
    """Step the inner optimizer with the masked gradient and hold pruned weights at zero."""
    masked = hide_pruned(updates, state.masks)
    updates, inner_state = inner.update(masked, state.inner_state, params, **extra_args)
    count = optax.safe_increment(state.count)
    return enforce(updates, params, state.masks), SparseTrainingState(count, state.masks, inner_state)


def _drop_and_grow(
    title: str,
    growth: _Growth,
    inner: optax.GradientTransformation,
    masks: Any,
    steps: Steps,
    drop_fraction: optax.ScalarOrSchedule | None,
    which: dict[str, Any],
    log: Log | None,
) -> optax.GradientTransformationExtraArgs:
    steps.check(title)
    until = steps.until or 0
    # Equation 1 of the paper: alpha / 2 * (1 + cos(pi * t / T_end)).
    fraction = _cosine(max(1, until)) if drop_fraction is None else drop_fraction
    if not callable(fraction):
        _check_fraction(title, steps.range_of(title, fraction))
    inner = optax.with_extra_args_support(inner)
    plain_init = _init(inner, masks)

    def init_fn(params: Any) -> SparseTrainingState:
        _check_fraction(title, steps.range_of(title, fraction))
        if jax.tree.leaves(params):  # optax.tree.map_params initialises with a placeholder that has none
            read_params(params, **which)
        return plain_init(params)

    def update_fn(
        updates: Any, state: SparseTrainingState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, SparseTrainingState]:
        require_params(params, title)

        share = jnp.asarray(fraction(state.count) if callable(fraction) else fraction, jnp.float32)
        now = _change(state, inner.init, updates, params, steps, share, growth, which)
        if log is not None:
            scalars = {"step": state.count, "drop_fraction": share}

            def tell_all() -> None:
                tell(log, scalars, params, params, state.masks, now.masks, which["stacked"], which["sites"])

            jax.lax.cond(steps.due(state.count), tell_all, lambda: None)
        return _inner_update(inner, updates, now, params, extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _cosine(until: int) -> optax.Schedule:
    schedule = optax.cosine_decay_schedule(0.3, until)
    # Optax multiplies the count by pi, which strict promotion of dtypes refuses for whole numbers.
    return lambda count: schedule(jnp.asarray(count, jnp.float32))


def _check_fraction(title: str, bounds: tuple[float, float] | None) -> None:
    if bounds is not None and not 0 <= bounds[0] <= bounds[1] <= 1:
        raise ValueError(f"{title} takes a drop_fraction in [0, 1]; got {bounds[0]:g} to {bounds[1]:g}.")


def _change(
    state: SparseTrainingState,
    init: Callable[[Any], Any],
    updates: Any,
    params: Any,
    steps: Steps,
    fraction: jax.Array,
    growth: _Growth,
    which: dict[str, Any],
) -> SparseTrainingState:
    """Return the state with new masks, and with the optimizer's state of grown weights fresh, where masks change now."""
    tree, gradients = read_params(params, **which), flatten(updates, "updates").by_path
    held = align_masks(state.masks, tree)
    changed = dict(zip(tree.paths, held, strict=True))
    moments = Moments(state.inner_state, init, params)
    # A loop for each leaf: one for all would need all gradients at once, which a training step otherwise does not.
    for i, (path, weight, mask, fits, stack) in enumerate(
        zip(tree.paths, tree.leaves, held, tree.prunable, tree.stacks, strict=True)
    ):
        if not fits or path not in gradients:
            continue

        def change(
            kept: list[jax.Array],
            weight: jax.Array,
            gradient: jax.Array,
            i: int = i,
            path: str = path,
            stack: tuple[int, ...] = stack,
        ) -> list[jax.Array]:
            old, *own = kept
            new = drop_and_grow(weight, old, growth(gradient, i, state.count), fraction, stack)
            return [new, *moments.refreshed(path, own, new & ~old)]

        changed[path], *own = steps.when_due(state.count, change, [mask, *moments.of(path)], weight, gradients[path])
        moments.put(path, own)
    masks = flatten(state.masks, "masks")
    return state._replace(masks=masks.build([changed[path] for path in masks.paths]), inner_state=moments.state)
