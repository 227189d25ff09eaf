"""The guard: no layer is emptied, max_sparsity holds exactly, and the warning says what k would have done."""

import functools
import re
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune import apply_masks, make_masks, rules
from jaxprune.rules import PruningWarning

RULES = [rules.std_threshold, rules.mean_threshold, rules.max_threshold, rules.absolute_threshold]
KEY = jax.random.key(0)
UNIFORM = jax.random.uniform(KEY, (40, 50), minval=-1.0)
TRUNCATED = jax.nn.initializers.truncated_normal()(KEY, (40, 50))


def mask_of(weights: jax.Array, k: float, **options: object) -> list:
    return make_masks({"kernel": jnp.asarray(weights)}, k, prunable=True, **options)["kernel"].tolist()


@pytest.mark.parametrize(("weights", "k"), [(UNIFORM, 2.0), (TRUNCATED, 3.0)], ids=["uniform", "truncated normal"])
def test_an_initialisation_keeps_its_largest_weight(weights: jax.Array, k: float) -> None:
    """Promise 2: k = 2 exceeds all of a uniform layer (from 1.73 on), k = 3 all of a truncated normal (from 2.27)."""
    assert k * np.std(weights) > np.max(np.abs(weights))
    with pytest.warns(PruningWarning, match="collapses"):
        mask = make_masks({"kernel": weights}, k)["kernel"]
    np.testing.assert_array_equal(mask, np.abs(weights) == np.max(np.abs(weights)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "dtype"),
    [(rule, jnp.float32) for rule in RULES] + [(rules.std_threshold, d) for d in (jnp.bfloat16, jnp.float16)],
)
@pytest.mark.filterwarnings("ignore::jaxprune.rules.PruningWarning")
def test_a_constant_layer_keeps_everything(rule: Callable, dtype: jnp.dtype) -> None:
    """Promise 2: zero or constant, whatever k; the rounding of 0.1 in a sum of 2,112 changes nothing."""
    for value in (0.0, 0.1, -0.1, 3e4):
        for k in (0.0, 1.0, 1e6):
            assert np.all(mask_of(jnp.full((64, 33), value, dtype), k, rule=rule)), (value, k)


def test_a_layer_constant_but_for_one_bit_keeps_everything() -> None:
    """Promise 2: the variance left by rounding may come out below zero; its root must not be NaN."""
    for value in np.float32([45635.05, 0.1, 7.7]):
        weights = np.full((100, 21), value)
        weights[0, 0] = np.nextafter(value, np.float32(np.inf))
        assert np.all(mask_of(weights, 1.0)), value


@pytest.mark.filterwarnings("ignore::jaxprune.rules.PruningWarning")
@pytest.mark.parametrize("k", [1.0, 1.5])
def test_a_layer_of_two_signs_keeps_everything(k: float) -> None:
    weights = jnp.where(jax.random.bernoulli(KEY, shape=(64, 33)), 0.1, -0.1)
    assert np.all(mask_of(weights, k))


@pytest.mark.parametrize(
    ("weights", "k", "kept"),
    [
        ([], 1.0, []),
        ([0.5], 3.0, [True]),
        ([0.0], 3.0, [True]),
        ([np.nan], 1.0, [True]),  # nothing finite: left as it is
        ([np.nan, np.nan], 1.0, [True, True]),
        ([np.nan, np.inf], 1.0, [True, True]),
        ([np.nan, 2.0], 1.0, [False, True]),
        ([np.inf, 2.0, -2.0, 0.1], 1.0, [True, True, True, False]),
        ([np.nan, 2.0, -2.0, 0.1], 1.0, [False, True, True, False]),
    ],
)
def test_leaves_of_no_and_one_entry_and_not_finite_ones(weights: list, k: float, kept: list[bool]) -> None:
    """Promises 2 and 8, at the edges."""
    assert mask_of(jnp.array(weights), k) == kept


def test_an_empty_leaf_keeps_its_shape() -> None:
    params = {"kernel": jnp.ones((2, 2)), "none": {"kernel": jnp.ones((0, 3))}}
    masks = make_masks(params, 1.0)
    assert masks["none"]["kernel"].shape == (0, 3)
    assert apply_masks(params, masks)["none"]["kernel"].shape == (0, 3)


def test_the_warning_names_the_layer_and_what_k_asked_for() -> None:
    params = {"emptied": {"kernel": jnp.array([[1.0, -2.0], [1.5, -1.5]])}, "fine": {"kernel": jnp.array([[1.0, 9.0]])}}
    # Of 1, -2, 1.5, -1.5 the std is sqrt(2.375 - 0.0625) = 1.5207; of 1, 9 it is 4.
    with pytest.warns(PruningWarning) as caught:
        make_masks(params, 2.0)
    text = str(caught[0].message)
    assert "params['emptied']['kernel']: k = 2 asks for |w| >= 3.041, which 4 of 4 do not reach" in text
    assert "the largest is 2" in text
    assert "fine" not in text
    assert "prefix" in text, "what to do"


