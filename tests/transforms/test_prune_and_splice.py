"""prune_and_splice against NumPy: weights that live on behind their masks, and the band between two thresholds."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxprune import make_masks, masks_in, rules
from jaxprune.transforms import prune_and_splice, straight_through
from tests.support.one_layer import assert_positive_zeros

# Optax raises a float to the count of steps, which is a whole number (`tree.bias_correction`).
from tests.support.promotion import standard_promotion as standard_promotion

SHAPE, STEPS, EVERY, UNTIL = (6, 5), 40, 3, 31
KERNEL, TARGET, NOISE = (
    np.random.default_rng(i).normal(size=shape).astype(np.float32)
    for i, shape in enumerate((SHAPE, SHAPE, (STEPS, *SHAPE)))
)
above = functools.partial(make_masks, rule=rules.absolute_threshold)


def run(make: Any, schedule: Any, back: Any) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and mask after every step; the loss pulls what is not masked to a target that is never still."""
    tx = optax.chain(optax.sgd(0.1), prune_and_splice(make, schedule, back=back, every=EVERY, until=UNTIL))

    @jax.jit
    def steps(params: Any) -> Any:
        def body(carry: Any, noise: Any) -> Any:
            params, state = carry

            def loss(params: Any) -> jax.Array:
                seen = straight_through(params, masks_in(state))["kernel"]
                return jnp.sum((seen - TARGET - noise) ** 2) / 2

            updates, state = tx.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (params["kernel"], masks_in(state)["kernel"])

        return jax.lax.scan(body, (params, tx.init(params)), jnp.asarray(NOISE))[1]

    return jax.tree.map(np.asarray, steps({"kernel": jnp.asarray(KERNEL)}))


def test_against_numpy():
    """W <- W - beta dL/d(W . T); T is 0 below a, 1 above b, and what it was between them."""
    found, masks = run(above, 0.6, 0.9)
    w, mask, to_and_fro = KERNEL.astype(float), np.ones(SHAPE, bool), np.zeros(SHAPE, int)
    between = 0
    for t, noise in enumerate(NOISE):
        gradient = np.where(mask, w, 0) - TARGET - noise
        if (t % EVERY == 0 and t < UNTIL) or t == UNTIL:
            size, was = np.abs(w), mask
            mask = np.where(size < 0.6, False, np.where(size >= 0.9, True, was))
            to_and_fro += mask != was
            between += int(((size >= 0.6) & (size < 0.9) & ~was).sum())
        w = w - 0.1 * gradient
        if t >= UNTIL:
            w = np.where(mask, w, 0)
            assert_positive_zeros(found[t][~mask])
        np.testing.assert_array_equal(masks[t], mask)
        np.testing.assert_allclose(found[t], w, atol=1e-5)
    # Weights went and came back, and the band held some.
    assert to_and_fro.max() >= 2
    assert between > 0
    assert 0 < mask.sum() < mask.size


def test_counts_are_exact_without_a_band_and_at_most_that_with_one():
    make = functools.partial(make_masks, rule=rules.layer_sparsity)
    _, exact = run(make, 0.5, None)
    _, banded = run(make, 0.5, 0.6)
    due = np.isin(np.arange(STEPS), [*range(0, UNTIL, EVERY), UNTIL])
    assert (exact[due].sum((1, 2)) == 15).all()
    counts = banded[due].sum((1, 2))
    assert counts.min() >= 12
    assert counts.max() <= 15

    def changes(masks: np.ndarray) -> int:
        return int((masks[1:] != masks[:-1]).sum())

    assert changes(banded) < changes(exact)


def test_errors():
    with pytest.raises(TypeError, match=r"prune_and_splice\(make, schedule\) was given .* for make"):
        prune_and_splice(0.5, above, until=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prune_and_splice takes until >= 5"):
        prune_and_splice(above, 0.5, begin=5, until=4)
    make = functools.partial(make_masks, rule=rules.layer_sparsity)
    for given in ({"schedule": 1.5}, {"schedule": 0.5, "back": 1.5}):
        with pytest.raises(ValueError, match=r"1\.5"):
            prune_and_splice(make, **given, until=3).init({"kernel": jnp.asarray(KERNEL)})
    tx = prune_and_splice(above, 0.5, until=3)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update({"kernel": jnp.asarray(KERNEL)}, tx.init({"kernel": jnp.asarray(KERNEL)}))
