"""Bad input to the functions of masks: one clear error that names the leaf (promise 9)."""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import apply_masks, make_masks, rules, sparsity, summarize

KERNEL = jnp.array([[3.0, -1.0], [1.0, -3.0]])
PARAMS = {"a": {"kernel": KERNEL, "bias": jnp.ones(2)}, "b": {"kernel": KERNEL}}
MASKS = {"a": {"kernel": KERNEL > 0, "bias": jnp.ones(2, bool)}, "b": {"kernel": KERNEL > 0}}
RULES = [rules.std_threshold, rules.mean_threshold, rules.max_threshold, rules.absolute_threshold]


def with_b(tree: dict, leaf: object) -> dict:
    return tree | {"b": {"kernel": leaf}}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("k", [-1, -0.5, float("nan"), float("inf"), np.float32(-1), jnp.array(-1.0)])
def test_k_out_of_range(k: object, rule: Callable) -> None:
    """Promise 9: the rule, the range, the value and the leaf."""
    expected = rf"rules\.{rule.__name__} takes k >= 0.*got k = {float(k):g}.*params\['a'\]\['kernel'\]"
    with pytest.raises(ValueError, match=expected):
        make_masks(PARAMS, k, rule=rule)
    with pytest.raises(ValueError, match=r"params\['b'\]\['kernel'\]"):
        make_masks(PARAMS, {"a": 1.0, "b": k}, rule=rule)


@pytest.mark.parametrize("k", ["1", b"1", None, True, np.True_, jnp.array(True), np.array("1"), 1j, object()])
def test_k_is_no_number(k: object) -> None:
    with pytest.raises(TypeError, match=r"k .*is a number.*not"):
        make_masks(PARAMS, k)
    if k is not None:
        with pytest.raises(TypeError, match=r"params\['b'\]\['kernel'\]"):
            make_masks(PARAMS, {"a": 1.0, "b": k})


@pytest.mark.parametrize(
    ("k", "named"),
    [
        ({}, "params['a']['kernel']"),
        ({"a": 1.0}, "params['b']['kernel']"),
        ({"a": 1.0, "b": None}, "params['b']['kernel']"),
        ({"a": {"bias": 1.0}, "b": 1.0}, "params['a']['kernel']"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "k['c']"),
        ({"a": 1.0, "b": {"kernel": {"deeper": 1.0}}}, "k['b']['kernel']['deeper']"),
        ([1.0, 1.0], "k[0]"),
        (jnp.array([1.0, 2.0]), "params['a']['kernel'] has shape (2,)"),
        ({"a": 1.0, "b": jnp.ones((2, 2))}, "params['b']['kernel'] has shape (2, 2)"),
    ],
)
def test_k_is_a_prefix_that_does_not_fit(k: object, named: str) -> None:
    """Promise 9: a prefix that misses a layer, or that has an entry for none."""
    with pytest.raises(ValueError, match=re.escape(named)):
        make_masks(PARAMS, k)
    with pytest.raises(ValueError, match=re.escape(named)):
        jax.jit(make_masks)(PARAMS, k)


@pytest.mark.parametrize("params", [{}, [], (), None, {"a": None}])
def test_an_empty_tree(params: object) -> None:
    with pytest.raises(ValueError, match="empty tree"):
        make_masks(params, 1.0)
    with pytest.raises(ValueError, match="empty tree|no path"):
        make_masks(params, 1.0, stacked="layers")


@pytest.mark.parametrize("leaf", ["text", jnp.tanh, object(), {1, 2}])
@pytest.mark.parametrize(
    "call",
    [lambda p: make_masks(p, 1.0), lambda p: apply_masks(p, MASKS), lambda p: summarize(p, MASKS)],
    ids=["make_masks", "apply_masks", "summarize"],
)
def test_a_leaf_that_is_no_array(call: Callable, leaf: object) -> None:
    """Promise 9: its path, its type, and what to pass instead."""
    found = {str: "the string 'text'", type(jnp.tanh): "the function tanh"}.get(
        type(leaf), f"an? {type(leaf).__name__}"
    )
    with pytest.raises(TypeError, match=rf"params\['b'\]\['kernel'\] is {found}, not an array.*[Pp]ass"):
        call(with_b(PARAMS, leaf))


@pytest.mark.parametrize(
    "params",
    [
        {"kernel": jnp.ones((2, 2), int)},
        {"kernel": jax.random.key(0)},
        {"kernel": 0.5, "steps": 3},
        {"bias": jnp.ones(3)},
        {"LayerNorm_0": {"scale": jnp.ones(3)}, "Embed_0": {"embedding": jnp.ones((3, 3))}},
    ],
)
def test_nothing_is_prunable(params: dict) -> None:
    first = next(iter(params))
    with pytest.raises(ValueError, match=rf"No leaf is prunable.*params\['.*{first[-4:]}.*prunable="):
        make_masks(params, 1.0)


@pytest.mark.parametrize("prunable", [lambda path, leaf: False, {"a": False, "b": False}, False])
@pytest.mark.parametrize(
    "call",
    [
        lambda **options: make_masks(PARAMS, 1.0, **options),
        lambda **options: sparsity(MASKS, **options),
        lambda **options: summarize(PARAMS, MASKS, **options),
    ],
    ids=["make_masks", "sparsity", "summarize"],
)
def test_a_predicate_that_matches_nothing(call: Callable, prunable: object) -> None:
    """Promise 9: an error, not a silent nothing."""
    with pytest.raises(ValueError, match=r"No leaf is prunable.*\['a'\]\['kernel'\]"):
        call(prunable=prunable)