def test_the_warning_gives_each_layer_its_own_k() -> None:
    params = {"a": {"kernel": TRUNCATED}, "b": {"kernel": TRUNCATED}, "c": {"kernel": TRUNCATED}}
    with pytest.warns(PruningWarning) as caught:
        make_masks(params, {"a": 3.0, "b": 1.0, "c": 4.5})
    text = str(caught[0].message)
    assert re.findall(r"params\['(.)'\]\['kernel'\]: k = (\S+)", text) == [("a", "3"), ("c", "4.5")]


def test_the_warning_names_the_layer_of_a_stack() -> None:
    stack = jnp.stack([TRUNCATED, jnp.zeros_like(TRUNCATED).at[0, 0].set(1.0), TRUNCATED * 1e3])
    with pytest.warns(PruningWarning) as caught:
        make_masks({"layers": {"kernel": stack}}, 3.0, stacked="layers")
    named = re.findall(r"params\['layers'\]\['kernel'\]\[(\d)\]: k = 3", str(caught[0].message))
    assert named == ["0", "2"]


@pytest.mark.filterwarnings("error")
def test_no_warning_without_a_cause_or_under_jit() -> None:
    make_masks({"kernel": TRUNCATED}, 2.0)
    make_masks({"kernel": jnp.zeros((3, 3))}, 2.0)
    make_masks({"kernel": jnp.ones((3, 3))}, 0.5)
    mask = jax.jit(make_masks)({"kernel": TRUNCATED}, 3.0)["kernel"]
    jax.vmap(make_masks, in_axes=(None, 0))({"kernel": TRUNCATED}, jnp.array([1.0, 3.0]))
    assert int(mask.sum()) >= 1, "the guard acts under jit all the same"


CAPS = [(0.0, 100), (0.29, 71), (0.5, 50), (0.57, 43), (0.999, 2), (1.0, 2)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "dtype", "run", "max_sparsity", "kept"),
    [(rules.std_threshold, jnp.float32, lambda f: f, *cap) for cap in CAPS]
    + [(rules.std_threshold, jnp.bfloat16, lambda f: f, *cap) for cap in CAPS]
    + [(rule, jnp.float32, jax.jit, *CAPS[i]) for i, rule in enumerate(RULES)],
)
@pytest.mark.filterwarnings("ignore::jaxprune.rules.PruningWarning")
def test_max_sparsity_caps_exactly(rule: Callable, dtype: type, run: Callable, max_sparsity: float, kept: int) -> None:
    """Promise 2: n - floor(max_sparsity * n) stay, 0.29 of 100 read as 29; or more, if k alone keeps more (-1 and 1)."""
    weights = jnp.linspace(-1, 1, 100).astype(dtype)[:, None]
    capped = functools.partial(rule, max_sparsity=max_sparsity)
    mask = np.asarray(run(lambda w: make_masks({"kernel": w}, 5.0, rule=capped))(weights)["kernel"])
    magnitude = np.abs(np.asarray(weights, np.float32))
    # The largest, and among equals the first.
    order = np.argsort(-magnitude.ravel(), kind="stable")
    np.testing.assert_array_equal(np.flatnonzero(mask), np.sort(order[:kept]))


@given(seed=st.integers(0, 2**32 - 1), cap=st.integers(0, 1000).map(lambda n: n / 1000), k=st.floats(0, 4))
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_max_sparsity_only_ever_adds(seed: int, cap: float, k: float) -> None:
    weights = jnp.asarray(np.random.default_rng(seed).integers(-9, 9, (20, 30)), jnp.float32)
    capped = functools.partial(rules.std_threshold, max_sparsity=cap)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PruningWarning)
        free, held = np.array(mask_of(weights, k)), np.array(mask_of(weights, k, rule=capped))
    least = 600 - round(cap * 1000) * 600 // 1000
    assert held.sum() == max(free.sum(), least)
    assert held[free].all()


def test_max_sparsity_holds_for_each_layer_of_a_stack() -> None:
    stack = jnp.stack([TRUNCATED, TRUNCATED * 100, jnp.zeros_like(TRUNCATED)])
    capped = functools.partial(rules.std_threshold, max_sparsity=0.6)
    with pytest.warns(PruningWarning, match="layers"):
        masks = make_masks({"layers": {"kernel": stack}}, 1.5, rule=capped, stacked="layers")
    assert masks["layers"]["kernel"].sum((1, 2)).tolist() == [800, 800, 2000]


@pytest.mark.parametrize("wrong", [-0.1, 1.5, np.nan, "0.5", True, None])
def test_max_sparsity_is_checked(wrong: object) -> None:
    with pytest.raises((ValueError, TypeError), match="max_sparsity"):
        mask_of(UNIFORM, 1.0, rule=functools.partial(rules.std_threshold, max_sparsity=wrong))
