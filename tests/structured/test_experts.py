"""Experts of mixtures: cut with the router's outputs, as if it never chose the others; what they add, measured; those that stay."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxprune import calibrate_grams, structured
from jaxprune.structured import Plan, expert_use, rebuild, select_channels, select_experts, shrink, trace, verify

TOKENS, WIDTH, EXPERTS, INNER, TAKEN = 24, 5, 6, 4, 2
RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


PARAMS = {
    "router": draw(WIDTH, EXPERTS),
    "up": draw(EXPERTS, WIDTH, INNER),
    "bias": draw(EXPERTS, INNER),
    "down": draw(EXPERTS, INNER, WIDTH),
}
X = draw(TOKENS, WIDTH)
AXES = {"router": 1, "up": 0, "bias": 0, "down": 0}
KEPT = (1, 3, 4)


def outputs(params, x):
    hidden = jnp.tanh(jnp.einsum("td,edf->tef", x, params["up"]) + params["bias"][None])
    return jnp.einsum("tef,efd->ted", hidden, params["down"])


def chosen(params, x, taken=TAKEN):
    """Weights of the best experts, which sum to 1, and the experts; as many as the router has outputs."""
    weights, experts = jax.lax.top_k(jax.nn.softmax(x @ params["router"]), taken)
    return weights / jnp.sum(weights, -1, keepdims=True), experts


def by_one_hot(params, x):
    weights, experts = chosen(params, x)
    routed = jnp.sum(jax.nn.one_hot(experts, params["router"].shape[1]) * weights[..., None], 1)
    return jnp.einsum("te,ted->td", routed, outputs(params, x))


def one_by_one(params, x):
    weights, experts = chosen(params, x)
    hot = [jax.nn.one_hot(experts[:, i], params["router"].shape[1]) * weights[:, i, None] for i in range(TAKEN)]
    return jnp.sum(sum(hot)[..., None] * outputs(params, x), 1)


def by_threshold(params, x):
    scores = jax.nn.softmax(x @ params["router"])
    least = jax.lax.top_k(scores, TAKEN)[0][:, -1:]
    routed = jnp.where(scores >= least, scores, 0)
    return jnp.einsum("te,ted->td", routed / jnp.sum(routed, -1, keepdims=True), outputs(params, x))


def fused(params, x):
    weights, experts = chosen(params, x)
    routed = jnp.sum(jax.nn.one_hot(experts, params["router"].shape[1]) * weights[..., None], 1)
    hidden = jnp.tanh(jnp.einsum("td,edf->tef", x, params["up"]) + params["bias"][None])
    return jnp.einsum("tef,efd,te->td", hidden, params["down"], routed)


def by_argmax(params, x):
    scores = jax.nn.softmax(x @ params["router"])
    hot = jax.nn.one_hot(jnp.argmax(scores, -1), params["router"].shape[1])
    return jnp.einsum("te,ted->td", hot * scores, outputs(params, x))


def dealt_out(params, x):
    """Rows in the order of their experts: what these make of them, and which token and which place of its choice each is of."""
    weights, experts = chosen(params, x)
    experts = experts.reshape(-1)
    order = jnp.argsort(experts)
    sizes = jnp.bincount(experts, length=params["router"].shape[1])
    inner = jax.lax.ragged_dot(x[order // TAKEN], params["up"], sizes) + params["bias"][experts[order]]
    return weights, jax.lax.ragged_dot(jnp.tanh(inner), params["down"], sizes), order


def by_sorting(params, x):
    weights, found, order = dealt_out(params, x)
    return jnp.sum(found[jnp.argsort(order)].reshape(len(x), TAKEN, -1) * weights[..., None], 1)


def by_product(params, x):
    weights, found, order = dealt_out(params, x)
    return jnp.einsum("tk,tkd->td", weights, found[jnp.argsort(order)].reshape(len(x), TAKEN, -1))


def by_adding(params, x):
    weights, found, order = dealt_out(params, x)
    return jnp.zeros_like(x).at[order // TAKEN].add(found * weights.reshape(-1)[order, None])


def by_lookup(params, x):
    """Each token with its experts' own weights, taken from the stack; the router's weights are looked up as well."""
    scores = jax.nn.softmax(x @ params["router"])
    experts = jax.lax.top_k(scores, TAKEN)[1]
    weights = jnp.take_along_axis(scores, experts, -1)
    hidden = jnp.tanh(jnp.einsum("td,tkdf->tkf", x, params["up"][experts]) + params["bias"][experts])
    return jnp.einsum("tk,tkf,tkfd->td", weights / weights.sum(-1, keepdims=True), hidden, params["down"][experts])


SORTED = [by_sorting, by_product, by_adding]
MIXTURES = [by_one_hot, one_by_one, by_threshold, fused, *SORTED]


def routed(params, x, allowed=None, taken=TAKEN, *, rescaled=True):
    """The router's weights in NumPy, ``[tokens, experts]``; it chooses among those allowed."""
    logits = np.float64(x) @ np.float64(params["router"])
    if allowed is not None:
        logits = np.where(np.isin(np.arange(EXPERTS), allowed), logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    for row in weights:
        row[np.argsort(-row)[taken:]] = 0
    return weights / weights.sum(-1, keepdims=True) if rescaled else weights


def added(params, x, weights):
    """What each expert adds in NumPy, ``[tokens, experts, width]``."""
    inner = np.einsum("td,edf->tef", np.float64(x), np.float64(params["up"])) + np.float64(params["bias"])
    return weights[..., None] * np.einsum("tef,efd->ted", np.tanh(inner), np.float64(params["down"]))


def plan_of(kept):
    shapes = {path: leaf.shape for path, leaf in PARAMS.items()}
    return Plan({path: {axis: kept} for path, axis in AXES.items()}, shapes)


@pytest.mark.parametrize("mixture", [*MIXTURES, by_lookup, by_argmax], ids=lambda mixture: mixture.__name__)
def test_the_smaller_mixture_is_that_whose_router_never_chooses_the_others(mixture):
    graph = trace(mixture, PARAMS, X)
    group = graph.group("router[1]")
    assert {member.path: member.axis for member in group.members} == AXES
    once = mixture is by_argmax
    assert group.least == (1 if once else TAKEN)
    plan = plan_of(KEPT)
    small = shrink(plan, PARAMS)
    expected = added(PARAMS, X, routed(PARAMS, X, KEPT, 1 if once else TAKEN, rescaled=not once)).sum(1)
    np.testing.assert_allclose(rebuild(graph, plan)(small, X), expected, atol=2e-5)
    np.testing.assert_allclose(
        mixture(small, X), expected, atol=2e-5
    )  # the function as it is written, at the smaller size
    result = verify(graph, plan, PARAMS, X)
    assert result.passed
    assert result.outputs[0].zeroed > 0.1  # zeros alone do not keep a router from choosing


def numbered(params, x):
    """Besides, a number of the experts that were chosen, in which each counts as it did: old numbers, cut like a constant."""
    hot = jax.nn.one_hot(chosen(params, x)[1], EXPERTS)
    return by_one_hot(params, x), jnp.sum(hot * jnp.arange(EXPERTS, dtype=jnp.float32)[None, None])


def shared(params, x):
    """The same, but that the numbers are those that are compared as well."""
    numbers = jnp.arange(EXPERTS)[None, None]
    hot = chosen(params, x)[1][..., None] == numbers
    return by_one_hot(params, x), jnp.sum(hot.astype(jnp.int32) * numbers)


def test_other_numbers_are_those_of_before():
    graph = trace(numbered, PARAMS, X)
    assert verify(graph, plan_of(KEPT), PARAMS, X).passed
    assert int(rebuild(graph, plan_of(KEPT))(shrink(plan_of(KEPT), PARAMS), X)[1]) == int(
        (np.arange(EXPERTS) * (routed(PARAMS, X, KEPT) > 0)).sum()
    )


def counts_by_one_hot(params, experts):
    return jnp.sum(jax.nn.one_hot(experts, params["router"].shape[1], dtype=jnp.int32), 0)


def counts_by_adding(params, experts):
    return jnp.zeros(params["router"].shape[1], jnp.int32).at[experts].add(1)


def counts_by_segment(params, experts):
    return jax.ops.segment_sum(jnp.ones_like(experts), experts, params["router"].shape[1])


def sorted_by(counts, params, x):
    """A mixture in which `counts` counts the tokens of each expert."""
    weights, experts = chosen(params, x, 1)
    experts = experts[:, 0]
    order = jnp.argsort(experts)
    inner = jax.lax.ragged_dot(x[order], params["up"], counts(params, experts)) + params["bias"][experts[order]]
    found = jax.lax.ragged_dot(jnp.tanh(inner), params["down"], counts(params, experts))
    return jnp.zeros_like(x).at[order].add(found * weights[order])


@pytest.mark.parametrize("counts", [counts_by_one_hot, counts_by_adding, counts_by_segment])
def test_tokens_of_experts_are_counted_in_several_ways(counts):
    mixture = functools.partial(sorted_by, counts)
    graph = trace(mixture, PARAMS, X)
    plan = plan_of(KEPT)
    assert verify(graph, plan, PARAMS, X).passed
    expected = added(PARAMS, X, routed(PARAMS, X, KEPT, 1)).sum(1)
    np.testing.assert_allclose(mixture(shrink(plan, PARAMS), X), expected, atol=2e-5)
    norms = np.linalg.norm(added(PARAMS, X, routed(PARAMS, X, taken=1)), axis=-1).sum(0)
    np.testing.assert_allclose(expert_use(graph, PARAMS, [X])["router[1]"].added, norms, rtol=1e-4)


def test_counts_that_a_scan_carries_need_not_be_zero():
    def deep(params, x):
        def step(carry, layer):
            x, counts = carry
            return (x + sorted_by(lambda _, experts: counts.at[experts].add(1), layer, x), counts + 1), None

        return jax.lax.scan(step, (x, jnp.zeros(EXPERTS, jnp.int32)), params)[0][0]

    graph = trace(deep, jax.tree.map(lambda leaf: np.stack([leaf, -leaf]), PARAMS), X)
    assert {(axis.path, axis.axis) for axis in graph.frozen} >= {("up", 1), ("down", 1)}


def test_channels_inside_of_experts_that_rows_are_dealt_out_to():
    graph = trace(by_sorting, PARAMS, X)
    kept = (0, 2, 3)
    shapes = {path: leaf.shape for path, leaf in PARAMS.items()}
    plan = Plan({"up": {2: kept}, "bias": {1: kept}, "down": {1: kept}}, shapes)
    assert verify(graph, plan, PARAMS, X).passed
    small = shrink(plan, PARAMS)
    expected = added(small, X, routed(PARAMS, X)).sum(1)
    np.testing.assert_allclose(by_sorting(small, X), expected, atol=2e-5)
    # A row is multiplied by the kernels of one expert: with so many rows that is what is counted.
    rows = TOKENS * TAKEN
    assert structured.count_macs(graph) == TOKENS * WIDTH * EXPERTS + rows * 2 * WIDTH * INNER
    exact = PARAMS | {"up": PARAMS["up"].copy(), "bias": PARAMS["bias"].copy()}
    exact["up"][..., 1], exact["bias"][..., 1] = exact["up"][..., 0], exact["bias"][..., 0]
    repaired = structured.repair(plan, exact, calibrate_grams(by_sorting, exact, [X]))
    np.testing.assert_allclose(
        by_sorting(shrink(plan, repaired), X), by_sorting(exact, X), atol=1e-3
    )  # a channel that is the same as another can be made up for


@pytest.mark.parametrize(
    "counts",
    [
        lambda params, experts: jnp.full(EXPERTS, 4),
        lambda params, experts: jnp.ones(EXPERTS, jnp.int32).at[experts].add(1),
        lambda params, experts: jnp.bincount(experts + 1, length=EXPERTS),
        lambda params, experts: jnp.bincount((experts + 1)[jnp.argsort(experts)], length=EXPERTS),
        lambda params, experts: jnp.zeros(EXPERTS, jnp.int32).at[experts - 1].add(1),
        lambda params, experts: jnp.roll(counts_by_one_hot(params, experts), 1),
        lambda params, experts: jnp.zeros(EXPERTS, jnp.int32).at[experts].set(4),
    ],
    ids=["fixed", "from one", "of others", "of others in order", "from the end", "of neighbours", "set"],
)
def test_experts_stay_where_tokens_may_be_dealt_out_to_others(counts):
    graph = trace(functools.partial(sorted_by, counts), PARAMS, X)
    assert {(axis.path, axis.axis) for axis in graph.frozen} >= {("up", 0), ("down", 0)}
    # What else is chosen among can go: rows come in the order of their experts, whatever the numbers of these are.
    for group in graph.groups:
        members = {member.path: {member.axis: KEPT[: group.size // 2]} for member in group.members}
        assert verify(graph, Plan(members, graph.by_path), PARAMS, X).passed


@pytest.mark.parametrize(
    ("use", "reason"),
    [
        (lambda params, x: chosen(params, x)[1], "top_k numbers its elements"),
        (lambda params, x: jax.nn.one_hot((chosen(params, x)[1] + 1) % EXPERTS, EXPERTS).sum(), "top_k numbers"),
        (lambda params, x: jax.nn.one_hot(chosen(params, x)[1], EXPERTS + 1).sum(), "top_k numbers"),
        (lambda params, x: jnp.sum(chosen(params, x)[1] == 2), "top_k numbers"),
        (
            lambda params, x: jax.nn.one_hot(chosen(params, x)[1].astype(jnp.int2).astype(jnp.int32), EXPERTS).sum(),
            "top_k numbers",
        ),
        (lambda params, x: shared(params, x)[1], "chosen by their number"),
        (lambda params, x: params["bias"][chosen(params, x)[1] - 1].sum(), "top_k numbers"),
        (lambda params, x: jnp.ones(9)[chosen(params, x)[1]].sum(), "top_k numbers"),
        (lambda params, x: jnp.where(chosen(params, x)[1] < 1, 1, chosen(params, x)[1] + 1).sum(), "top_k numbers"),
        (lambda params, x: jnp.maximum(chosen(params, x)[1], 2).sum(), "top_k numbers"),
        (lambda params, x: jnp.sort(chosen(params, x)[1]), "top_k numbers"),
        (lambda params, x: jnp.take(chosen(params, x)[1], jnp.arange(99), axis=0).sum(), "top_k numbers"),
        (
            lambda params, x: jax.lax.cond(x[0, 0] > 0, lambda i: i, lambda i: i + 1, chosen(params, x)[1]).sum(),
            "top_k",
        ),
        (lambda params, x: jax.lax.fori_loop(0, 2, lambda _, i: i, chosen(params, x)[1]).sum(), "top_k numbers"),
        (lambda params, x: jax.checkpoint(lambda: chosen(params, x)[1])().sum(), "top_k numbers"),
        (lambda params, x: jnp.sum(jnp.argmax(x @ params["router"], -1)), "argmax numbers its elements"),
        (lambda params, x: jax.nn.one_hot(jnp.argmax(x @ params["router"] > 0, -1), EXPERTS).sum(), "argmax numbers"),
        (lambda params, x: jnp.sort(jax.nn.softmax(x @ params["router"])).sum(), "sort runs along it"),
    ],
    ids=[
        "returned",
        "shifted",
        "more",
        "compared",
        "rounded",
        "shared",
        "neighbours",
        "in more",
        "below one",
        "at least",
        "sorted and returned",
        "filled",
        "branch",
        "loop",
        "remat",
        "argmax",
        "signs",
        "sorted",
    ],
)
def test_experts_stay_where_numbers_do_more_than_choose(use, reason):
    graph = trace(lambda params, x: (by_one_hot(params, x), use(params, x)), PARAMS, X)
    (router,) = (axis for axis in graph.frozen if (axis.path, axis.axis) == ("router", 1))
    assert reason in router.reasons[0]
    with pytest.raises(ValueError, match="chooses among no channels that can be cut"):
        select_experts(graph, {}, 0.5)


@pytest.mark.parametrize("mixture", [by_one_hot, by_sorting, by_adding], ids=lambda mixture: mixture.__name__)
def test_each_layer_of_a_scan_keeps_its_own(mixture):
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, leaf[..., ::-1], -leaf]), PARAMS)

    def deep(params, x):
        return jax.lax.scan(lambda x, layer: (x + mixture(layer, x), None), x, params)[0]

    graph = trace(deep, stacked, X)
    (name,) = (group.name for group in graph.groups if group.least == TAKEN)
    use = expert_use(graph, stacked, [X])[name]
    plan = select_experts(graph, {name: use.reap}, 0.5)
    kept = plan.kept["router"][2]
    assert np.shape(kept) == (3, 3)
    assert len(set(kept)) > 1
    assert plan.kept["down"][1] == kept
    assert verify(graph, plan, stacked, X).passed
    x, y = np.float64(X), np.float64(X)
    for layer, stays in enumerate(kept):
        params = jax.tree.map(lambda leaf: leaf[layer], stacked)
        each = np.linalg.norm(added(params, x, routed(params, x)), axis=-1)
        np.testing.assert_allclose(use.added[layer], each.sum(0), rtol=1e-4)
        x = x + added(params, x, routed(params, x)).sum(1)
        y = y + added(params, y, routed(params, y, stays)).sum(1)
    np.testing.assert_allclose(rebuild(graph, plan)(shrink(plan, stacked), X), y, atol=1e-4)


@pytest.mark.parametrize(
    ("mixture", "wrapped"),
    [*((mixture, lambda f: f) for mixture in MIXTURES), (by_one_hot, jax.checkpoint), (fused, jax.jit)],
    ids=[*(mixture.__name__ for mixture in MIXTURES), "checkpoint", "jit"],
)
def test_what_experts_add_is_that_of_the_paper(mixture, wrapped):
    batches = [X, X[:10] * 2, X[:3] - 1]
    graph = trace(wrapped(mixture), PARAMS, X)
    use = expert_use(graph, PARAMS, batches)["router[1]"]
    tokens, norms = np.zeros(EXPERTS), np.zeros(EXPERTS)
    for x in batches:
        weights = routed(PARAMS, x)
        tokens += (weights > 0).sum(0)
        norms += np.linalg.norm(added(PARAMS, x, weights), axis=-1).sum(0)
    np.testing.assert_array_equal(use.tokens, tokens)
    assert use.tokens.sum() == 37 * TAKEN
    np.testing.assert_allclose(use.added, norms, rtol=1e-4)
    np.testing.assert_allclose(use.reap, norms / tokens, rtol=1e-4)


def test_sequences_and_half_precision():
    x = jnp.asarray(X, jnp.bfloat16).reshape(3, 8, WIDTH)
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), PARAMS)
    flattened = lambda params, x: by_one_hot(params, x.reshape(-1, WIDTH)).reshape(x.shape)  # noqa: E731
    mapped = lambda params, x: jax.vmap(functools.partial(by_one_hot, params))(x)  # noqa: E731
    dealt = lambda params, x: by_adding(params, x.reshape(-1, WIDTH)).reshape(x.shape)  # noqa: E731
    for mixture in (flattened, mapped, dealt):
        with jax.numpy_dtype_promotion("standard"):
            graph = trace(mixture, params, x)
            use = expert_use(graph, params, [x])["router[1]"]
        assert use.added.dtype == np.float32
        assert use.tokens.sum() == TOKENS * TAKEN
        weights = routed(PARAMS, X)
        norms = np.linalg.norm(added(PARAMS, X, weights), axis=-1).sum(0)
        np.testing.assert_allclose(use.added, norms, rtol=0.2)


