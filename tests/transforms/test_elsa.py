"""ELSA against NumPy, with z and u apart as in the paper, and what it is for."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune import make_masks, masks_in, rules
from jaxprune.transforms import elsa, second_moment
from tests.support.one_layer import assert_positive_zeros, step, train

# Optax raises a float to the count of steps, which is a whole number (`tree.bias_correction`).
from tests.support.promotion import standard_promotion as standard_promotion

SHAPE = (4, 6)
half = functools.partial(make_masks, rule=rules.layer_sparsity)
two_of_four = functools.partial(make_masks, rule=rules.n_m(4))
HALVING = optax.piecewise_constant_schedule(0.4, {5: 0.5, 10: 0.0})


def draws(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def largest(values: Any, kept: int) -> np.ndarray:
    keep = np.zeros(np.size(values), bool)
    keep[np.argsort(-np.abs(np.ravel(values)), kind="stable")[:kept]] = True
    return keep.reshape(np.shape(values))


class Sgd:
    v = None

    def step(self, grad: Any, t: int) -> Any:
        return -0.1 * grad


class Adam:
    m, v = 0.0, np.zeros(SHAPE)

    def step(self, grad: Any, t: int) -> Any:
        self.m, self.v = 0.9 * self.m + 0.1 * grad, 0.999 * self.v + 0.001 * grad**2
        return -0.1 * (self.m / (1 - 0.9 ** (t + 1))) / (np.sqrt(self.v / (1 - 0.999 ** (t + 1))) + 1e-8)


@pytest.mark.parametrize(("inner", "numpy_inner"), [(optax.sgd(0.1), Sgd()), (optax.adam(0.1), Adam())])
def test_against_numpy(inner, numpy_inner):
    """x: gradient += lambda (x - z + u); z = Proj(x + u) by sqrt(v), u += x - z, u *= old / new; at the end Proj(x)."""
    steps, every, until, kept = 16, 3, 13, 9
    x, target = draws(0, *SHAPE), draws(1, *SHAPE)
    curvature = np.exp(draws(2, *SHAPE))

    def objective(params: Any) -> jax.Array:
        return jnp.sum(curvature * (params["kernel"] - target) ** 2) / 2 + jnp.sum(params["bias"] ** 2) / 2

    tx = elsa(inner, half, 1 - kept / x.size, penalty=HALVING, every=every, until=until)

    @jax.jit
    def run(params: Any) -> Any:
        def body(carry: Any, _: None) -> Any:
            carry = step(tx, *carry, jax.grad(objective)(carry[0]))
            return carry, carry

        return jax.lax.scan(body, (params, tx.init(params)), length=steps)[1]

    found, states = jax.tree.map(np.asarray, run({"kernel": jnp.asarray(x), "bias": jnp.ones(6)}))

    x = x.astype(float)
    z, u, now = np.where(largest(x, kept), x, 0), np.zeros(SHAPE), 0.4
    keep = None
    for t in range(steps):
        if t == until:
            keep = largest(x if numpy_inner.v is None else np.sqrt(numpy_inner.v) * x, kept)
        elif t and t % every == 0 and t < until:
            total = x + u
            z = np.where(largest(total if numpy_inner.v is None else np.sqrt(numpy_inner.v) * total, kept), total, 0)
            u = u + x - z
            new = float(HALVING(t))
            u, now = u * (now / new if new else 0), new
        grad = curvature * (x - target)
        grad = grad + now * (x - z + u) if t < until else np.where(keep, grad, 0)
        x = x + numpy_inner.step(grad, t)
        if keep is not None:
            x = np.where(keep, x, 0)
        np.testing.assert_allclose(found["kernel"][t], x, atol=1e-4)
        assert states.masks["kernel"][t].sum() == kept
        if t < until:
            np.testing.assert_allclose(np.where(states.masks["kernel"][t], states.split["kernel"][t], 0), z, atol=1e-4)
            np.testing.assert_allclose(np.where(states.masks["kernel"][t], 0, states.split["kernel"][t]), u, atol=1e-4)
            np.testing.assert_allclose(states.penalty[t], now, rtol=1e-6)
        else:
            np.testing.assert_array_equal(states.masks["kernel"][t], keep)
            assert_positive_zeros(found["kernel"][t][~keep])
    # What takes no part has no copies and trains as ever.
    assert states.split["bias"] == optax.MaskedNode()
    assert states.masks["bias"].all()


def test_finds_sparse_optima_of_quadratics_that_magnitude_misses():
    """Forty least squares of eight correlated weights, four to be kept: the best of all 70 choices of each is known."""
    inputs = draws(4, 40, 64, 8)
    inputs = inputs + 0.8 * inputs[:, :, ::-1]
    data = np.einsum("nij,nj->ni", inputs, draws(5, 40, 8)) + 0.1 * draws(6, 40, 64)
    choices = list(itertools.combinations(range(8), 4))

    def least(i: int, columns: Any) -> float:
        chosen = inputs[i][:, list(columns)]
        return float(np.mean((chosen @ np.linalg.lstsq(chosen, data[i], rcond=None)[0] - data[i]) ** 2))

    def objective(params: Any) -> jax.Array:
        return jnp.mean((jnp.einsum("nij,njo->ni", inputs, params["kernel"]) - data) ** 2, axis=1).sum()

    best = np.array([min(least(i, columns) for columns in choices) for i in range(40)])
    dense = np.stack([np.linalg.lstsq(x, y, rcond=None)[0] for x, y in zip(inputs, data, strict=True)])
    by_magnitude = np.array([least(i, np.flatnonzero(largest(dense[i], 4))) for i in range(40)])
    make = functools.partial(half, stacked="kernel")
    tx = elsa(optax.adam(0.02), make, 0.5, penalty=1.0, every=4, until=1500, stacked="kernel")
    params, state = train(tx, {"kernel": jnp.asarray(dense[:, :, None], jnp.float32)}, 2000, objective)

    masks = np.asarray(masks_in(state)["kernel"])[:, :, 0]
    assert (masks.sum(1) == 4).all()
    assert_positive_zeros(np.asarray(params["kernel"])[:, :, 0][~masks])
    found = np.array([least(i, np.flatnonzero(mask)) for i, mask in enumerate(masks)])
    assert np.mean(by_magnitude <= best) < 0.4
    assert np.mean(found <= best) > 0.6
    # Under the masks the weights went on to the least squares of what is kept.
    np.testing.assert_allclose(float(objective(params)), found.sum(), rtol=1e-3)


def test_n_of_m_in_bfloat16_with_copies_in_bfloat16():
    params = {"kernel": jnp.asarray(draws(0, 8, 3), jnp.bfloat16)}
    tx = elsa(optax.sgd(0.05), two_of_four, 2, penalty=0.5, every=2, until=5, dtype=jnp.bfloat16)
    split = tx.init({"kernel": jnp.asarray(draws(0, 8, 3))}).split["kernel"]
    params, state = train(tx, params, 8, lambda params: jnp.sum((params["kernel"] - jnp.bfloat16(0.5)) ** 2))
    assert split.dtype == state.split["kernel"].dtype == params["kernel"].dtype == jnp.bfloat16
    keep = np.asarray(state.masks["kernel"])
    np.testing.assert_array_equal(keep.reshape(2, 4, 3).sum(1), 2)
    assert_positive_zeros(np.asarray(params["kernel"])[~keep])


def test_a_clip_stands_before_and_the_added_term_is_whole():
    tx = optax.chain(optax.clip(0.1), elsa(optax.sgd(1.0), half, 0.5, penalty=0.25, every=1, until=1))
    params = {"kernel": jnp.array([[8.0, 4.0]])}
    updates, _ = tx.update({"kernel": jnp.array([[5.0, 5.0]])}, tx.init(params), params)
    # Kept: the clipped gradient alone; not kept: 0.1 + (4 - 0 + 0) / 4.
    np.testing.assert_allclose(updates["kernel"], [[-0.1, -1.1]], rtol=1e-6)


def test_log_tells_penalty_and_distance():
    told: list[dict[str, float]] = []
    tx = elsa(optax.sgd(0.5), half, 0.5, penalty=0.5, every=1, until=2, log=told.append)
    train(tx, {"kernel": jnp.array([[4.0, 3.0]])}, 4, lambda params: 0 * jnp.sum(params["kernel"]))
    jax.effects_barrier()
    assert [line["step"] for line in told] == [1, 2]
    assert [line["penalty"] for line in told] == [0.5, 0.5]
    # After one step the second weight is 3 - 0.5 * 0.5 * 3 = 2.25, after two 2.25 - 0.25 * (2.25 + 2.25) = 1.125.
    np.testing.assert_allclose(
        [line["distance"] for line in told], [2.25 / np.hypot(4, 2.25), 1.125 / np.hypot(4, 1.125)], rtol=1e-6
    )
    assert [line["sparsity"] for line in told] == [0.5, 0.5]


KERNELS = {"a": {"kernel": jnp.ones((4, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
LABELS = {"a": "adam", "b": "other"}


def test_second_moments_of_a_partition_are_found_in_all_branches():
    both = optax.partition({"adam": optax.adam(0.1), "other": optax.rmsprop(0.1)}, LABELS).init(KERNELS)
    assert sorted(second_moment(both)) == ["a/kernel", "b/kernel"]
    assert second_moment(optax.lion(0.1).init(KERNELS)) is None


def test_a_second_moment_of_some_leaves_only_is_refused():
    inner = optax.partition({"adam": optax.adam(0.1), "other": optax.sgd(0.1)}, LABELS)
    tx = elsa(inner, half, 0.5, until=40)
    with pytest.raises(ValueError, match=r"params\['b'\]\['kernel'\] has none there and others do\. Pass metric=None"):
        tx.update(KERNELS, tx.init(KERNELS), KERNELS)
    tx = elsa(inner, half, 0.5, until=40, metric=None)
    tx.update(KERNELS, tx.init(KERNELS), KERNELS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0, "until": 9}, "elsa takes every >= 1"),
        ({"every": 5, "until": 4}, "elsa takes until >= 5"),
        ({"until": 40, "penalty": -1.0}, r"elsa takes a penalty >= 0; got -1\."),
        ({"until": 40, "penalty": optax.linear_schedule(1.0, -1.0, 30)}, r"elsa takes a penalty >= 0; got -1\."),
        ({"until": 40, "prunable": "a"}, r"make prunes params\['b'\]\['kernel'\], which does not take part"),
        ({"until": 40, "prunable": "nowhere"}, "nowhere"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        elsa(optax.sgd(0.1), half, 0.5, **options).init(KERNELS)


def test_misplaced_arguments_are_named():
    with pytest.raises(TypeError, match=r"elsa\(inner, make, k\) was given .* where the optimizer inner belongs"):
        elsa(half, optax.sgd(0.1), 0.5, until=40)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a rule, which takes scores"):
        elsa(optax.sgd(0.1), rules.layer_sparsity, 0.5, until=40)
