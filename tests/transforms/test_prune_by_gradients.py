"""prune_by_gradients against NumPy: what is averaged, over which updates, and what it then prunes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune import make_masks, masks_in, rules, scores
from jaxprune.transforms import prune_by_gradients
from tests.support.one_layer import assert_positive_zeros, step

# Optax raises a float to the count of steps, which is a whole number (`tree.bias_correction`).
from tests.support.promotion import standard_promotion as standard_promotion

SHAPE, STEPS = (4, 6), 14
half = functools.partial(make_masks, rule=rules.layer_sparsity)
KERNEL, GRADS = (
    np.random.default_rng(i).normal(size=shape).astype(np.float32) for i, shape in enumerate((SHAPE, (STEPS, *SHAPE)))
)


def by_mean(params: Any, mean: Any, k: Any) -> Any:
    return half(params, k, scores=mean)


def by_fisher(params: Any, squares: Any, k: Any) -> Any:
    return half(params, k, scores=scores.fisher(params, squares))


def square(params: Any, grads: Any) -> Any:
    return jax.tree.map(jnp.square, grads)


@pytest.mark.parametrize(
    ("measure", "make", "measured", "scored"),
    [
        (scores.saliency, by_mean, lambda w, g: np.abs(w * g), lambda w, mean: mean),
        (square, by_fisher, lambda w, g: g**2, lambda w, mean: w**2 * mean / 2),
        (scores.movement, by_mean, lambda w, g: -w * g, lambda w, mean: mean),
    ],
    ids=["saliency", "fisher", "movement"],
)
def test_against_numpy(measure, make, measured, scored):
    """Masks at 5, 8, 11 and 12; the mean of updates 3 to 5, then of those since the change before."""
    schedule = lambda count: jnp.where(count < 8, 0.25, jnp.where(count < 12, 0.5, 0.75))  # noqa: E731
    tx = prune_by_gradients(optax.sgd(0.1, momentum=0.5), make, schedule, measure=measure, every=3, begin=5, until=12)

    @jax.jit
    def run(params: Any) -> Any:
        def body(carry: Any, grad: Any) -> Any:
            carry = step(tx, *carry, {"kernel": grad, "bias": jnp.ones(6)})
            return carry, (carry[0]["kernel"], masks_in(carry[1]))

        return jax.lax.scan(body, (params, tx.init(params)), jnp.asarray(GRADS))[1]

    found, masks = jax.tree.map(np.asarray, run({"kernel": jnp.asarray(KERNEL), "bias": jnp.ones(6)}))

    w, keep, momentum = KERNEL.astype(float), np.ones(SHAPE, bool), np.zeros(SHAPE)
    since = {5: 3, 8: 6, 11: 9, 12: 12}
    weights = []
    for t, g in enumerate(GRADS):
        weights.append(w)
        if t in since:
            mean = np.mean([measured(weights[i], GRADS[i]) for i in range(since[t], t + 1)], axis=0)
            score = np.where(keep, scored(w, mean), -np.inf)
            keep = np.zeros(w.size, bool)
            keep[np.argsort(-score.ravel(), kind="stable")[: round(w.size * (1 - float(schedule(t))))]] = True
            keep = keep.reshape(SHAPE)
        momentum = 0.5 * momentum + np.where(keep, g, 0)
        w = np.where(keep, w - 0.1 * momentum, 0)
        np.testing.assert_array_equal(masks["kernel"][t], keep)
        np.testing.assert_allclose(found[t], w, atol=1e-5)
        assert_positive_zeros(found[t][~keep])
    assert masks["bias"].all()
    assert [24 - int(masks["kernel"][t].sum()) for t in (4, 5, 8, 11, 12, 13)] == [0, 6, 12, 12, 18, 18]


def test_counts_are_exact_where_no_gradient_ever_comes():
    """Zero scores all over: what is pruned already ranks below them still."""
    tx = prune_by_gradients(
        optax.sgd(0.1), by_mean, lambda count: 0.25 * (count + 1), measure=scores.saliency, every=1, until=2
    )
    params = {"kernel": jnp.asarray(KERNEL)}
    state, kept = tx.init(params), []
    for _ in range(3):
        params, state = step(tx, params, state, {"kernel": jnp.zeros(SHAPE)})
        kept.append(np.asarray(state.masks["kernel"]))
    assert [int(mask.sum()) for mask in kept] == [18, 12, 6]
    assert not (kept[2] & ~kept[1]).any()


def test_log_tells_what_it_tells_of_prune():
    told: list[dict[str, float]] = []
    tx = prune_by_gradients(optax.sgd(0.1), by_mean, 0.5, measure=scores.saliency, every=2, until=2, log=told.append)
    params = {"kernel": jnp.asarray(KERNEL)}
    state = tx.init(params)
    for grad in GRADS[:4]:
        params, state = step(tx, params, state, {"kernel": jnp.asarray(grad)})
    jax.effects_barrier()
    assert [(line["step"], line["k"], line["sparsity"], line["churn"]) for line in told] == [
        (0, 0.5, 0.5, 0.5),
        (2, 0.5, 0.5, 0.0),
    ]


PARAMS = {"kernel": jnp.asarray(KERNEL)}


def test_errors():
    with pytest.raises(TypeError, match="where the optimizer inner belongs"):
        prune_by_gradients(by_mean, optax.sgd(0.1), 0.5, measure=scores.saliency)  # type: ignore[arg-type]
    for make in (half, rules.layer_sparsity, None):
        with pytest.raises(TypeError, match=r"for make, which is a function \(params, mean, k\) -> masks"):
            prune_by_gradients(optax.sgd(0.1), make, 0.5, measure=scores.saliency)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="given None for measure"):
        prune_by_gradients(optax.sgd(0.1), by_mean, 0.5, measure=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prune_by_gradients takes until >= 5"):
        prune_by_gradients(optax.sgd(0.1), by_mean, 0.5, measure=scores.saliency, begin=5, until=4)
    tx = prune_by_gradients(optax.sgd(0.1), by_mean, 0.5, measure=lambda params, grads: {"kernel": jnp.ones(3)})
    with pytest.raises(
        ValueError, match=r"what measure gives\['kernel'\] is float32\[3\]; .* real numbers of shape \[4, 6\]"
    ):
        tx.init(PARAMS)
    with pytest.raises(ValueError, match="sparsity"):
        prune_by_gradients(optax.sgd(0.1), by_mean, 1.5, measure=scores.saliency).init(PARAMS)
    tx = prune_by_gradients(optax.sgd(0.1), by_mean, 0.5, measure=scores.saliency)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(PARAMS, tx.init(PARAMS))
