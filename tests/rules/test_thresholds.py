"""The threshold rules against a float64 oracle, and what pruning twice does (promises 1 and 8)."""

import contextlib
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune import apply_masks, make_masks, rules

pytestmark = pytest.mark.filterwarnings("ignore::jaxprune.rules.PruningWarning")

Rule = Callable[..., dict]
STATISTIC = {
    rules.std_threshold: np.std,
    rules.mean_threshold: lambda w: np.mean(np.abs(w)),
    rules.max_threshold: lambda w: np.max(np.abs(w)),
    rules.absolute_threshold: lambda w: 1.0,
}
every_rule = pytest.mark.parametrize("rule", STATISTIC, ids=lambda rule: rule.__name__)
# Shapes are few because every new one costs a compilation; the values vary.
SHAPES = [(1,), (7,), (2, 3, 4, 5), (64, 33)]


def threshold_of(weights: np.ndarray, k: float, rule: Rule) -> float:
    """The threshold in float64: k times the statistic of the finite entries, at most the largest of them."""
    finite = weights[np.isfinite(weights)]
    return min(k * STATISTIC[rule](finite), np.max(np.abs(finite)))


def check_against_oracle(weights: jax.Array, k: float, rule: Rule) -> None:
    """Assert the mask equals the oracle's at every weight that is not within 1e-6 (relative) of the threshold."""
    mask = np.asarray(make_masks({"kernel": weights}, k, rule=rule, prunable=True)["kernel"])
    exact = np.abs(np.asarray(weights).astype(np.float64))
    threshold = threshold_of(np.asarray(weights).astype(np.float64), k, rule)
    sure = np.abs(exact - threshold) > 1e-6 * threshold
    np.testing.assert_array_equal(mask[sure], (exact >= threshold)[sure])
    assert mask.flat[np.argmax(exact)], "the largest weight went"


@contextlib.contextmanager
def precision(dtype: jnp.dtype):
    with jax.enable_x64(True) if dtype == jnp.float64 else contextlib.nullcontext():
        yield


