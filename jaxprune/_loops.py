"""Pruning in rounds: train, prune, and start again."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune._masks import apply_masks
from jaxprune._paths import align, flatten


class Round(NamedTuple):
    """One round: its strength, the masks made at its start, and the parameters trained under them."""

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
    Lazy: a round runs when it is asked for, and only one is held. `train` gets masks as an argument, so that, jitted,
    it is compiled once for all rounds.

    Args:
        train: ``(params, masks) -> params``; it must keep pruned weights at zero (`keep_pruned`).
        make: ``(params, k) -> masks``. A pruned weight, being zero, ranks lowest, so that rising ks are nested.
        params: trained parameters. (Untrained ones, with a k that prunes nothing first, train in the first round.)
        ks: the strengths, one for each round.
        rewind_to: parameters of the same tree to start every round's training from; None goes on from the current ones.

    Returns:
        An iterator of a `Round` for each k; its params are those after training.

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
    return _rounds(train, make, params, ks, rewind_to)


def _rounds(train: Any, make: Any, params: Any, ks: Iterable[Any], rewind_to: Any) -> Iterator[Round]:
    for k in ks:
        masks = make(params, k)
        params = train(apply_masks(params if rewind_to is None else rewind_to, masks), masks)
        yield Round(k, masks, params)


def _require_same(rewind_to: Any, params: Any) -> None:
    late = flatten(params, "params")
    early = align(flatten(rewind_to, "rewind_to"), late, "rewind_to", "params")
    for name, leaf, start in zip(late.names, late.leaves, early, strict=True):
        if jnp.shape(start) != jnp.shape(leaf):
            raise ValueError(
                f"rewind_to has for {name} an array of shape {list(jnp.shape(start))}, not {list(jnp.shape(leaf))}. "
                "Rewind to earlier parameters of the same model."
            )


def recalibrate(update: Callable[[Any, Any], Any], statistics: Any, batches: Iterable[Any]) -> Any:
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
        # new = m * old + (1 - m) * batch: two old values tell m and the batch's statistic. The second old value is of
        # the size of what is added to it, so that m is precise for small and large statistics alike.
        zero = update(jax.tree.map(jnp.zeros_like, statistics), batch)
        probe = jax.tree.map(lambda a: 1 + jnp.abs(a), zero)
        probed = update(jax.tree.map(jnp.asarray, probe), batch)  # a copy: NNX would update its variables in place
        weight = jax.tree.map(lambda new, a, old: 1 - (new - a) / old, probed, zero, probe)
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
