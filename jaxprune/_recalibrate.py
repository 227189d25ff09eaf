"""Running statistics measured anew over some batches."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._tree._paths import flatten


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
