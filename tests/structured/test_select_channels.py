"""Which channels stay: by hand, within budgets, rounded, and what is refused."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune
from jaxprune.scores import channel_norm, fpgm
from jaxprune.structured import (
    ChannelGroup,
    Graph,
    Plan,
    count_macs,
    count_parameters,
    select_channels,
    select_channels_globally,
    sparsity_within,
    trace,
)
from jaxprune.structured._select_channels import kept_count
from tests.support.structured_cases import CASES
from tests.support.structured_zoo import normal

l1 = functools.partial(channel_norm, ord=1)


def two_layers(width: int = 4, inner: int = 6) -> tuple[Graph, dict]:
    params = {"a": normal(3, width), "b": normal(width), "c": normal(width, inner), "d": normal(inner, 2)}
    fn = lambda p, x: jnp.tanh((x @ p["a"] + p["b"][None]) @ p["c"]) @ p["d"]  # noqa: E731
    return trace(fn, params, normal(5, 3)), params


def graph_of(name: str) -> tuple[Graph, object]:
    case = CASES[name]()
    return trace(case.fn, case.params, *case.inputs), case.params


def test_importance_is_of_all_coupled_weights():
    graph, params = two_layers(width=3)
    params = {**params, "a": jnp.eye(3), "b": jnp.array([0.0, 0.0, 3.0]), "c": jnp.zeros((3, 6)).at[0, 0].set(-4)}
    # Rows of weights: (1, 0, -4), (1, 0, 0), (1, 3, 0), zeros aside.
    for importance, expected in [(channel_norm, (0, 2)), (l1, (0, 2)), (jnp.sum, (1, 2))]:
        plan = select_channels(graph, params, {"a": 1 / 3}, importance=importance)
        assert plan.kept == {"a": {1: expected}, "b": {0: expected}, "c": {0: expected}}


def test_importances_by_hand():
    weights = np.array([[3.0, 4.0], [0.0, 1.0], [3.0, 1.0]], np.float32)
    np.testing.assert_allclose(l1(weights, 1), [7, 1, 4])
    np.testing.assert_allclose(channel_norm(weights, 1), [5, 1, np.sqrt(10)])
    np.testing.assert_allclose(jnp.sum(-weights, 1), [-7, -1, -4])
    a, b, c = np.sqrt(18), 3.0, 3.0  # between the first and second, first and third, second and third
    np.testing.assert_allclose(fpgm(weights, 1), [a + b, a + c, b + c])


def test_scores_take_the_place_of_parameters():
    graph, params = two_layers()
    scores = {name: jnp.zeros_like(leaf) for name, leaf in params.items()}
    scores["b"] = jnp.array([0.0, 2.0, -3.0, 1.0])
    plan = select_channels(graph, params, {"a": 0.5}, scores=scores)
    assert plan.kept["b"] == {0: (1, 3)}


@pytest.mark.slow
def test_parameters_without_a_score_count_for_nothing():
    """Activation norms: the bias multiplies no data; the consumer's inputs tell which channels are dead."""
    graph, params = two_layers()
    fn = lambda p, x: jnp.maximum(x @ p["a"] + p["b"][None], 0) @ p["c"] @ p["d"]  # noqa: E731
    params = {**params, "b": jnp.array([-99.0, 9.0, -99.0, 9.0])}
    found = jaxprune.scores.wanda(params, jaxprune.calibrate_norms(fn, params, [normal(5, 3)]))
    assert found["b"] is None
    only_inputs = {"c": found["c"], "d": found["d"]}
    assert select_channels(graph, params, {"a": 0.5}, scores=only_inputs).kept["b"] == {0: (1, 3)}


def test_among_equals_the_earlier_stay_and_nan_goes_first():
    graph, params = two_layers()
    same = {name: jnp.ones_like(leaf) for name, leaf in params.items()}
    assert select_channels(graph, same, 0.5).kept["b"] == {0: (0, 1)}
    assert select_channels(graph, {**same, "b": jnp.array([jnp.nan, 1, 1, 1])}, 0.5).kept["b"] == {0: (1, 2)}