@pytest.mark.parametrize("prunable", [{"a": True, "q": False}, [True]])
def test_a_tree_of_bools_that_does_not_fit(prunable: object) -> None:
    with pytest.raises(ValueError, match=r"prunable\[.* matches no leaf"):
        make_masks(PARAMS, 1.0, prunable=prunable)


@pytest.mark.parametrize("prunable", [{"a": "no", "b": True}, MASKS, 1.0])
def test_prunable_is_neither_predicate_nor_bools(prunable: object) -> None:
    with pytest.raises(TypeError, match="prunable"):
        make_masks(PARAMS, 1.0, prunable=prunable)


def test_a_pattern_that_fits_nothing() -> None:
    with pytest.raises(ValueError, match=r"prunable='kernels' matches no path. Paths look like"):
        make_masks(PARAMS, 1.0, prunable="kernels")


@pytest.mark.parametrize(
    ("stacked", "found"),
    [
        ("layers", "'layers' matches no path"),
        (["a", "nowhere*"], r"'nowhere\*' matches no path"),
        (lambda path, leaf: 3, r"3 layer axes to params\['a'\]\['bias'\] of shape \(2,\)"),
        (lambda path, leaf: -1, r"-1 layer axes to params\['a'\]\['bias'\]"),
    ],
)
def test_stacked_that_does_not_fit(stacked: object, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        make_masks(PARAMS, 1.0, stacked=stacked)


def test_stacked_names_a_leaf_without_axes() -> None:
    params = {"a": {"kernel": KERNEL, "rate": 0.5}}
    with pytest.raises(ValueError, match=r"1 layer axes to params\['a'\]\['rate'\] of shape \(\)"):
        make_masks(params, 1.0, stacked="a")


def test_two_leaves_of_one_path() -> None:
    with pytest.raises(ValueError, match=r"params\['a'\]\['kernel'\] has the same path"):
        make_masks({"a/kernel": KERNEL, "a": {"kernel": KERNEL}}, 1.0)


@pytest.mark.parametrize(
    ("masks", "named"),
    [
        ({}, "params['a']['bias']"),
        (None, "params['a']['bias']"),
        ({"a": MASKS["a"]}, "params['b']['kernel']"),
        (MASKS | {"c": jnp.ones(2, bool)}, "masks['c']"),
        (with_b(MASKS, jnp.ones((2, 2))), "params['b']['kernel'] an array of float32[2, 2]"),
        (with_b(MASKS, jnp.ones((2, 2), int)), "params['b']['kernel'] an array of int32[2, 2]"),
        (with_b(MASKS, jnp.ones((1, 2), bool)), "params['b']['kernel'] an array of bool[1, 2]"),
        (with_b(MASKS, True), "params['b']['kernel'] an array of bool[]"),
        (with_b(MASKS, [True, False]), "params['b']['kernel']"),
    ],
)
@pytest.mark.parametrize("call", [apply_masks, jax.jit(apply_masks), summarize], ids=["eager", "jit", "summarize"])
def test_masks_that_do_not_fit(call: Callable, masks: object, named: str) -> None:
    """Promise 9: of another structure, dtype or shape."""
    # Under jit a Python bool arrives as an array without axes, which does not fit either.
    with pytest.raises(ValueError, match=re.escape(named)):
        call(PARAMS, masks)


@pytest.mark.parametrize("mask", [jnp.ones((2, 2)), jnp.ones((2, 2), int), True, "text", 3])
def test_sparsity_of_what_is_no_mask(mask: object) -> None:
    with pytest.raises((TypeError, ValueError), match=r"masks\['b'\]\['kernel'\]"):
        sparsity(with_b(MASKS, mask))


@pytest.mark.parametrize(
    ("returned", "found"),
    [
        (None, "0 masks for 2"),
        ({"a": KERNEL > 0}, "1 masks for 2"),
        ({"a": {"kernel": jnp.ones((2, 1), bool)}, "b": KERNEL > 0}, r"params\['a'\]\['kernel'\].*bool\[2, 1\]"),
        ({"a": {"kernel": KERNEL > 0}, "b": KERNEL}, r"params\['b'\]\['kernel'\].*float32\[2, 2\]"),
    ],
)
def test_a_rule_of_your_own_that_returns_no_masks(returned: object, found: str) -> None:
    def my_rule(scores: object, k: float) -> object:
        return returned

    with pytest.raises(ValueError, match=rf"rule my_rule returned.*{found}"):
        make_masks(PARAMS, 1.0, rule=my_rule)


@pytest.mark.parametrize(
    ("score", "found"),
    [
        (jnp.ones((2, 1)), r"float32\[2, 1\]"),
        (jnp.ones((2, 2), int), r"int32\[2, 2\]"),
        (None, "None"),
        (KERNEL.at[0, 0].set(jnp.nan), "NaN"),
    ],
)
def test_scores_that_do_not_fit(score: object, found: str) -> None:
    with pytest.raises(ValueError, match=rf"scores for params\['b'\]\['kernel'\].*{found}"):
        make_masks(PARAMS, 1.0, scores=with_b(PARAMS, score))
    with pytest.raises(ValueError, match=r"scores has no entry for params\['b'\]\['kernel'\]"):
        make_masks(PARAMS, 1.0, scores={"a": PARAMS["a"]})
