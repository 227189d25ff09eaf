"""What TF-MOT's pruning defines, in NumPy, against what the page for those who come from it writes."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import make_masks, masks_in, rules


def by_threshold(sizes: np.ndarray, sparsity: float) -> np.ndarray:
    """All that reach the max(1, round(n (1 - s)))-th largest stay: equals of it as well."""
    number = max(1, int(np.round(np.float32(sizes.size) * (np.float32(1) - np.float32(sparsity)))))
    return sizes >= np.sort(sizes.ravel())[::-1][number - 1]


def m_of_n(kernel: np.ndarray, zeros: int, n: int) -> np.ndarray:
    """Zeros of every n along the inputs, the second axis from the end; among equals the first stay."""
    groups = np.moveaxis(np.abs(kernel), -2, -1)
    split = groups.reshape(*groups.shape[:-1], -1, n)
    order = np.argsort(-split, -1, kind="stable")[..., : n - zeros]
    mask = np.zeros(split.shape, bool)
    np.put_along_axis(mask, order, True, -1)
    return np.moveaxis(mask.reshape(groups.shape), -1, -2)


def decay(step: int, s0: float, s1: float, begin: int, end: int) -> float:
    progress = np.clip((step - begin) / (end - begin), 0, 1)
    return s1 + (s0 - s1) * (1 - progress) ** 3


def schedule(s0: float, s1: float, begin: int, end: int) -> optax.Schedule:
    """What the page writes: their first step is 1, the first update here is 0."""
    return optax.polynomial_schedule(s0, s1, power=3, transition_steps=end - begin, transition_begin=begin - 1)


KERNEL = np.random.default_rng(0).normal(size=(12, 10)).astype(np.float32)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.9])
def test_prune_low_magnitude(sparsity: float) -> None:
    here = make_masks({"kernel": KERNEL}, sparsity, rule=rules.layer_sparsity)["kernel"]
    np.testing.assert_array_equal(here, by_threshold(np.abs(KERNEL), sparsity))


def test_equals_all_stay_there_and_the_count_is_exact_here() -> None:
    ones = np.ones((2, 4), np.float32)
    here = make_masks({"kernel": ones}, 0.5, rule=rules.layer_sparsity)["kernel"]
    assert (int(by_threshold(ones, 0.5).sum()), int(np.sum(here))) == (8, 4)


@pytest.mark.parametrize("shape", [(12, 10), (3, 3, 8, 5)])
@pytest.mark.parametrize(("zeros", "k"), [(2, 2), (1, 3), (3, 1)])
def test_sparsity_m_by_n(shape: tuple[int, ...], zeros: int, k: int) -> None:
    kernel = np.round(2 * np.random.default_rng(1).normal(size=shape)).astype(np.float32)  # with many ties
    here = make_masks({"kernel": kernel}, k, rule=rules.n_m(4))["kernel"]
    np.testing.assert_array_equal(here, m_of_n(kernel, zeros, 4))


@pytest.mark.parametrize(("pool", "reduce"), [("mean", jnp.mean), ("max", functools.partial(jnp.max, initial=0))])
def test_blocks(pool: str, reduce: Any) -> None:
    here = make_masks({"kernel": KERNEL}, 0.5, rule=rules.blocks(rules.layer_sparsity, (3, 2), reduce=reduce))["kernel"]
    pooled = getattr(np.abs(KERNEL).reshape(4, 3, 5, 2), pool)((1, 3))
    np.testing.assert_array_equal(here, np.kron(by_threshold(pooled, 0.5), np.ones((3, 2), bool)))


def test_polynomial_decay() -> None:
    for step in range(10, 130):
        here = float(schedule(0.25, 0.8, 10, 110)(jnp.int32(step - 1)))
        assert here == pytest.approx(decay(step, 0.25, 0.8, 10, 110), abs=1e-6)


def test_the_steps_at_which_masks_change() -> None:
    """Theirs are begin, begin + frequency, ..., as far as end; counted from 1."""
    begin, end, frequency = 3, 20, 5
    there = [step for step in range(1, 30) if begin <= step <= end and (step - begin) % frequency == 0]

    def make(params: Any, k: Any) -> Any:
        return make_masks(params, k, rule=rules.layer_sparsity)

    last = end - (end - begin) % frequency
    tx = jaxprune.prune(make, schedule(0.25, 0.8, begin, end), every=frequency, begin=begin - 1, until=last - 1)
    params = {"kernel": jnp.asarray(KERNEL)}
    state, kept, here = tx.init(params), KERNEL.size, []
    for step in range(1, 30):
        updates, state = tx.update({"kernel": jnp.zeros_like(KERNEL)}, state, params)
        params = optax.apply_updates(params, updates)
        now = int(masks_in(state)["kernel"].sum())
        if now != kept:
            here.append(step)
            assert now == int(by_threshold(np.abs(KERNEL), decay(step, 0.25, 0.8, begin, end)).sum())
        kept = now
    assert here == there == [3, 8, 13, 18]
