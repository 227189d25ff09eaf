"""iterate and recalibrate: rounds by hand, rewinding, one compile; running statistics against NumPy."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxprune import iterate, keep_pruned, make_masks, recalibrate, rules
from tests.support.one_layer import TARGET, assert_positive_zeros, dense_params, loss, step

exactly = functools.partial(make_masks, rule=rules.layer_sparsity)


def add_one(params: Any, masks: Any) -> Any:
    return jax.tree.map(lambda leaf, mask: jnp.where(mask, leaf + 1, 0), params, masks)


def row(tree: Any) -> list[float]:
    return np.asarray(tree["kernel"]).ravel().tolist()


# --- iterate. ---


@pytest.mark.parametrize(
    ("rewind_to", "expected"),
    [
        (None, [[0.0, 3.0, 4.0, 5.0], [0.0, 0.0, 5.0, 6.0]]),
        # Survivors start from the early weights each time; the masks are those of the trained ones.
        ([9.0, 8.0, 7.0, 6.0], [[0.0, 9.0, 8.0, 7.0], [0.0, 9.0, 8.0, 0.0]]),
    ],
)
def test_rounds_by_hand(rewind_to, expected):
    params = {"kernel": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
    early = None if rewind_to is None else {"kernel": jnp.array([rewind_to])}
    rounds = list(iterate(add_one, exactly, params, [0.25, 0.5], rewind_to=early))
    assert [r.k for r in rounds] == [0.25, 0.5]
    assert [row(r.params) for r in rounds] == expected
    for r in rounds:
        assert row(r.masks) == [value != 0 for value in row(r.params)]


def test_a_round_runs_when_it_is_asked_for():
    trained = []

    def train(params: Any, masks: Any) -> Any:
        trained.append(None)
        return params

    rounds = iterate(train, exactly, dense_params(), [0.25, 0.5])
    assert not trained
    next(rounds)
    assert len(trained) == 1


def test_iterative_magnitude_pruning_compiles_once():
    """Lottery tickets with the optimizer's state new in every round; masks are nested, and zeros exact."""
    traces = []

    @jax.jit
    def train(params: Any, masks: Any) -> Any:
        traces.append(None)
        tx = optax.chain(optax.sgd(0.1, momentum=0.5), keep_pruned(masks))

        def body(carry: Any, _: None) -> Any:
            params, state = carry
            return step(tx, params, state, jax.grad(loss)(params)), None

        return jax.lax.scan(body, (params, tx.init(params)), length=60)[0][0]

    start = dense_params()
    make = jax.jit(exactly)
    rounds = list(iterate(train, make, start, [0.0, 0.25, 0.5, 0.75], rewind_to=start))
    assert len(traces) == make._cache_size() == 1
    kept = [np.asarray(r.masks["kernel"]) for r in rounds]
    assert [keep.sum() for keep in kept] == [12, 9, 6, 3]
    for before, after in zip(kept, kept[1:], strict=False):
        assert not (after & ~before).any()
    for keep, r in zip(kept, rounds, strict=True):
        kernel = np.asarray(r.params["kernel"])
        assert_positive_zeros(kernel[~keep])
        np.testing.assert_allclose(kernel[keep], TARGET[keep], atol=1e-3)
    # The dense round ends at its target, so that what survives is what is large there.
    assert np.abs(TARGET[kept[-1]]).min() > np.abs(TARGET[~kept[-1]]).max()


def test_rewinding_to_another_model_is_refused_at_once():
    with pytest.raises(ValueError, match=r"rewind_to has no entry for params\['bias'\]"):
        iterate(add_one, exactly, dense_params(), [0.5], rewind_to={"kernel": jnp.ones((4, 3))})
    other = dense_params() | {"bias": jnp.ones(4)}
    with pytest.raises(ValueError, match=r"rewind_to has for params\['bias'\] an array of shape \[4\], not \[3\]"):
        iterate(add_one, exactly, dense_params(), [0.5], rewind_to=other)


# --- recalibrate. ---

BATCHES = [np.random.default_rng(i).normal(3 * i, 1 + i, (16, 4)).astype(np.float32) for i in range(3)]
MEAN = np.mean([batch.mean(0, dtype=np.float64) for batch in BATCHES], 0)
VAR = np.mean([batch.var(0, dtype=np.float64) for batch in BATCHES], 0)


class Linen(nn.Module):
    momentum: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.BatchNorm(use_running_average=False, momentum=self.momentum)(x)


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_linen_batch_norm(momentum, scale):
    model = Linen(momentum)
    variables = model.init(jax.random.key(0), jnp.ones((2, 4)))

    def update(statistics: Any, x: jax.Array) -> Any:
        return model.apply({**variables, "batch_stats": statistics}, x, mutable=["batch_stats"])[1]["batch_stats"]

    batches = (scale * batch for batch in BATCHES)
    found = recalibrate(update, variables["batch_stats"], batches)["BatchNorm_0"]
    # What is known of 1 - momentum is known to its last digits only.
    tolerance = 1e-6 / (1 - momentum)
    np.testing.assert_allclose(found["mean"], scale * MEAN, rtol=tolerance, atol=scale * tolerance)
    np.testing.assert_allclose(found["var"], scale**2 * VAR, rtol=2 * tolerance + 1e-5)


def test_nnx_batch_norm():
    norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    graph, statistics, rest = nnx.split(norm, nnx.BatchStat, ...)

    def update(statistics: Any, x: jax.Array) -> Any:
        model = nnx.merge(graph, statistics, rest)
        model(x, use_running_average=False)
        return nnx.state(model, nnx.BatchStat)

    found = recalibrate(update, statistics, BATCHES)
    np.testing.assert_allclose(found["mean"][...], MEAN, rtol=1e-4)
    np.testing.assert_allclose(found["var"][...], VAR, rtol=1e-4)


def test_recalibrate_compiles_once():
    traces = []

    def update(statistics: Any, x: jax.Array) -> Any:
        traces.append(None)
        return 0.5 * statistics + 0.5 * jnp.mean(x)

    recalibrate(update, jnp.float32(0), BATCHES)
    assert len(traces) == 2  # of one compile, for two old values


def test_recalibrate_refuses():
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate(lambda s, x: s, {"mean": jnp.zeros(2)}, [])
    with pytest.raises(ValueError, match=r"statistics\['var'\] does not change .* in training mode\?"):
        recalibrate(
            lambda s, x: {"mean": 0.5 * s["mean"] + x, "var": s["var"]},
            {"mean": jnp.zeros(2), "var": jnp.zeros(2)},
            [jnp.ones(2)],
        )
