"""sensitivity, search_k and allocate: values by hand and by explicit loops, one compile, honesty, clear errors."""

import copy
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxprune
from jaxprune import rules
from tests.support.curves import CURVES

RNG = np.random.default_rng(0)
PARAMS = {
    name: {"kernel": jnp.asarray(RNG.normal(size=shape), jnp.float32), "bias": jnp.ones(shape[1])}
    for name, shape in (("a", (6, 4)), ("b", (4, 5)))
}
KS = (0.25, 0.75, 1.5)


def energy(params):
    """Falls as weights go; biases count, so that touching them would show."""
    return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(params))


def by_hand(params, k, names, rule=rules.std_threshold):
    masks = jaxprune.make_masks(params, k, rule=rule)
    pruned = jaxprune.apply_masks(params, masks)
    return float(energy({name: (pruned if name in names else params)[name] for name in params}))


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [None, 1, 2])
@pytest.mark.parametrize("rule", [rules.std_threshold, rules.layer_sparsity])
def test_each_layer_alone_and_all_together(rule, batch_size):
    ks = KS if rule is rules.std_threshold else (0.1, 0.5, 0.9)
    found = jaxprune.sensitivity(energy, PARAMS, ks, rule=rule, batch_size=batch_size)
    assert (found.ks, found.groups, found.sizes) == (ks, ("a/kernel", "b/kernel"), (24, 20))
    assert found.paths == (("a/kernel",), ("b/kernel",))
    assert found.dense == pytest.approx(float(energy(PARAMS)))
    for j, k in enumerate(ks):
        masks = jaxprune.make_masks(PARAMS, k, rule=rule)
        for g, name in enumerate("ab"):
            assert found.metric[g, j] == pytest.approx(by_hand(PARAMS, k, [name], rule), rel=1e-6)
            assert found.sparsity[g, j] == pytest.approx(1 - np.mean(masks[name]["kernel"]))
        assert found.together[j] == pytest.approx(by_hand(PARAMS, k, ["a", "b"], rule), rel=1e-6)
        assert found.together_sparsity[j] == pytest.approx(float(jaxprune.sparsity(masks)))
    np.testing.assert_allclose(found.drop, found.dense - found.metric)


def test_the_whole_sweep_compiles_the_evaluation_once():
    traced = []

    @jax.jit
    def evaluate(params):
        traced.append(None)
        return energy(params)

    jaxprune.sensitivity(evaluate, PARAMS, KS)
    assert len(traced) == 1
    jaxprune.search_k(evaluate, PARAMS, max_drop=5.0)
    assert len(traced) == 1


@pytest.mark.slow
def test_an_nnx_state_and_groups():
    model = nnx.Dict(a=nnx.Linear(6, 4, rngs=nnx.Rngs(0)), b=nnx.Linear(4, 5, rngs=nnx.Rngs(1)))
    params = nnx.state(model, nnx.Param)
    one = jaxprune.sensitivity(energy, params, [1.0], groups={"both": ["a/*", "b/*"]})
    each = jaxprune.sensitivity(energy, params, [1.0])
    assert one.groups == ("both",)
    assert one.paths == (("a/kernel", "b/kernel"),)
    assert one.metric[0, 0] == pytest.approx(each.together[0])
    half = jaxprune.sensitivity(energy, params, [1.0], groups={"second": "b/kernel"})
    assert half.metric[0, 0] == half.together[0] == pytest.approx(each.metric[1, 0])


def test_prints_and_plain_data():
    found = jaxprune.sensitivity(energy, PARAMS, KS)
    text = str(found)
    assert "a/kernel" in text
    assert "0.75" in text
    assert "all together" in text
    plain = json.loads(found.to_json())
    assert plain["groups"] == ["a/kernel", "b/kernel"]
    assert np.asarray(plain["metric"]).shape == (2, 3)