def test_names_choose_groups():
    graph, params = two_layers()
    assert set(select_channels(graph, params, {"c[1]": 0.5}).kept) == {"c", "d"}
    assert set(select_channels(graph, params, {"a": 0.5}).kept) == {"a", "b", "c"}
    graph, params = graph_of("transformer")
    plan = select_channels(graph, params, {"_Transformer_1": 0.5})
    heads = "_Transformer_1/MultiHeadDotProductAttention_0/query/kernel"
    assert plan.shrunk_shape(heads) == (6, 1, 4)  # heads, not their dimensions
    assert not any(path.startswith("_Transformer_0") for path in plan.kept)
    exact = select_channels(graph, params, {heads.replace("query", "key") + "[2]": 0.5})
    assert exact.shrunk_shape(heads) == (6, 2, 2)


def test_one_factor_of_a_product_by_default():
    graph, params = graph_of("resnext")
    plan = select_channels(graph, params, 0.5)
    assert plan.shrunk_shape("Conv_0/kernel") == (3, 3, 1, 4)
    assert plan.shrunk_shape("Conv_1/kernel") == (3, 3, 2, 8)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 200), st.floats(0, 1, exclude_max=True), st.integers(1, 16), st.integers(1, 8), st.integers(1, 64)
)
def test_counts(size: int, sparsity: float, round_to: int, min_kept: int, span: int):
    group = ChannelGroup("g", size, (), (), span, None)
    count = kept_count(group, sparsity, round_to, min_kept)
    assert max(1, min(min_kept, size)) <= count <= size
    if round_to == 1 and min_kept == 1:
        assert count == max(1, size - int(np.floor(sparsity * size + 0.5)))
    step = round_to // np.gcd(round_to, span)
    if step <= size and count not in (size, min_kept):
        assert count * span % round_to == 0


def test_rounding_is_of_the_layers_width():
    graph, params = two_layers(width=32, inner=30)
    plan = select_channels(graph, params, 0.4, round_to=8)
    assert plan.shrunk_shape("c") == (16, 16)  # 19 and 18
    graph, params = graph_of("transformer")
    plan = select_channels(graph, params, 0.5, round_to=4)
    assert plan.shrunk_shape("_Transformer_0/MultiHeadDotProductAttention_0/key/kernel") == (4, 1, 4)


@pytest.mark.parametrize("cost", [count_macs, count_parameters])
@pytest.mark.parametrize("name", ["cnn_linen", "transformer", "densenet"])
def test_budgets_are_met_by_the_fewest(name: str, cost):
    graph, params = graph_of(name)
    plan = select_channels_globally(graph, params, 0.5 * cost(graph), cost=functools.partial(cost, graph))
    assert 0.35 * cost(graph) < cost(graph, plan) <= 0.5 * cost(graph)
    assert all(len(kept) >= 1 for axes in plan.kept.values() for kept in axes.values())


def test_uniform_sparsity_within_a_budget():
    graph, params = two_layers(width=64, inner=64)
    sparsity = sparsity_within(graph, 0.5 * count_macs(graph))
    assert count_macs(graph, select_channels(graph, params, sparsity)) <= 0.5 * count_macs(graph)
    assert count_macs(graph, select_channels(graph, params, sparsity - 0.02)) > 0.5 * count_macs(graph)


def test_costs_by_hand():
    graph, params = two_layers()
    plan = select_channels(graph, params, 0.5)
    assert count_parameters(graph) == 12 + 4 + 24 + 12
    assert count_parameters(graph, plan) == 6 + 2 + 6 + 6
    assert count_macs(graph) == 5 * (12 + 24 + 12)
    assert count_macs(graph, plan) == 5 * (6 + 6 + 6)
    graph, params = graph_of("cnn_linen")
    # Two images: 64 places of 9 x 1 x 6, 16 of 9 x 6 x 8, then 32 x 10 and 10 x 3.
    assert count_macs(graph) == 2 * (64 * 54 + 16 * 432 + 320 + 30)
    graph, _ = graph_of("mobilenet")
    # 36 places: 9 x 4; 4 x 8; depthwise 9 x 8; 8 x 4; and 4 x 3.
    assert count_macs(graph) == 2 * (36 * (36 + 32 + 72 + 32) + 12)


