"""Each layer of a scan keeps its own channels: against a loop of layers that are cut one by one."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxprune
from jaxprune._tree._paths import flatten
from jaxprune.structured import (
    Plan,
    channel_masks,
    combine,
    count_macs,
    count_parameters,
    group_lasso,
    masked,
    rebuild,
    recover,
    repair,
    select_channels,
    select_channels_globally,
    shrink,
    trace,
    verify,
)
from jaxprune.structured._plan import plan_of
from tests.support.promotion import standard_promotion as standard_promotion
from tests.support.structured_depth import close
from tests.support.structured_zoo import normal

LAYERS, WIDTH, INNER, HEADS = 3, 6, 8, 4
PARAMS = {
    "qk": normal(LAYERS, WIDTH, 2 * HEADS * 2) / 2,  # queries and keys side by side, heads of two dimensions
    "v": normal(LAYERS, WIDTH, HEADS, 2) / 2,
    "o": normal(LAYERS, HEADS * 2, WIDTH) / 2,
    "up": normal(WIDTH, LAYERS, INNER) / 2,  # layers are not first
    "bias": normal(LAYERS, INNER),
    "down": normal(LAYERS, INNER, WIDTH) / 2,
}
X = normal(20, WIDTH)


def layer(p: Any, x: Any) -> Any:
    q, k = jnp.split(x @ p["qk"], 2, 1)
    q, k = (y.reshape(len(x), -1, 2) for y in (q, k))
    weights = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k))
    x = x + jnp.einsum("hts,shd->thd", weights, jnp.einsum("ti,ihd->thd", x, p["v"])).reshape(len(x), -1) @ p["o"]
    return x + jnp.tanh(x @ p["up"] + p["bias"][None]) @ p["down"]


def scanned(params: Any, x: Any) -> Any:
    stacked = {**params, "up": jnp.moveaxis(params["up"], 1, 0)}
    return lax.scan(lambda x, p: (layer(p, x), None), x, stacked)[0]


def looped(params: Any, x: Any) -> Any:
    for number in range(LAYERS):
        x = layer(params[str(number)], x)
    return x


def unstacked(params: Any) -> Any:
    return {str(n): {name: leaf[:, n] if name == "up" else leaf[n] for name, leaf in params.items()} for n in range(LAYERS)}  # fmt: skip


GRAPH = trace(scanned, PARAMS, X)
INNERS, HEADED = (next(g for g in GRAPH.groups if g.size == size and not g.outer) for size in (INNER, HEADS))


def by_norms() -> Plan:
    return select_channels(GRAPH, PARAMS, {"up": 0.5, "v": 0.5})


def test_each_layer_chooses_for_itself():
    plan = by_norms()
    loop = trace(looped, unstacked(PARAMS), X)
    alone = select_channels(loop, unstacked(PARAMS), {"*/up": 0.5, "*/v": 0.5})
    for name, axes in plan.kept.items():
        for axis, rows in axes.items():
            of_layer = axis - (axis > plan.layers[name])
            assert [alone.kept[f"{n}/{name}"][of_layer] for n in range(LAYERS)] == list(rows)
    assert len(set(plan.kept["bias"][1])) > 1
    assert plan.layers == {"qk": 0, "v": 0, "o": 0, "up": 1, "bias": 0, "down": 0}
    small = shrink(plan, PARAMS)
    assert jax.tree.map(jnp.shape, unstacked(small)) == jax.tree.map(jnp.shape, shrink(alone, unstacked(PARAMS)))
    jax.tree.map(np.testing.assert_array_equal, unstacked(small), shrink(alone, unstacked(PARAMS)))
    assert count_macs(GRAPH, plan) == count_macs(loop, alone)
    assert count_parameters(GRAPH, plan) == count_parameters(loop, alone) == sum(x.size for x in jax.tree.leaves(small))


def test_shrunk_equals_masked():
    plan = by_norms()
    assert verify(GRAPH, plan, PARAMS, X)
    masks = channel_masks(plan, PARAMS)
    jax.tree.map(lambda m, s: np.testing.assert_equal(int(m.sum()), s.size), masks, shrink(plan, PARAMS))
    small = shrink(plan, PARAMS)
    close(rebuild(GRAPH, plan)(small, X), looped(unstacked(small), X))
    with jax.enable_x64(True):  # gradients through three layers round differently by version of XLA
        wide, x = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (PARAMS, X))
        graph = trace(scanned, wide, x)
        fn, small_fn = masked(graph), rebuild(graph, plan)
        loss = lambda y: jnp.sin(y).sum()  # noqa: E731
        expected = jax.jit(jax.grad(lambda p: loss(fn(p, masks, x))))(wide)
        found = jax.jit(jax.grad(lambda p: loss(small_fn(p, x))))(shrink(plan, wide))
        np.testing.assert_equal(found["up"].dtype, np.float64)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-12), found, shrink(plan, expected))


def test_plans_are_plain_and_checked():
    plan = by_norms()
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.shrunk_shape("up") == (WIDTH, LAYERS, INNER // 2)
    up = {"up": (2, 3, 4)}
    with pytest.raises(ValueError, match=r"in each of 2 layers; its axis of layers is 1"):
        Plan({"up": {2: ((0, 1), (1, 2))}}, up, layers={"up": 1})
    with pytest.raises(ValueError, match=r"in each of 3 layers; its axis of layers is None"):
        Plan({"up": {2: ((0,), (1,), (1,))}}, up)
    with pytest.raises(
        ValueError, match=r"keeps \[1, 2\] indices along axis 2 of up; layers of a stack keep equally many"
    ):
        Plan({"up": {2: ((0, 1), (1, 2), (3,))}}, up, layers={"up": 1})
    with pytest.raises(ValueError, match=r"keeps \[4\] along axis 2 of up"):
        Plan({"up": {2: ((0,), (1,), (4,))}}, up, layers={"up": 1})
    rows = plan.kept["down"]
    with pytest.raises(ValueError, match=r"does not cut axis 1 of bias as it cuts what is coupled with it"):
        rebuild(GRAPH, Plan({"down": rows}, plan.shapes, layers={"down": 0}))
    turned = {**plan.kept, "down": {1: rows[1][::-1]}}
    with pytest.raises(ValueError, match=r"does not cut axis 1 of down|contradicts another axis"):
        rebuild(GRAPH, Plan(turned, plan.shapes, layers=plan.layers))
    width = {"up": {0: ((0, 1),) * 3}}
    with pytest.raises(ValueError, match=r"differs between layers that have one choice"):
        rebuild(GRAPH, Plan(width, plan.shapes, layers={"up": 1}))


def test_one_choice_for_all_layers_is_a_plan_too():
    plan = plan_of(GRAPH, {INNERS.var: np.array([1, 4, 6]), HEADED.var: np.array([[0, 1], [1, 3], [0, 2]])})
    assert plan.kept["bias"] == {1: (1, 4, 6)}
    assert set(plan.layers) == {"qk", "v", "o"}
    assert verify(GRAPH, plan, PARAMS, X)


@pytest.mark.slow
def test_layers_go_together_with_channels():
    (block,) = GRAPH.blocks
    plan = combine(by_norms(), plan_of(GRAPH, {block.place: np.array([0, 2])}))
    assert verify(GRAPH, plan, PARAMS, X)
    small = shrink(plan, PARAMS)
    width = shrink(by_norms(), PARAMS)
    np.testing.assert_array_equal(small["up"], width["up"][:, jnp.array([0, 2])])
    np.testing.assert_array_equal(small["down"], width["down"][jnp.array([0, 2])])


def test_states_of_optimizers_are_cut_alike():
    plan, tx = by_norms(), optax.adam(1e-3)
    state = tx.update(jax.tree.map(jnp.sin, PARAMS), tx.init(PARAMS))[1]
    close(shrink(plan, state)[0].mu, shrink(plan, state[0].mu))
    assert shrink(plan, jax.eval_shape(lambda: PARAMS))["up"].shape == plan.shrunk_shape("up")


@pytest.mark.slow
def test_what_is_lost_is_of_each_layer():
    """The choice is that of a loop of the same layers, and what is left after repair is less than with one choice for all."""
    grams = jaxprune.calibrate_grams(scanned, PARAMS, [normal(200, WIDTH)])
    names = {"up": 0.5, "v": 0.5}
    plan = select_channels(GRAPH, PARAMS, names, grams=grams)
    loop_params = unstacked(PARAMS)
    loop = trace(looped, loop_params, X)
    loop_grams = jaxprune.calibrate_grams(looped, loop_params, [normal(200, WIDTH)])
    alone = select_channels(loop, loop_params, {f"*/{name}": k for name, k in names.items()}, grams=loop_grams)
    assert plan.kept["down"][1] == tuple(alone.kept[f"{n}/down"][0] for n in range(LAYERS))
    assert plan.kept["v"][2] == tuple(alone.kept[f"{n}/v"][1] for n in range(LAYERS))
    assert plan.to_repair == ("down", "o")
    small = shrink(plan, repair(plan, PARAMS, grams))
    for name, leaf in flatten(shrink(alone, repair(alone, loop_params, loop_grams)), "").by_path.items():
        np.testing.assert_allclose(flatten(unstacked(small), "").by_path[name], leaf, rtol=1e-2, atol=1e-3)
    budget = 0.8 * count_macs(GRAPH)
    globally = select_channels_globally(GRAPH, PARAMS, budget, among=("up", "v"), grams=grams)
    assert 0.7 * count_macs(GRAPH) < count_macs(GRAPH, globally) <= budget
    assert len(set(globally.kept["bias"][1])) > 1


def test_hyperparameters_are_recovered():
    def init(inner: int) -> Any:
        return {**PARAMS, "up": jnp.ones((WIDTH, LAYERS, inner)), "bias": jnp.ones((LAYERS, inner)), "down": jnp.ones((LAYERS, inner, WIDTH))}  # fmt: skip

    plan = select_channels(GRAPH, PARAMS, {"up": 0.25})
    assert recover(init, {"inner": INNER}, shrink(plan, PARAMS)) == {"inner": 6}


@pytest.mark.parametrize(
    "change",
    [
        lambda h, shared: h * shared["scale"],  # a parameter of all layers
        lambda h, shared: h * np.linspace(0.5, 1, INNER, dtype=np.float32)[None],  # a constant
        lambda h, shared: h * jnp.arange(INNER, dtype=h.dtype)[None],  # a constant that is made in the function
        lambda h, shared: h * jax.random.bernoulli(jax.random.key(0), 0.5, h.shape),  # and so are random bits
    ],
)
def test_what_all_layers_share_is_one_choice(change: Any):
    params = {"up": normal(3, 4, INNER), "down": normal(3, INNER, 4), "scale": normal(1, INNER)}

    def fn(params: Any, x: Any) -> Any:
        step = lambda x, p: (x + change(jnp.tanh(x @ p[0]), params) @ p[1], None)  # noqa: E731
        return lax.scan(step, x, (params["up"], params["down"]))[0]

    graph = trace(fn, params, normal(5, 4))
    (group,) = [group for group in graph.groups if group.size == INNER]
    assert group.layers is None
    plan = select_channels(graph, params, {group.name: 0.5})
    assert plan.layers == {}
    assert verify(graph, plan, params, normal(5, 4))


def test_the_graph_says_which_layers_choose():
    shown = " ".join(str(GRAPH).split())
    assert f"{INNER} in each of {LAYERS}" in shown


def test_carried_channels_are_one_choice():
    assert all(group.layers is None for group in GRAPH.groups if group.size == WIDTH)


def test_the_lasso_is_of_each_layers_channels():
    params = {
        "up": jnp.zeros((2, 1, 2)).at[0, 0, 0].set(3).at[1, 0, 1].set(2),
        "down": jnp.zeros((2, 2, 1)).at[0, 0, 0].set(4),
    }
    fn = lambda p, x: lax.scan(lambda x, w: (x + jnp.tanh(x @ w[0]) @ w[1], None), x, (p["up"], p["down"]))[0]  # noqa: E731
    graph = trace(fn, params, jnp.ones((3, 1)))
    np.testing.assert_allclose(group_lasso(graph, params), np.sqrt(2) * (5 + 2), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_meshes(kind: AxisType):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    specs = {"qk": (None, None, "model"), "v": (None, None, "model"), "o": (None, "model"), "up": (None, None, "model")}
    specs |= {"bias": (None, "model"), "down": (None, "model")}
    sharded = {name: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*specs[name]))) for name, leaf in PARAMS.items()}  # fmt: skip
    plan = by_norms()
    assert select_channels(GRAPH, sharded, {"up": 0.5, "v": 0.5}) == plan
    masks, small = channel_masks(plan, sharded), shrink(plan, sharded)
    jax.tree.map(np.testing.assert_array_equal, masks, channel_masks(plan, PARAMS))
    jax.tree.map(np.testing.assert_array_equal, small, shrink(plan, PARAMS))
    assert masks["up"].sharding == sharded["up"].sharding
    expected = rebuild(GRAPH, plan)(shrink(plan, PARAMS), X)
    close(rebuild(GRAPH, plan)(small, X), expected)
    close(masked(GRAPH)(sharded, masks, X), expected)
    np.testing.assert_allclose(group_lasso(GRAPH, sharded), group_lasso(GRAPH, PARAMS), rtol=1e-5)


@pytest.mark.parametrize("depths", [(2, 3), (3, 2), (3, 3)])
def test_scans_of_other_depths_keep_their_own(depths):
    stacks = [{"up": normal(n, WIDTH, INNER, salt=n), "down": normal(n, INNER, WIDTH, salt=9)} for n in depths]

    def step(x: Any, p: Any) -> Any:
        return x + jnp.tanh(x @ p["up"]) @ p["down"], None

    def fn(params: Any, x: Any) -> Any:
        for stack in params:
            x = lax.scan(step, x, stack)[0]
        return x

    graph = trace(fn, stacks, X)
    grams = jaxprune.calibrate_grams(fn, stacks, [X])
    plan = select_channels(graph, stacks, 0.5, grams=grams)
    assert [np.shape(plan.kept[f"{n}/up"][2]) for n in (0, 1)] == [(depth, INNER // 2) for depth in depths]
    params = repair(plan, stacks, grams)
    expected = X
    for n, (stack, depth) in enumerate(zip(params, depths, strict=True)):
        for number, kept in zip(range(depth), map(np.array, plan.kept[f"{n}/up"][2]), strict=True):
            h = jnp.tanh(expected @ stack["up"][number][:, kept])
            expected = expected + h @ stack["down"][number][kept]
    close(rebuild(graph, plan)(shrink(plan, params), X), expected)
    close(fn(jaxprune.apply_masks(params, channel_masks(plan, params)), X), expected)
    assert verify(graph, plan, params, X).passed
    assert Plan.from_json(plan.to_json()) == plan