@st.composite
def layers(draw: st.DrawFn, dtype: jnp.dtype) -> jax.Array:
    """Weights of many scales, means (up to a million deviations) and distributions, equal magnitudes among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.sampled_from(SHAPES))
    ratio = draw(st.sampled_from([0.0, 0.5, 0.95, 1.05, 10.0, 1e3, 1e4, 1e6])) * draw(st.sampled_from([1, -1]))
    top = 3 if dtype == jnp.float16 else 6
    scale = 10.0 ** draw(st.floats(-6, top if abs(ratio) <= 1.05 else top - np.log10(abs(ratio))))
    spread = draw(st.sampled_from(["normal", "uniform", "heavy tails", "signs"]))
    spread = {
        "normal": rng.normal(size=shape),
        "uniform": rng.uniform(-1, 1, shape),
        "heavy tails": np.clip(rng.standard_cauchy(shape), -20, 20),
        "signs": rng.choice([-1.0, 1.0], shape),
    }[spread]
    with precision(dtype):
        return jnp.asarray(jnp.asarray(scale * (ratio + spread)), dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "dtype"),
    [(rules.std_threshold, dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.float16, jnp.float64)]
    + [(rule, dtype) for rule in list(STATISTIC)[1:] for dtype in (jnp.float32, jnp.bfloat16)],
)
def test_masks_equal_the_oracle(rule: Rule, dtype: jnp.dtype) -> None:
    """Promise 1: float32, bfloat16, float16 and float64, also where the mean is a million deviations."""

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(layers(dtype), st.floats(0, 1), st.booleans())
    def check(weights: jax.Array, fraction: float, by_quantile: bool) -> None:
        exact = np.abs(np.asarray(weights).astype(np.float64))
        unit = STATISTIC[rule](np.asarray(weights).astype(np.float64))
        # Either an ordinary k, or the k whose threshold lies at a quantile of the magnitudes.
        k = float(np.quantile(exact, fraction) / unit) if by_quantile and unit > 0 else 4 * fraction
        with precision(dtype):
            check_against_oracle(weights, k, rule)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("mean", [0.0, 0.8, 3.0])
def test_a_large_layer_equals_the_oracle(mean: float) -> None:
    weights = jnp.asarray(np.random.default_rng(0).normal(mean, 1.0, (1000, 5000)), jnp.float32)
    check_against_oracle(weights, 1.0, rules.std_threshold)
    check_against_oracle(weights, 1.0, rules.mean_threshold)


@pytest.mark.parametrize("deviations", [1e4, 1e5, 1e6])
def test_a_mean_far_from_zero_equals_the_oracle(deviations: float) -> None:
    weights = jnp.asarray(deviations + np.random.default_rng(0).normal(size=(64, 33)), jnp.float32)
    exact = np.asarray(weights, np.float64)
    check_against_oracle(weights, float(np.median(exact) / np.std(exact)), rules.std_threshold)


@pytest.mark.parametrize("rule", [rules.std_threshold, rules.mean_threshold])
def test_rounding_errors_do_not_pile_up(rule: Rule) -> None:
    """Sums of 2,176 equal magnitudes, whose rounding errors do not cancel: still right within 1e-6."""
    weights = np.tile([0.1, -0.1], (64, 17)).astype(np.float32)
    weights[5, 5] *= 1 + 3e-6
    mask = make_masks({"kernel": jnp.asarray(weights)}, 1 + 1.5e-6, rule=rule)["kernel"]
    assert np.argwhere(mask).tolist() == [[5, 5]]


@pytest.mark.parametrize(
    ("rule", "k", "kept"),
    [
        # Of 2, -3, 1, 4 the std is sqrt(6.5) = 2.55, the mean magnitude 2.5, the largest 4.
        (rules.std_threshold, 1.0, [False, True, False, True]),
        (rules.mean_threshold, 1.0, [False, True, False, True]),
        (rules.max_threshold, 0.5, [True, True, False, True]),
        (rules.max_threshold, 1.0, [False, False, False, True]),
        (rules.absolute_threshold, 3.0, [False, True, False, True]),
        (rules.absolute_threshold, 3.0001, [False, False, False, True]),
        (rules.std_threshold, 0.0, [True, True, True, True]),
    ],
)
def test_values_by_hand(rule: Rule, k: float, kept: list[bool]) -> None:
    weights = {"kernel": jnp.array([[2.0, -3.0], [1.0, 4.0]])}
    assert make_masks(weights, k, rule=rule)["kernel"].ravel().tolist() == kept


def test_zeros_count_in_every_statistic() -> None:
    """Promise 1: the deviation is over all entries, zeros included."""
    weights = {"kernel": jnp.array([[0.0, 0.0], [3.0, -4.0]])}  # std 2.49, mean magnitude 1.75
    assert make_masks(weights, 1.25)["kernel"].tolist() == [[False, False], [False, True]]
    assert make_masks(weights, 1.2)["kernel"].tolist() == [[False, False], [True, True]]
    assert make_masks(weights, 1.8, rule=rules.mean_threshold)["kernel"].tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize("spoiler", [np.nan, np.inf, -np.inf])
@every_rule
def test_statistics_ignore_what_is_not_finite(rule: Rule, spoiler: float) -> None:
    """Promise 8: one NaN or infinity leaves the other weights' masks alone; a NaN goes, an infinity stays."""
    clean = np.random.default_rng(0).normal(size=(20, 30)).astype(np.float32)
    spoilt = np.append(clean.ravel(), [spoiler, spoiler]).astype(np.float32)
    expected = make_masks({"kernel": jnp.asarray(clean)}, 0.7, rule=rule)["kernel"]
    found = make_masks({"kernel": jnp.asarray(spoilt[None])}, 0.7, rule=rule)["kernel"][0]
    np.testing.assert_array_equal(found[:-2], expected.ravel())
    assert found[-2:].tolist() == [bool(np.isinf(spoiler))] * 2


def test_a_nan_is_gone_after_pruning() -> None:
    """Promise 8: NaN does not survive."""
    params = {"kernel": jnp.array([[jnp.nan, 1.0], [2.0, -3.0]])}
    pruned = apply_masks(params, make_masks(params, 0.1))
    assert pruned["kernel"].tolist() == [[0.0, 1.0], [2.0, -3.0]]


def prune(params: dict, k: float, rule: Rule) -> tuple[dict, dict]:
    masks = make_masks(params, k, rule=rule, prunable=True)
    return apply_masks(params, masks), masks


def check_idempotence(weights: np.ndarray, k: float, rule: Rule) -> None:
    once, masks = prune({"kernel": jnp.asarray(weights, jnp.float32)}, k, rule)
    twice, again = prune(once, k, rule)
    chex.assert_trees_all_equal(twice, once)
    chex.assert_trees_all_equal(again, masks)


