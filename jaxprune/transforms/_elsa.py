"""Sparse by constraint: training on the true loss while a sparse copy of the weights pulls at them (ELSA)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxprune._dtypes import widen
from jaxprune._tree._axes import Stacked
from jaxprune._tree._given import described
from jaxprune._tree._leaves import is_complex
from jaxprune._tree._masks import align_masks, keeps_all
from jaxprune._tree._params import Params, read_params
from jaxprune._tree._paths import flatten
from jaxprune._tree._prunable import Prunable
from jaxprune.sites._sites import Sites
from jaxprune.transforms._enforce import enforce, hide_pruned, masks_for, masks_like, require_params
from jaxprune.transforms._mask_log import Log, tell
from jaxprune.transforms._prune import Make, require_scheduled
from jaxprune.transforms._steps import Steps

# Of the inner optimizer's state: what a squared change of each weight costs, a tree like the parameters, or None.
Metric = Callable[[Any], Any]


class ElsaState(NamedTuple):
    """State of `elsa`.

    The method's two copies of the weights, z (sparse) and u (the scaled dual variable), are never both different from
    zero: z is the part of their sum that `masks` keep, u the rest. So one array holds both, exactly.

    Attributes:
        count: updates seen so far, int32.
        masks: True = keep: where z lies, and from `until` on which weights stay.
        split: z where masks keep, u elsewhere, for each leaf that takes part; ``optax.MaskedNode()`` for the others.
        penalty: the penalty (lambda) that u is scaled by, and that holds now, float32.
        inner_state: of the optimizer that is wrapped.
    """

    count: jax.Array  # type: ignore[assignment]  # optax names it so, and a tuple has a method of that name
    masks: Any
    split: Any
    penalty: jax.Array
    inner_state: Any


def second_moment(inner_state: Any) -> Any:
    """Find the second moments of the gradients in an optimizer's state: every field called ``nu``.

    Adam and all of its kin in optax have one, and RMSProp; SGD, Lion and a factored Adafactor have none.

    Args:
        inner_state: the state of an optax transform, in any nesting of chains and wrappers.

    Returns:
        A tree like the parameters, without the leaves that have no second moment; None where nothing has one.

    >>> import jax.numpy as jnp, optax
    >>> second_moment(optax.adamw(0.1).init({"kernel": jnp.ones((1, 2))}))["kernel"].tolist()
    [[0.0, 0.0]]
    >>> second_moment(optax.sgd(0.1).init({"kernel": jnp.ones((1, 2))})) is None
    True
    """
    found = [node.nu for node in jax.tree.leaves(inner_state, is_leaf=_has_nu) if _has_nu(node)]
    if len(found) <= 1:
        return found[0] if found else None
    # The branches of a partition: each knows leaves that the others lack.
    return {path: leaf for tree in reversed(found) for path, leaf in flatten(tree, "nu").by_path.items()}


def elsa(
    inner: optax.GradientTransformation,
    make: Make,
    k: Any,
    *,
    penalty: optax.ScalarOrSchedule = 0.01,
    every: int = 32,
    until: int,
    metric: Metric | None = second_moment,
    dtype: Any = None,
    prunable: Prunable = None,
    stacked: Stacked = None,
    sites: Sites | None = None,
    log: Log | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Train under the constraint of a sparsity: weights stay dense, and are pulled to a sparse copy of themselves (ELSA).

    The loss itself is minimised over weights x that are to equal a sparse z, by ADMM with the scaled dual variable u.
    At every update before `until` the gradient gets ``penalty * (x - z + u)`` added, and `inner` steps with it. At the
    updates every, 2 every, ... z becomes the sparse part of x + u, its entries unchanged where ``make`` keeps them, and
    u gains x - z; where the penalty has changed since, u is scaled by old / new. At `until` masks are made from the
    weights as the step finds them, and from that update on training goes on under them as in `static_sparse`: pruned
    weights are exactly ``+0.0`` after every ``optax.apply_updates``, as many as the rule of `make` says. If the loss jumps
    there, the weights were not near enough to z: raise the penalty (`log` tells the distance).

    Which weights z keeps is decided by ``sqrt(v) * (x + u)``, handed to `make` in float32, where v is Adam's second moment:
    the sparse z nearest to x + u when a weight's squared change costs v. The first z, before there is any moment, goes by
    the magnitudes of x, and so does every one where `metric` finds nothing. Where a network fits its data so well that hardly a
    gradient is left, v says little: there pass ``metric=None``.

    Cost: one copy of the weights that take part beside their masks, since z and u share it. `make` runs at the updates that
    change masks alone.

    Placement: around the whole optimizer. What clips gradients stands before it (``optax.chain(clip, elsa(adam, ...))``) so
    that the added term is not clipped; what follows it must not move weights. Inside ``optax.MultiSteps`` it counts the
    updates that are emitted. The loss sees dense weights: `masks_in` gives where z lies, and ``apply_masks(params, masks)``
    what would be left.

    Args:
        inner: the optimizer, any.
        make: ``(weights, k) -> masks``, for example ``functools.partial(make_masks, rule=rules.layer_sparsity)``.
        k: what `make` is given: a sparsity, or the n of n:m.
        penalty: lambda, >= 0, a number or an optax schedule of the update's number, looked at where z changes only. The
            paper's command for a language model of 7B has 0.01; it depends on the loss and the learning rate.
        every: updates from one change of z to the next, >= 1. As many as weights need to come near z: u adds up how far they stayed
            behind, and where they never catch up it drives them to and fro.
        until: the number of the update that prunes, >= every.
        metric: a function of the inner state that gives v, a tree like the parameters, or None where there is none;
            None itself goes by magnitudes always.
        dtype: what z and u are kept in, ``jnp.bfloat16`` for half the memory (ELSA-L); None is each weight's own, as complex ones have in
            any case.
        prunable: which leaves take part, as given to `make`.
        stacked: as in `make_masks`, for `log`.
        sites: as in `make_masks`.
        log: as in `prune`, with ``penalty`` and ``distance`` in place of ``k``: that of the weights to z, as a share of
            their norm. All weights that z lacks count as ``escaped`` as long as they are dense; thresholds are of what
            `make` is given.

    Returns:
        A transform whose state is an `ElsaState`.

    Raises:
        TypeError: inner is no optimizer, or make is none.
        ValueError: every < 1, until < every, penalty < 0 (a schedule: by ``init``); by ``init`` where `make` refuses k,
            prunes a leaf that does not take part, or nothing is prunable; by ``update`` without params, or where v is known of
            some leaves only.

    >>> import functools, jax.numpy as jnp, optax
    >>> from jaxprune import make_masks, rules
    >>> make = functools.partial(make_masks, rule=rules.layer_sparsity)
    >>> tx = elsa(optax.sgd(0.5), make, 0.5, penalty=0.5, every=1, until=2)
    >>> params = {"kernel": jnp.array([[4.0, 2.0]])}
    >>> state = tx.init(params)
    >>> for _ in range(3):  # the gradient of the loss is zero
    ...     updates, state = tx.update({"kernel": jnp.zeros((1, 2))}, state, params)
    ...     params = optax.apply_updates(params, updates)
    ...     print(params["kernel"].tolist())
    [[4.0, 1.5]]
    [[4.0, 0.75]]
    [[4.0, 0.0]]

    Reference: ELSA, "surrogate-free" ADMM for language models, arXiv 2510.01650, 2025.
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(f"elsa(inner, make, k) was given {described(inner)} where the optimizer inner belongs.")
    # Before there were any steps z and u have nothing to learn from.
    steps = Steps(every, every, until)
    require_scheduled("elsa", make, penalty, steps)
    inner = optax.with_extra_args_support(inner)
    which: dict[str, Any] = {"prunable": prunable, "stacked": stacked, "sites": sites}

    def init_fn(params: Any) -> ElsaState:
        bounds = steps._replace(begin=0).range_of("elsa", penalty)
        if bounds is not None and not bounds[0] >= 0:
            raise ValueError(f"elsa takes a penalty >= 0; got {bounds[0]:g}.")
        start = jnp.asarray(_at(penalty, 0), jnp.float32)
        held = masks_for(lambda params: make(params, k), params)
        split = _first(read_params(params, **which), held, dtype) if jax.tree.leaves(params) else params
        return ElsaState(jnp.zeros([], jnp.int32), held, split, start, inner.init(params))

    def update_fn(updates: Any, state: ElsaState, params: Any = None, **extra_args: Any) -> tuple[Any, ElsaState]:
        require_params(params, "elsa")

        def change(kept: Any, params: Any, inner_state: Any) -> Any:
            masks, split, old = kept
            new = jnp.asarray(_at(penalty, state.count), jnp.float32)
            sums = _sums(params, masks, split, last=state.count == until)
            weights = _weighed(sums, params, None if metric is None else metric(inner_state))
            made = masks_like(masks, make(weights, k), params)
            if log is not None:
                scalars = {"step": state.count, "penalty": new, "distance": _distance(params, masks, split)}
                tell(log, scalars, params, weights, masks, made, stacked, sites)
            # Without a penalty u has no say, whatever it is.
            scale = jnp.where(new > 0, old / jnp.where(new > 0, new, 1), 0)
            return made, _scaled(sums, made, split, scale), new

        masks, split, now = steps.when_due(
            state.count, change, (state.masks, state.split, state.penalty), params, state.inner_state
        )
        sparse = state.count >= until
        everywhere = jax.tree.map(lambda mask: mask | ~sparse, masks)
        pulled = _pulled(updates, params, masks, split, jnp.where(sparse, 0, now))
        updates, inner_state = inner.update(hide_pruned(pulled, everywhere), state.inner_state, params, **extra_args)
        count = optax.safe_increment(state.count)
        return enforce(updates, params, everywhere), ElsaState(count, masks, split, now, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _at(penalty: optax.ScalarOrSchedule, count: Any) -> Any:
    return penalty(count) if callable(penalty) else penalty


def _has_nu(node: Any) -> bool:
    return "nu" in getattr(type(node), "_fields", ())


def _first(tree: Params, masks: Any, dtype: Any) -> Any:
    """Return z and u as one tree before the first step: z is the sparse part of the weights, and u zero."""
    held = align_masks(masks, tree)
    for name, mask, fits in zip(tree.names, held, tree.prunable, strict=True):
        if not fits and not keeps_all(mask) and not isinstance(mask, jax.core.Tracer):
            raise ValueError(
                f"make prunes {name}, which does not take part in elsa: pass the same prunable= (or sites=) to both."
            )
    return tree.build(
        [
            jnp.where(mask, leaf, jnp.zeros_like(leaf)).astype(
                leaf.dtype if dtype is None or is_complex(leaf) else dtype
            )
            if fits
            else optax.MaskedNode()
            for leaf, mask, fits in zip(tree.leaves, held, tree.prunable, strict=True)
        ]
    )


def _sums(params: Any, masks: Any, split: Any, *, last: jax.Array) -> dict[str, jax.Array]:
    """Return x + u of each leaf that takes part, by path; x alone at the last change."""
    weights, held = flatten(params, "params").by_path, flatten(masks, "masks").by_path

    def add(x: jax.Array, mask: jax.Array, s: jax.Array) -> jax.Array:
        return x + jnp.where(mask | last, 0, s.astype(x.dtype))

    return {path: add(widen(weights[path]), held[path], leaf) for path, leaf in flatten(split, "split").by_path.items()}


def _weighed(sums: dict[str, jax.Array], params: Any, moments: Any) -> Any:
    """Return the parameters with ``sqrt(v) * sum`` for each leaf that takes part."""
    tree = flatten(params, "params")
    known = {} if moments is None else flatten(moments, "the second moments").by_path
    if known:
        for name, path in zip(tree.names, tree.paths, strict=True):
            if path in sums and path not in known:
                raise ValueError(
                    f"elsa weighs weights by the second moments in the optimizer's state, but {name} has none there and others "
                    "do. Pass metric=None, which goes by magnitudes, or a function of the state that knows all."
                )

    def weigh(path: str, leaf: Any) -> Any:
        if path not in sums:
            return leaf
        return sums[path] * jnp.sqrt(widen(known[path])).astype(sums[path].dtype) if known else sums[path]

    return tree.build([weigh(path, leaf) for path, leaf in zip(tree.paths, tree.leaves, strict=True)])


def _scaled(sums: dict[str, jax.Array], masks: Any, split: Any, scale: jax.Array) -> Any:
    """Return z and u after a change: z = x + u where masks keep, and u = x + u - z, scaled, elsewhere."""
    flat, held = flatten(split, "split"), flatten(masks, "masks").by_path
    return flat.build(
        [
            jnp.where(held[path], sums[path], scale.astype(sums[path].dtype) * sums[path]).astype(leaf.dtype)
            for path, leaf in zip(flat.paths, flat.leaves, strict=True)
        ]
    )


def _distance(params: Any, masks: Any, split: Any) -> jax.Array:
    """Return ``|x - z| / |x|`` over all leaves that take part."""
    weights, held = flatten(params, "params").by_path, flatten(masks, "masks").by_path
    x = {path: widen(weights[path]) for path in flatten(split, "split").paths}
    apart = {
        path: x[path] - jnp.where(held[path], leaf.astype(x[path].dtype), 0)
        for path, leaf in flatten(split, "split").by_path.items()
    }
    return optax.tree.norm(apart) / jnp.maximum(optax.tree.norm(x), 1e-30)


def _pulled(updates: Any, params: Any, masks: Any, split: Any, penalty: jax.Array) -> Any:
    """Add ``penalty * (x - z + u)`` to the gradient of each leaf that takes part."""
    flat = flatten(updates, "updates")
    weights, held = flatten(params, "params").by_path, flatten(masks, "masks").by_path
    splits = flatten(split, "split").by_path

    def pull(path: str, update: Any) -> Any:
        if path not in splits:
            return update
        x = widen(weights[path])
        s = splits[path].astype(x.dtype)
        term = penalty.astype(x.dtype) * (x - jnp.where(held[path], s, -s))
        return (update.astype(x.dtype) + term).astype(update.dtype)

    return flat.build([pull(path, leaf) for path, leaf in zip(flat.paths, flat.leaves, strict=True)])
