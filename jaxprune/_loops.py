"""Pruning in rounds: train, prune, and start again."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune._masks import apply_masks
from jaxprune._paths import flatten


class Round(NamedTuple):
    """One round: its strength, the masks made at its end, and the trained parameters under them."""

    k: Any
    masks: Any
    params: Any


def iterate(
    train: Callable[[Any, Any], Any],
    make: Callable[[Any, Any], Any],
    params: Any,
    ks: Iterable[Any],
    *,
    rewind_to: Any = None,
) -> Iterator[Round]:
    """Prune iteratively: for each k, make masks from the parameters, apply them, and train under them.

    One-shot pruning and fine-tuning is a single k; rising ks are iterative magnitude pruning; with `rewind_to` each
    round's survivors start from earlier weights: those of the initialisation (the lottery ticket) or of an early step
    (weight rewinding). For learning-rate rewinding leave `rewind_to` out and let `train` begin its schedule anew.
    Lazy: a round runs when it is asked for, and only one is held. `train` gets masks as arguments, so that, jitted, it is
    compiled once for all rounds.

    Args:
        train: ``(params, masks) -> params``; it must keep pruned weights at zero (`keep_pruned`).
        make: ``(params, k) -> masks``. A pruned weight, being zero, ranks lowest, so that rising ks are nested.
        params: trained parameters.
        ks: the strengths, one for each round.
        rewind_to: parameters of the same tree to start every round's training from; None goes on from the current ones.

    Yields:
        A `Round` for each k; its params are those after training.

    Raises:
        ValueError: `rewind_to` has other paths or shapes than `params`; whatever `make` raises.

    >>> import functools, jax.numpy as jnp
    >>> from jaxprune import make_masks, rules
    >>> make = functools.partial(make_masks, rule=rules.layer_sparsity)
    >>> params = {"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
    >>> for r in iterate(lambda params, masks: params, make, params, [0.25, 0.5]):
    ...     print(r.k, r.params["kernel"].ravel().tolist())
    0.25 [0.0, 2.0, 3.0, 4.0]
    0.5 [0.0, 0.0, 3.0, 4.0]

    Reference: Frankle, Carbin, "The Lottery Ticket Hypothesis", 2019; Renda, Frankle, Carbin, "Comparing Rewinding and
    Fine-tuning in Neural Network Pruning", 2020.
    """
    if rewind_to is not None:
        _require_same(rewind_to, params)
    for k in ks:
        masks = make(params, k)
        params = train(apply_masks(params if rewind_to is None else rewind_to, masks), masks)
        yield Round(k, masks, params)


def _require_same(rewind_to: Any, params: Any) -> None:
    early, late = flatten(rewind_to, "rewind_to"), flatten(params, "params")
    shapes = dict(zip(early.paths, map(jnp.shape, early.leaves), strict=True))
    for path, name, leaf in zip(late.paths, late.names, late.leaves, strict=True):
        if shapes.get(path) != jnp.shape(leaf):
            raise ValueError(f"rewind_to has {shapes.get(path)} for {name} of shape {jnp.shape(leaf)}.")


def recalibrate(
    update: Callable[[Any, Any], Any], statistics: Any, batches: Iterable[Any]
) -> Any:
    """Replace running statistics by their averages over some batches: batch-norm recalibration after pruning.

    Pruning shifts the activations that batch norms have statistics of; a few batches set them right, without labels and
    without training. Works for any momentum and any layout, since a running average is affine in its old value: two
    evaluations tell the batch's own statistic, and those are averaged with equal weight.

    Args:
        update: ``(statistics, batch) -> new statistics``, the model's own update in training mode, for example
            ``lambda s, x: model.apply({"params": params, "batch_stats": s}, x, train=True, mutable=["batch_stats"])[1]
            ["batch_stats"]``. Jitted here.
        statistics: a tree of floating-point arrays.
        batches: any iterable of batches, of equal sizes; at least one.

    Returns:
        The tree of averages, with the dtypes of `statistics`.

    Raises:
        ValueError: no batch, or a statistic that `update` does not move.

    >>> import jax.numpy as jnp
    >>> def update(s, x):
    ...     return {"mean": 0.9 * s["mean"] + 0.1 * jnp.mean(x)}
    >>> batches = [jnp.array([1.0, 3.0]), jnp.array([5.0, 7.0])]
    >>> round(float(recalibrate(update, {"mean": jnp.array(9.0)}, batches)["mean"]), 4)
    4.0

    Reference: Li et al., "EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning", 2020, section 3.3.
    """

    @jax.jit
    def of_batch(statistics: Any, batch: Any) -> tuple[Any, Any]:
        # new = m * old + (1 - m) * batch: from old = 0 and old = 1 follow m and the batch's statistic.
        zero = update(jax.tree.map(jnp.zeros_like, statistics), batch)
        one = update(jax.tree.map(jnp.ones_like, statistics), batch)
        weight = jax.tree.map(lambda a, b: 1 - (b - a), zero, one)
        return jax.tree.map(lambda a, w: a / jnp.where(w == 0, 1, w), zero, weight), weight

    total, weight, count = None, None, 0
    for batch in batches:
        found, weight = of_batch(statistics, batch)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        count += 1
    if total is None:
        raise ValueError("recalibrate needs at least one batch; the iterable was empty.")
    flat = flatten(weight, "statistics")
    for name, leaf in zip(flat.names, flat.leaves, strict=True):
        if not jnp.any(leaf):
            raise ValueError(f"{name} does not change when a batch is seen; is the model in training mode?")
    return jax.tree.map(lambda t, s: (t / count).astype(s.dtype), total, statistics)