def test_remarks_in_words():
    assert CURVES.remarks(max_drop=0.1) == [
        "a/kernel: up to k = 0.5 less than 1% goes, too low to matter.",
        "a/kernel: k = 2 (80% removed) alone costs 0.4 of the metric, too high to survive.",
    ]


def cost_and_share(ks):
    """What the layers of CURVES cost together and the share of weights they lose, linear between the points."""
    at = [np.interp(k, [0, *CURVES.ks], [0, *cost]) for k, cost in zip(ks, CURVES.drop, strict=True)]
    gone = [np.interp(k, [0, *CURVES.ks], [0, *share]) for k, share in zip(ks, CURVES.sparsity, strict=True)]
    return sum(at), (300 * gone[0] + 100 * gone[1]) / 400


@pytest.mark.slow
@pytest.mark.parametrize("k", [0.0, 0.1, 0.125, 0.425, 0.6, 0.8, 0.825])
def test_allocate_reaches_the_total_at_the_least_cost(k):
    prefix = jaxprune.choose.allocate(CURVES, k)
    cost, share = cost_and_share((prefix["a"]["kernel"], prefix["b"]["kernel"]))
    assert share == pytest.approx(k)
    # No pair of a fine grid removes as much for less. (The curves' hulls are the curves but for a's first point.)
    grid = [cost_and_share((a, b)) for a in np.linspace(0, 2, 161) for b in np.linspace(0, 2, 161)]
    assert cost <= min(c for c, s in grid if s >= k - 1e-9) + 0.006


def test_allocate_takes_what_is_free_first():
    # Free are 1.5 weights of a, at k = 0.5, and 50 of b, up to k = 1; of 40, the other 38.5 are between 20 and 50.
    prefix = jaxprune.choose.allocate(CURVES, 0.1)
    assert prefix == {"a": {"kernel": 0.5}, "b": {"kernel": pytest.approx(0.5 + 0.5 * 18.5 / 30)}}
    assert jaxprune.choose.allocate(CURVES, 0.825) == {"a": {"kernel": 2.0}, "b": {"kernel": 2.0}}


@pytest.mark.slow
def test_allocated_strengths_are_a_prefix_for_make_masks():
    found = jaxprune.sensitivity(energy, PARAMS, np.linspace(0.1, 0.9, 9), rule=rules.layer_sparsity)
    masks = jaxprune.make_masks(PARAMS, jaxprune.choose.allocate(found, 0.5), rule=rules.layer_sparsity)
    assert float(jaxprune.sparsity(masks)) == pytest.approx(0.5, abs=1 / 44)


@pytest.mark.parametrize("k", [-0.1, 1.5, "half", True])
def test_allocate_refuses_what_is_no_sparsity(k):
    with pytest.raises(ValueError, match="0 <= k <= 1"):
        jaxprune.choose.allocate(CURVES, k)


def test_allocate_says_what_is_reachable():
    with pytest.raises(ValueError, match=r"0\.9.* reaches 0\.825; sweep over larger ks"):
        jaxprune.choose.allocate(CURVES, 0.9)