def test_an_expert_that_no_token_is_sent_to_has_nothing():
    lonely = PARAMS | {"router": np.concatenate([PARAMS["router"][:, 1:], np.zeros((WIDTH, 1), np.float32)], 1)}
    graph = trace(by_one_hot, PARAMS, X)
    use = expert_use(graph, lonely, [np.abs(X) * 0 + 1e-3 * X])["router[1]"]
    assert np.isfinite(use.reap).all()
    assert ((use.tokens == 0) == (use.reap == 0)).all()


def test_the_largest_scores_stay_and_counts_are_exact():
    graph = trace(by_one_hot, PARAMS, X)
    scores = {"router[1]": np.array([3.0, 1.0, 1.0, 9.0, 1.0, 2.0])}
    for k, kept in ((0.0, None), (0.1, (0, 1, 2, 3, 5)), (0.5, (0, 3, 5)), (0.66, (0, 3))):
        plan = select_experts(graph, scores, k)
        assert plan.kept.get("down", {}).get(0) == kept
    assert select_experts(graph, scores, {"router[1]": 0.5}, round_to=2).kept["up"][0] == (0, 1, 3, 5)
    assert select_experts(graph, {}, 0.5).kept == {}
    # Of all channels alike, as many experts stay as are taken.
    assert len(select_channels(graph, PARAMS, 0.9).kept["up"][0]) == TAKEN


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_experts_on_eight_devices(kind):
    mesh = jax.make_mesh((4, 2), ("data", "expert"), axis_types=(kind, kind))
    specs = {"router": P(None, "expert"), "up": P("expert"), "bias": P("expert"), "down": P("expert")}
    params = jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), PARAMS, specs)
    graph = trace(by_one_hot, PARAMS, X)
    expected = expert_use(graph, PARAMS, [X])
    with jax.set_mesh(mesh):
        found = expert_use(graph, params, [jax.device_put(X, NamedSharding(mesh, P("data")))])
        small = shrink(plan_of((1, 2, 3, 4)), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)
    jax.tree.map(np.testing.assert_array_equal, small, shrink(plan_of((1, 2, 3, 4)), PARAMS))