@given(seed=st.integers(0, 2**32 - 1), k=st.floats(0.1, 3), shape=st.sampled_from([(2, 3), (16, 40), (3, 3, 8, 8)]))
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_std_is_idempotent_on_symmetric_layers(seed: int, k: float, shape: tuple[int, ...]) -> None:
    """Promise 1: pruning twice with the same k is pruning once, whatever the shape of the distribution."""
    half = np.random.default_rng(seed).standard_t(2, size=shape)
    check_idempotence(np.concatenate([half, -half]), k, rules.std_threshold)


@pytest.mark.slow
@given(seed=st.integers(0, 2**32 - 1), k=st.floats(0.25, 3))
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_std_is_idempotent_on_layers_of_small_mean(seed: int, k: float) -> None:
    """Promise 1, for layers as they are trained: a mean of a tenth of the deviation."""
    weights = np.random.default_rng(seed).normal(0.1, 1.0, (50, 60))
    check_idempotence(weights, k, rules.std_threshold)


@given(
    seed=st.integers(0, 2**32 - 1),
    k=st.floats(0.1, 2),
    mean=st.floats(-5, 5),
    rule=st.sampled_from([rules.mean_threshold, rules.max_threshold, rules.absolute_threshold]),
)
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_other_rules_are_idempotent_on_any_layer(seed: int, k: float, mean: float, rule: Rule) -> None:
    check_idempotence(np.random.default_rng(seed).normal(mean, 1.0, (20, 30)), k, rule)


def test_std_is_not_idempotent_far_from_zero() -> None:
    """The limit of promise 1: a mean of several deviations, where a new zero widens the distribution."""
    # std = 0.163, so k = 6 asks for 0.98. With zeros in place of 0.9 the std is 0.572, and 6 * 0.572 exceeds all.
    weights = {"kernel": jnp.tile(jnp.array([0.9, 1.1, 1.3]), (4, 1))}
    once, masks = prune(weights, 6.0, rules.std_threshold)
    _, again = prune(once, 6.0, rules.std_threshold)
    assert masks["kernel"][0].tolist() == [False, True, True]
    assert again["kernel"][0].tolist() == [False, False, True]


def test_pruning_again_does_not_run_away() -> None:
    """Promise 1: the deviation of the survivors alone would remove .683, .888, .960, .985 of a normal layer."""
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(300, 300)), jnp.float32)}
    removed = []
    for _ in range(4):
        params, masks = prune(params, 1.0, rules.std_threshold)
        removed.append(float(1 - jnp.mean(masks["kernel"])))
    assert removed == [pytest.approx(0.683, abs=0.01)] + [removed[0]] * 3


@every_rule
def test_a_larger_k_keeps_a_subset(rule: Rule) -> None:
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(30, 30)), jnp.float32)}
    masks = [make_masks(params, k, rule=rule)["kernel"] for k in (0.0, 0.1, 0.3, 0.5, 0.9, 1.5, 3.0)]
    assert all(bool(jnp.all(more | ~fewer)) for more, fewer in zip(masks, masks[1:], strict=False))
    assert bool(jnp.all(masks[0]))
    assert bool(jnp.any(masks[-1]))


# Scale.


@pytest.mark.parametrize("exponent", [-110, -76, -66, -50, 50, 63, 66, 100, 125])
@pytest.mark.parametrize("rule", [rules.std_threshold, rules.mean_threshold, rules.max_threshold])
def test_masks_do_not_depend_on_the_scale_of_the_weights(rule, exponent):
    weights = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    scaled = np.ldexp(weights, exponent)
    for k in (0.5, 1.0, 1.5) if rule is not rules.max_threshold else (0.1, 0.5):
        expected = make_masks({"kernel": jnp.asarray(weights)}, k, rule=rule)["kernel"]
        found = make_masks({"kernel": jnp.asarray(scaled)}, k, rule=rule)["kernel"]
        np.testing.assert_array_equal(found, expected)


def test_sums_that_overflow_empty_no_layer():
    """Fifteen weights of 1e38 and one of 2e38: their mean is 1.0625e38, their deviation 0.242e38."""
    weights = jnp.full((4, 4), 1e38).at[0, 0].set(2e38)
    assert make_masks({"kernel": weights}, 1.0)["kernel"].all()
    masks = make_masks({"kernel": weights}, 5.0)["kernel"]  # asks for 1.21e38
    assert masks.sum() == 1
    assert bool(masks[0, 0])
    masks = make_masks({"kernel": weights}, 1.5, rule=rules.mean_threshold)["kernel"]  # 1.59e38
    assert masks.sum() == 1
    assert bool(masks[0, 0])