# what is wrong, what the message says
BAD_SWEEPS = [
    ({"ks": []}, "at least one"),
    ({"ks": [1.0, 0.5]}, "rise"),
    ({"ks": [0.5, 0.5]}, "rise"),
    ({"ks": [0.5, float("nan")]}, "finite"),
    ({"evaluate": lambda params: jnp.nan}, "NaN for the unpruned parameters"),
    ({"evaluate": lambda params: jnp.where(params["a"]["kernel"].min() < -9, 0, jnp.ones(2))}, r"shape \(2,\)"),
    ({"evaluate": lambda params: jnp.where((params["b"]["kernel"] == 0).any(), jnp.nan, 1.0)}, "b/kernel pruned at k"),
    ({"groups": {"c": "c/*"}}, r"group 'c' \('c/\*'\) matches no prunable leaf; the paths are a/kernel, b/kernel"),
    ({"groups": {"x": "a/*", "y": "*"}}, r"params\['a'\]\['kernel'\] is in the groups 'x' and 'y'"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_SWEEPS)
def test_sensitivity_refuses(changed, message):
    arguments = {"evaluate": energy, "params": PARAMS, "ks": KS} | changed
    with pytest.raises(ValueError, match=message):
        jaxprune.sensitivity(**arguments)


# Searching.

LINE = {"kernel": jnp.arange(1.0, 101.0).reshape(10, 10)}  # in order of magnitude


def kept_share(params):
    return jnp.mean(params["kernel"] != 0)


def test_the_largest_k_within_a_drop():
    k = jaxprune.search_k(kept_share, LINE, max_drop=0.3, rule=rules.layer_sparsity, steps=20)
    masks = jaxprune.make_masks(LINE, k, rule=rules.layer_sparsity)
    assert float(jaxprune.sparsity(masks)) == pytest.approx(0.3)
    assert len(k.tried) == 20
    assert k.remarks == ()
    assert all(trial.accepted == (trial.value >= 0.7 - 1e-6) for trial in k.tried)
    assert all(trial.sparsity == pytest.approx(1 - trial.value) for trial in k.tried)
    above = jaxprune.make_masks(LINE, float(k) + 0.01, rule=rules.layer_sparsity)
    assert kept_share(jaxprune.apply_masks(LINE, above)) < 0.7


@pytest.mark.slow
def test_scores_of_your_own_are_arguments_of_one_program():
    # Signed scores remove the other end first: 100 goes before 1.
    scores = {"kernel": -LINE["kernel"]}
    k = jaxprune.search_k(kept_share, LINE, max_drop=0.3, rule=rules.layer_sparsity, scores=scores, steps=20)
    masks = jaxprune.make_masks(LINE, k, rule=rules.layer_sparsity, scores=scores)
    assert LINE["kernel"][masks["kernel"]].tolist() == list(range(1, 71))
    swept = jaxprune.sensitivity(kept_share, LINE, [0.3], rule=rules.layer_sparsity, scores=scores)
    assert swept.metric.tolist() == [[pytest.approx(0.7)]]


def test_the_lowest_metric_accepted_and_the_default_rule():
    k = jaxprune.search_k(kept_share, LINE, min_metric=0.5)
    masks = jaxprune.make_masks(LINE, k)
    assert 0.5 <= 1 - float(jaxprune.sparsity(masks)) < 0.53
    assert max(trial.k for trial in k.tried) == 4.0


def test_a_metric_that_falls_and_rises_again_is_told():
    def metric(params):
        share = kept_share(params)
        return jnp.where((share > 0.45) & (share < 0.65), 0.0, 1.0)

    k = jaxprune.search_k(metric, LINE, max_drop=0.1, rule=rules.layer_sparsity)
    assert 1 - 0.65 - 0.02 <= k <= 1 - 0.65 + 0.01  # the last accepted before the first refused
    assert k.remarks
    assert all("not steady" in remark for remark in k.remarks)
    assert "not steady" in str(k)


def test_everything_accepted_is_told():
    k = jaxprune.search_k(lambda params: 1.0, LINE, max_drop=0.0, high=0.5, rule=rules.layer_sparsity)
    assert k == 0.5
    assert "look higher" in k.remarks[0]


def test_the_smallest_k_that_meets_a_budget():
    k = jaxprune.search_k(None, LINE, budget=40, rule=rules.layer_sparsity)
    assert jaxprune.algebra.count_kept(jaxprune.make_masks(LINE, k, rule=rules.layer_sparsity)) == 40
    stored = jaxprune.search_k(
        None, LINE, budget=300, cost=lambda masks: jaxprune.storage.stored_bytes(LINE, masks), rule=rules.layer_sparsity
    )
    masks = jaxprune.make_masks(LINE, stored, rule=rules.layer_sparsity)
    assert 296 <= jaxprune.storage.stored_bytes(LINE, masks) <= 300


def test_a_strength_is_a_float_that_knows_how_it_was_found():
    k = jaxprune.search_k(kept_share, LINE, max_drop=0.3, rule=rules.layer_sparsity)
    assert isinstance(k, float)
    for twin in (copy.deepcopy(k), pickle.loads(pickle.dumps(k))):
        assert (twin, twin.tried, twin.asked) == (k, k.tried, k.asked)
    assert "chosen" in str(k)
    assert "refused" in str(k)


# arguments, what the message says
BAD_SEARCHES = [
    ({}, "exactly one of max_drop=, min_metric= and budget="),
    ({"max_drop": 0.1, "budget": 3}, "exactly one"),
    ({"max_drop": -1.0}, "max_drop >= 0"),
    ({"min_metric": 2.0}, "min_metric=2 is above the metric of the unpruned parameters, 1"),
    ({"max_drop": 0.1, "low": 0.5}, "k = 0.5 already gives 0.5; the best of those tried is 0.5"),
    ({"budget": 0.5}, "no k up to 1 meets a budget of 0.5: k = 1 still costs 1"),
    ({"max_drop": 0.1, "low": 1.0, "high": 0.5}, "low < high"),
    ({"max_drop": 0.1, "steps": 1}, "steps >= 2"),
    ({"max_drop": 0.1, "evaluate": None}, "needs evaluate="),
    ({"max_drop": 0.1, "evaluate": lambda params: jnp.where(kept_share(params) < 1, jnp.nan, 1.0)}, "pruned at k = "),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_SEARCHES)
def test_search_k_refuses(arguments, message):
    arguments = {"evaluate": kept_share, "rule": rules.layer_sparsity} | arguments
    with pytest.raises(ValueError, match=message):
        jaxprune.search_k(params=LINE, **arguments)


def squared_error(params):
    """A loss: it rises as weights go."""
    return sum(
        jnp.mean(jnp.square(leaf - PARAMS[name]["kernel"])) for name in "ab" for leaf in [params[name]["kernel"]]
    )


RISES = r"The metric rises as weights go: .* unpruned, .* at k = .* removed\)\. Larger = better: of a loss, evaluate"


def test_a_loss_is_no_metric():
    with pytest.warns(UserWarning, match=RISES):
        curves = jaxprune.sensitivity(squared_error, PARAMS, [0.5, 0.75], rule=rules.layer_sparsity)
    assert curves.dense == 0.0
    for aim in ({"max_drop": 0.01}, {"min_metric": 0.0}):
        with pytest.warns(UserWarning, match=RISES):
            k = jaxprune.search_k(squared_error, PARAMS, rule=rules.layer_sparsity, steps=4, **aim)
        assert float(k) == 1.0  # whatever is pruned, the loss is no lower than before


def test_a_metric_may_rise_a_little():
    # Pruning does good at first, or is no worse than chance in the end; nothing is removed at all.
    def evaluate(params):
        kept = sum(jnp.mean(params[name]["kernel"] != 0) for name in "ab") / 2
        return jnp.where(kept > 0.6, 0.93, jnp.where(kept > 0.3, 0.95, 0.9055))

    jaxprune.sensitivity(evaluate, PARAMS, [0.25, 0.5, 0.9], rule=rules.layer_sparsity)
    jaxprune.search_k(evaluate, PARAMS, max_drop=0.03, rule=rules.layer_sparsity, steps=4)
    jaxprune.sensitivity(lambda params: -squared_error(params), PARAMS, [0.5], rule=rules.layer_sparsity)
    # A loss negated of a network that is worse than zeros.
    jaxprune.sensitivity(lambda params: -energy(params), PARAMS, [0.5], rule=rules.layer_sparsity)
    jaxprune.sensitivity(lambda params: 0.5, PARAMS, [0.0], rule=rules.layer_sparsity)
