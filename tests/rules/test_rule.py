"""A rule says what it is, whatever its settings; those who need to know ask it."""

import copy
import dataclasses
import functools
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune import oneshot, rules, scores

# rule, scope, the range of its k, whether a larger k removes more, whether k is the fraction removed
SAYS = [
    (rules.std_threshold, "layer", (0, np.inf), True, False),
    (rules.mean_threshold, "layer", (0, np.inf), True, False),
    (rules.max_threshold, "layer", (0, np.inf), True, False),
    (rules.absolute_threshold, "layer", (0, np.inf), True, False),
    (rules.layer_sparsity, "layer", (0, 1), True, True),
    (rules.row_sparsity, "unit", (0, 1), True, True),
    (rules.global_sparsity, "model", (0, 1), True, True),
    (rules.erk_sparsity, "model", (0, 1), True, True),
    (rules.n_m(4), "group", (1, 4), False, False),
    (rules.channels(rules.layer_sparsity), "layer", (0, 1), True, True),
    (rules.blocks(rules.global_sparsity, (2, 2)), "model", (0, 1), True, True),
]
PARAMS = {"a": {"kernel": jnp.arange(32.0).reshape(8, 4)}, "b": {"kernel": 40.0 + jnp.arange(32.0).reshape(8, 4)}}


@pytest.mark.parametrize(("rule", "scope", "bounds", "rises", "counts"), SAYS, ids=lambda x: getattr(x, "name", ""))
def test_a_rule_says_what_it_is(rule, scope, bounds, rises, counts):
    assert (rule.scope, (rule.low, rule.high), rule.rises, rule.counts) == (scope, bounds, rises, counts)
    assert rule.name.startswith("rules.")
    assert rule.strength
    assert rule.__doc__
    # With other settings, in any wrapping, and after pickling it is still that rule.
    for other in (functools.partial(rule, max_sparsity=0.5), functools.partial(functools.partial(rule), axis=1)):
        found = rules.as_rule(other)
        assert (found.name, found.scope, found.low, found.high, found.grain) == (
            rule.name, rule.scope, rule.low, rule.high, rule.grain,
        )  # fmt: skip
    assert rules.as_rule(functools.partial(rule, max_sparsity=0.5)).max_sparsity == 0.5
    assert copy.deepcopy(rule) == rule
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert hash(rule) == hash(copy.deepcopy(rule))
    assert repr(rule) == rule.name


def test_equal_rules_are_equal_and_compile_once():
    assert rules.n_m(4) == rules.n_m(4) != rules.n_m(8)
    assert rules.channels(rules.layer_sparsity) == rules.channels(rules.layer_sparsity)
    assert rules.n_m(4).m == 4
    traced = []

    @functools.partial(jax.jit, static_argnames="rule")
    def make(params, rule):
        traced.append(rule)
        return jaxprune.make_masks(params, 2, rule=rule)

    make(PARAMS, rule=rules.n_m(4))
    make(PARAMS, rule=rules.n_m(4))
    assert len(traced) == 1


@pytest.mark.slow
def test_settings_of_a_partial_are_those_of_the_call():
    capped = functools.partial(rules.global_sparsity, max_sparsity=0.75)
    expected = jaxprune.make_masks(PARAMS, 0.5, rule=lambda s, k: rules.global_sparsity(s, k, max_sparsity=0.75))
    for rule in (
        capped,
        rules.as_rule(capped),
        dataclasses.replace(rules.global_sparsity, settings=(("max_sparsity", 0.75),)),
    ):
        found = jaxprune.make_masks(PARAMS, 0.5, rule=rule)
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found, expected))
    assert int((~expected["a"]["kernel"]).sum()) == 24


def test_a_plain_function_stays_a_rule_of_which_nothing_is_known():
    def mine(scores, k):
        return jax.tree.map(lambda score: score > k, scores)

    found = rules.as_rule(mine)
    assert (found.name, found.scope, found.m, found.max_sparsity) == ("mine", None, 1, 1.0)
    assert int(jaxprune.make_masks(PARAMS, 5.0, rule=mine)["a"]["kernel"].sum()) == 32 - 6
    with pytest.raises(TypeError, match="a rule is a function"):
        rules.as_rule("global_sparsity")


def test_one_shot_methods_ask_the_rule():
    fn = lambda params, x: x @ params["kernel"]  # noqa: E731
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(8, 4)), jnp.float32)}
    data = jnp.asarray(np.random.default_rng(1).normal(size=(32, 8)), jnp.float32)
    grams = jaxprune.calibrate_grams(fn, params, [data])
    # A cap of a quarter of 32 weights, though half is asked for.
    with pytest.warns(rules.PruningWarning, match=r"params\['kernel'\]: k = 0.5 asks for 16 of 32 to go"):
        _, masks = oneshot.admm(params, grams, 0.5, rule=functools.partial(rules.layer_sparsity, max_sparsity=0.25))
    assert int((~masks["kernel"]).sum()) == 8
    for rule in (
        rules.global_sparsity,
        rules.std_threshold,
        rules.channels(rules.layer_sparsity),
        rules.n_m(4, axis=1),
    ):
        with pytest.raises(ValueError, match=r"admm chooses weights within one matrix.* not by rules\."):
            oneshot.admm(params, grams, 0.5, rule=rule)


@pytest.mark.slow
def test_the_search_ends_where_the_rule_does():
    evaluate = lambda params: jnp.float32(1)  # noqa: E731
    ends = {rules.layer_sparsity: 1.0, rules.std_threshold: 4.0, functools.partial(rules.global_sparsity): 1.0}
    for rule, high in ends.items():
        assert float(jaxprune.search_k(evaluate, PARAMS, max_drop=0.0, rule=rule, steps=2)) == high
    with pytest.raises(ValueError, match=r"a larger k removes more; rules.n_m\(4\) keeps more"):
        jaxprune.search_k(evaluate, PARAMS, max_drop=0.0, rule=rules.n_m(4))


# A model whose class has ``__call__`` is data.


@pytest.mark.slow
def test_masks_and_verdicts_of_a_callable_model_are_read_and_not_called():
    model = eqx.filter(eqx.nn.MLP(4, 4, 8, 2, key=jax.random.key(0)), eqx.is_inexact_array)
    masks = jaxprune.make_masks(model, 0.5, rule=rules.layer_sparsity)
    assert callable(masks)
    state = jaxprune.keep_pruned(masks).init(model)
    assert float(jaxprune.sparsity(jaxprune.masks_in(state))) == 0.5
    verdicts = jax.tree.map(lambda leaf: leaf.ndim == 2, model)
    assert callable(verdicts)
    again = jaxprune.make_masks(model, 0.5, rule=rules.layer_sparsity, prunable=verdicts)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), masks, again))
    assert float(jaxprune.sparsity(masks, prunable=verdicts)) == 0.5


@pytest.mark.slow
def test_scores_of_a_callable_model_rank_it():
    model = eqx.filter(eqx.nn.MLP(4, 4, 8, 2, key=jax.random.key(0)), eqx.is_inexact_array)
    by_score = jaxprune.make_masks(model, 0.5, scores=scores.magnitude(model), rule=rules.layer_sparsity)
    assert float(jaxprune.sparsity(by_score)) == 0.5