def test_a_module_is_named_with_dots_or_slashes():
    params = {"h.0.up.weight": jnp.eye(4), "h.0.down.weight": jnp.eye(4)}

    def fn(params, x):
        return jnp.tanh(x @ params["h.0.up.weight"].T) @ params["h.0.down.weight"].T

    graph = trace(fn, params, jnp.ones((2, 4)))
    for name in ("h.0.up", "h/0/up", "h.0.up.weight"):
        plan = select_channels(graph, params, {name: 0.5})
        assert plan.kept == {"h.0.up.weight": {0: (0, 1)}, "h.0.down.weight": {1: (0, 1)}}


def test_global_choice_goes_for_what_matters_least():
    graph, params = two_layers(width=8, inner=8)
    weak = {**params, "c": params["c"].at[:, :4].mul(1e-3), "d": params["d"].at[:4].mul(1e-3)}
    plan = select_channels_globally(graph, weak, 0.8 * count_macs(graph))
    assert plan.kept["d"][0] == tuple(range(8 - len(plan.kept["d"][0]), 8))
    assert "a" not in plan.kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 1.0}, r"k is the fraction .* below 1, not 1.0"),
        ({"k": {"x": 0.5}}, r"names 'x', which computes no channels; groups are a\[1\], c\[1\]\."),
        ({"k": {"a": -1}}, r"k\['a'\] .* not -1"),
        ({"round_to": 0}, r"round_to is a whole number, at least 1, not 0"),
        (
            {"importance": lambda weights, axis: weights},
            r"importance returned shape \(4, 10\) for 4 channels of a\[1\]",
        ),
        ({"scores": {"a": jnp.ones((3, 5))}}, r"scores has a of shape \(3, 5\); in the function it has shape \(3, 4\)"),
        (
            {"scores": {"x": jnp.ones(3)}},
            r"scores has x .*, which the function does not have; it has a, b, c, d",
        ),
        ({"scores": {"a": jnp.ones((3, 4))}}, r"scores has nothing for c\[1\]: no score for c, d"),
    ],
)
def test_what_is_refused(change: dict, message: str):
    graph, params = two_layers()
    with pytest.raises(ValueError, match=message):
        select_channels(graph, params, **{"k": 0.5, **change})


def test_nothing_to_cut_says_what_keeps_it():
    graph, params = graph_of("weird")
    with pytest.raises(ValueError, match=r"no channels that can be cut.*a\[1\]: reversed"):
        select_channels(graph, params, 0.5)


def test_budgets_out_of_reach():
    graph, params = two_layers()
    with pytest.raises(
        ValueError, match=r"budget of 2.4 cannot be met: at the least .* costs 30, uncut 240, .* no fraction"
    ):
        select_channels_globally(graph, params, 0.01 * count_macs(graph))
    with pytest.raises(ValueError, match=r"above 0, not -2"):
        sparsity_within(graph, -2)
    assert sparsity_within(graph, 240) == 0


def test_plans_are_plain_and_checked():
    graph, params = two_layers()
    plan = select_channels(graph, params, 0.5)
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(ValueError, match=r"keeps \[0, 4\] along axis 1 of a, of shape \(3, 4\)"):
        Plan({"a": {1: [0, 4]}}, {"a": (3, 4)})
    with pytest.raises(ValueError, match=r"keeps \[\] along axis 1"):
        Plan({"a": {1: []}}, {"a": (3, 4)})
    with pytest.raises(ValueError, match=r"cuts axis 2 of a, which has shape"):
        Plan({"a": {2: [0]}}, {"a": (3, 4)})