def twice(params, x):
    return by_one_hot(params, x) + by_one_hot(params, 2 * x)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda graph: select_experts(graph, {"router[1]": np.arange(6.0)}, 0.9), ValueError, "Of the 6 experts of router.* 1 would stay.*chooses 2"),
        (lambda graph: rebuild(graph, plan_of((2,))), ValueError, r"Of router\[1\] 1 would stay, but top_k takes 2"),
        (lambda graph: select_experts(graph, {"up[2]": np.arange(4.0)}, 0.5), ValueError, r"'up\[2\]', which is no mixture"),
        (lambda graph: select_experts(graph, {"router[1]": np.arange(5.0)}, 0.5), ValueError, r"\[6\]; got \[5\]"),
        (lambda graph: select_experts(graph, {"router[1]": np.full(6, np.nan)}, 0.5), ValueError, "or NaN"),
        (lambda graph: select_experts(graph, {"router[1]": np.arange(6.0)}, 50), ValueError, "50 % is 0.5"),
        (lambda graph: select_experts(graph, {"router[1]": np.arange(6.0)}, 0.5, round_to=0), ValueError, "round_to"),
        (lambda graph: expert_use(graph, PARAMS, {"x": X}), TypeError, "not several batches"),
        (lambda graph: expert_use(graph, PARAMS, []), ValueError, "There is no batch"),
        (lambda graph: expert_use(trace(twice, PARAMS, X), PARAMS, [X]), ValueError, r"router\[1\] are summed at 2 places"),
        (lambda graph: expert_use(PARAMS, PARAMS, [X]), TypeError, "graph = trace"),
        (lambda graph: expert_use(trace(lambda p, x: x @ p, np.ones((5, 3)), X), np.ones((5, 3)), [X]), ValueError, "chooses among no"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(trace(by_one_hot, PARAMS, X))


def test_the_graph_says_how_many_must_stay():
    assert {group.name: group.least for group in structured.trace(by_one_hot, PARAMS, X).groups} == {
        "router[1]": 2,
        "up[2]": 1,
    }
