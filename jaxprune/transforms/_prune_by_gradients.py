"""Prune while training by what the gradients say: a wrapper, since it must see them before the optimizer does."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprune._dtypes import wide
from jaxprune._tree._given import described, takes
from jaxprune._tree._leaves import is_floating
from jaxprune._tree._masks import align_masks
from jaxprune._tree._paths import flatten
from jaxprune.transforms._enforce import enforce, hide_pruned, masks_like, require_params
from jaxprune.transforms._mask_log import Log, tell
from jaxprune.transforms._prune import require_schedule
from jaxprune.transforms._steps import Steps


class PruneByGradientsState(NamedTuple):
    """State of `prune_by_gradients`.

    Attributes:
        count: updates seen so far, int32.
        masks: True = keep.
        total: the sum of what was measured since masks last changed, float32 (float64 stays).
        summands: how many updates it is the sum of, int32.
        inner_state: of the optimizer that is wrapped.
    """

    count: jax.Array  # type: ignore[assignment]  # optax names it so, and a tuple has a method of that name
    masks: Any
    total: Any
    summands: jax.Array
    inner_state: Any


def prune_by_gradients(
    inner: optax.GradientTransformation,
    make: Callable[[Any, Any, Any], Any],
    schedule: optax.ScalarOrSchedule,
    *,
    measure: Callable[[Any, Any], Any],
    every: int = 100,
    begin: int = 0,
    until: int | None = None,
    log: Log | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prune gradually while training, by the gradients of the steps since masks last changed: saliency, Fisher, movement.

    At every update ``measure(params, gradients)`` is added up. At the updates begin, begin + every, ... and at `until`, the
    last one, masks become ``make(params, mean, schedule(count))``, the mean being that of what was measured since the
    last change (before the first one: of the last `every` updates), this update's gradient included. They hold from that
    update on. A pruned weight stays pruned: it enters `make` as zero with a mean of NaN, which every score and rule ranks
    lowest. Pruned weights are exactly ``+0.0`` after every ``optax.apply_updates``, and the optimizer sees no gradient of
    theirs, as with `static_sparse`.

    Any function of `jaxprune.scores` that takes params and gradients can be `measure`, and its mean the scores. For `fisher`
    measure the squares of the gradients, and let `make` score them::

        square = lambda params, grads: jax.tree.map(jnp.square, grads)
        make = lambda params, squares, k: make_masks(
            params, k, rule=rules.global_sparsity, scores=scores.fisher(params, squares)
        )
        tx = prune_by_gradients(optax.adam(1e-3), make, 0.9, measure=square, every=100, until=900)

    These are squares of gradients of whole batches, not of examples as in the paper (see `mean_over_batches`).

    Cost: one copy of the weights in float32, and its addition at each update.

    Placement: around the whole optimizer; for accumulated gradients inside ``optax.MultiSteps``. What stands before it in a
    chain, clipping for example, changes what it measures; what follows it must not move weights. Do not mask the gradient in
    the loss.

    Args:
        inner: the optimizer, any.
        make: ``(params, mean, k) -> masks``, for example
            ``lambda params, mean, k: make_masks(params, k, rule=rules.global_sparsity, scores=mean)``.
        schedule: k, as in `prune`.
        measure: ``(params, gradients) -> a tree like params``, of real numbers; entries that are None are not added up.
        every: updates from one change of masks to the next, >= 1.
        begin: the number of the update that makes the first masks, >= 0; until then nothing is pruned.
        until: as in `prune`.
        log: as in `prune`; thresholds are magnitudes of the weights kept.

    Returns:
        A transform whose state is a `PruneByGradientsState`; `masks_in` finds the masks.

    Raises:
        TypeError: inner is no optimizer; make, schedule or measure is none.
        ValueError: every < 1, begin < 0, until < begin; by ``init`` where `measure` gives a tree unlike params, or `make` refuses a
            k of the schedule or makes masks of another tree; by ``update`` without params.

    >>> import jax.numpy as jnp, optax
    >>> from jaxprune import make_masks, rules, scores
    >>> def make(params, mean, k):
    ...     return make_masks(params, k, rule=rules.layer_sparsity, scores=mean)
    >>> tx = prune_by_gradients(optax.sgd(0.0), make, 0.5, measure=scores.saliency, until=0)
    >>> params, grads = {"kernel": jnp.array([[3.0, 1.0]])}, {"kernel": jnp.array([[1.0, 4.0]])}
    >>> updates, state = tx.update(grads, tx.init(params), params)
    >>> optax.apply_updates(params, updates)["kernel"].tolist()
    [[0.0, 1.0]]

    Reference: Molchanov, Tyree, Karras, Aila, Kautz, "Pruning Convolutional Neural Networks for Resource Efficient
    Inference", 2017, section 2, prunes in turn with fine-tuning, by the mean of ``|w g|`` since; Theis et al., "Faster gaze
    prediction with dense networks and Fisher pruning", 2018.
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"prune_by_gradients(inner, make, schedule) was given {described(inner)} where the optimizer inner belongs."
        )
    if not callable(make) or not takes(make, 0, 0, 0):
        raise TypeError(
            f"prune_by_gradients(inner, make, schedule) was given {described(make)} for make, which is a function (params, mean, k) -> "
            "masks. Write make = lambda params, mean, k: make_masks(params, k, rule=rules.global_sparsity, scores=mean)."
        )
    if not callable(measure):
        raise TypeError(
            f"prune_by_gradients was given {described(measure)} for measure, which is a function (params, gradients) -> a tree "
            "like params: scores.saliency, for example."
        )
    steps = Steps(every, begin, until)
    require_schedule("prune_by_gradients", schedule, steps)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: Any) -> PruneByGradientsState:
        # Two arrays, since what is donated must be there once.
        count, summands = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.int32)
        masks = jax.tree.map(lambda leaf: jnp.ones_like(leaf, dtype=bool), params)
        if not jax.tree.leaves(params):  # optax.tree.map_params initialises with a placeholder that has none
            return PruneByGradientsState(count, masks, params, summands, inner.init(params))
        total = _nothing_yet(jax.eval_shape(measure, params, params), params)
        bounds = steps.range_of("prune_by_gradients", schedule)
        for k in sorted(set(bounds)) if bounds is not None else [jax.ShapeDtypeStruct((), jnp.float32)]:
            _try_out(make, params, total, k)
        return PruneByGradientsState(count, masks, total, summands, inner.init(params))

    def update_fn(
        updates: Any, state: PruneByGradientsState, params: Any = None, **extra_args: Any
    ) -> tuple[Any, PruneByGradientsState]:
        require_params(params, "prune_by_gradients")
        # What was added up before the last `every` updates of the first change, or up to the last change, is over.
        afresh = steps.due(state.count - 1) | (state.count == begin - every + 1)
        total = jax.tree.map(
            lambda so_far, new: jnp.where(afresh, 0, so_far) + new.astype(so_far.dtype),
            state.total,
            measure(params, updates),
        )
        summands = jnp.where(afresh, 0, state.summands) + 1

        def change(masks: Any, params: Any, total: Any, summands: jax.Array) -> Any:
            k = schedule(state.count) if callable(schedule) else schedule
            weights, means = _pruned_out(params, total, masks, summands)
            changed = jax.tree.map(jnp.logical_and, masks_like(masks, make(weights, means, k), params), masks)
            if log is not None:
                tell(log, {"step": state.count, "k": k}, params, params, masks, changed)
            return changed

        masks = steps.when_due(state.count, change, state.masks, params, total, summands)
        updates, inner_state = inner.update(hide_pruned(updates, masks), state.inner_state, params, **extra_args)
        count = optax.safe_increment(state.count)
        return enforce(updates, params, masks), PruneByGradientsState(count, masks, total, summands, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _nothing_yet(measured: Any, params: Any) -> Any:
    """Return zeros in place of what is to be measured, sharded as the parameters; check that it is like them."""
    flat, tree = flatten(measured, "what measure gives"), flatten(params, "params")
    for path, name, leaf in zip(flat.paths, flat.names, flat.leaves, strict=True):
        if tree.shapes.get(path) != leaf.shape or not jnp.issubdtype(leaf.dtype, jnp.floating):
            wanted = f"real numbers of shape {list(tree.shapes[path])}" if path in tree.shapes else "nothing"
            raise ValueError(
                f"{name} is {leaf.dtype}{list(leaf.shape)}; prune_by_gradients adds up {wanted} there. "
                "Let measure(params, gradients) give a tree like params, as scores.saliency does."
            )
    return flat.build(
        [
            jnp.zeros_like(tree.by_path[path], dtype=wide(leaf.dtype))
            for path, leaf in zip(flat.paths, flat.leaves, strict=True)
        ]
    )


def _try_out(make: Callable[[Any, Any, Any], Any], params: Any, total: Any, k: Any) -> None:
    """Let `make` see the trees and a k without computing, so that its errors come before training."""
    flat = flatten(params, "params")
    if isinstance(k, jax.ShapeDtypeStruct):
        align_masks(jax.eval_shape(make, params, total, k), flat)
    else:
        align_masks(jax.eval_shape(lambda params, total: make(params, total, k), params, total), flat)


def _pruned_out(params: Any, total: Any, masks: Any, summands: jax.Array) -> tuple[Any, Any]:
    """Return the parameters with pruned ones at zero, and the mean of what was measured, NaN there."""
    tree, sums = flatten(params, "params"), flatten(total, "total")
    held = dict(zip(tree.paths, align_masks(masks, tree), strict=True))

    def weight(path: str, leaf: Any) -> Any:
        return jnp.where(held[path], leaf, jnp.zeros_like(leaf)) if is_floating(leaf) else leaf

    weights = tree.build([weight(path, leaf) for path, leaf in zip(tree.paths, tree.leaves, strict=True)])
    means = sums.build(
        [
            jnp.where(held[path], leaf / summands.astype(leaf.dtype), np.nan)
            for path, leaf in zip(sums.paths, sums.leaves, strict=True)
        ]
    )
    return weights, means
