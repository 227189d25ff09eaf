"""Smaller parameters, optimizer state and functions; what is refused."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxprune
from jaxprune import algebra
from jaxprune.structured import Graph, Plan, channel_masks, masked, rebuild, select_channels, shrink, trace, verify
from tests.support.structured_cases import CASES
from tests.support.structured_zoo import Case, normal


@functools.cache
def traced(name: str) -> tuple[Case, Graph, Plan]:
    case = CASES[name]()
    graph = trace(case.fn, case.params, *case.inputs, prunable_outputs=case.outputs)
    return case, graph, select_channels(graph, case.params, 0.5)


def test_shrunk_values_are_those_kept():
    case, _, plan = traced("cnn_linen")
    small = shrink(plan, case.params)
    kept = np.ix_(range(3), range(3), plan.kept["Conv_1/kernel"][2], plan.kept["Conv_1/kernel"][3])
    np.testing.assert_array_equal(small["Conv_1"]["kernel"], np.asarray(case.params["Conv_1"]["kernel"])[kept])
    assert small["Conv_1"]["kernel"].shape == plan.shrunk_shape("Conv_1/kernel") == (3, 3, 3, 4)
    assert jax.tree.structure(small) == jax.tree.structure(case.params)


def test_masks_keep_what_is_not_cut_along_any_axis():
    case, _, plan = traced("cnn_linen")
    masks = channel_masks(plan, case.params)
    kept = [int(mask.sum()) for mask in jax.tree.leaves(masks)]
    assert kept == [leaf.size for leaf in jax.tree.leaves(shrink(plan, case.params))]


OPTIMIZERS = {
    "adamw": optax.adamw(1e-2),
    "momentum": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-2, 0.9), optax.ema(0.9)),
    "multi": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_goes_on(name: str):
    """Steps of the smaller function with the smaller state are the masked one's steps, cut."""
    case, graph, plan = traced("mlp")
    tx, masks = OPTIMIZERS[name], channel_masks(plan, case.params)
    params = jaxprune.apply_masks(case.params, masks)
    masked_tx = optax.chain(tx, jaxprune.keep_pruned(masks))

    def steps(fn: Any, params: Any, tx: Any, state: Any, count: int) -> Any:
        for _ in range(count):
            grads = jax.grad(lambda p: jnp.square(fn(p, *case.inputs)).sum())(params)
            with jax.numpy_dtype_promotion("standard"):  # optax raises a float to its count, a whole number
                updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    params, state = steps(case.fn, params, masked_tx, masked_tx.init(params), 2)
    small, small_state = shrink(plan, params), shrink(plan, state[0])
    expected, _ = steps(case.fn, params, masked_tx, state, 2)
    found, _ = steps(rebuild(graph, plan), small, tx, small_state, 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, shrink(plan, expected))


def test_a_parameter_is_not_taken_for_one_whose_path_it_ends_with():
    """The inner kernel is frozen, the outer one of the same name is cut; so with the optimizer's state."""
    params = {"gate": {"dense": {"w": normal(16, 16)}}, "dense": {"w": normal(16, 8)}, "out": {"w": normal(8, 3)}}

    def fn(params: Any, x: Any) -> Any:
        x = x * jax.nn.sigmoid(x @ params["gate"]["dense"]["w"])
        return jax.nn.relu(x @ params["dense"]["w"]) @ params["out"]["w"]

    x = normal(5, 16)
    graph = trace(fn, params, x)
    plan = select_channels(graph, params, 0.5)
    assert set(plan.kept) == {"dense/w", "out/w"}
    for chosen in (plan, Plan.from_json(plan.to_json())):
        small = shrink(chosen, params)
        np.testing.assert_array_equal(small["gate"]["dense"]["w"], params["gate"]["dense"]["w"])
        state = shrink(chosen, optax.adam(1e-2).init(params))
        assert jax.tree.map(jnp.shape, state[0].mu) == jax.tree.map(jnp.shape, small)
    assert verify(graph, plan, params, x)


def test_random_keys_are_left_alone_and_compared():
    params = {"a": normal(3, 8), "b": normal(8, 2), "key": jax.random.key(3)}

    def fn(params: Any, x: Any) -> Any:
        key, used = jax.random.split(params["key"])
        return jnp.tanh(x @ params["a"]) @ params["b"] + jax.random.normal(used, (4, 2)), key

    x = normal(4, 3)
    graph = trace(fn, params, x)
    plan = select_channels(graph, params, 0.5)
    result = verify(graph, plan, params, x)
    assert result
    assert [output.difference for output in result.outputs][1] == 0
    assert shrink(plan, params)["key"] == params["key"]


def test_masks_count_in_every_member_and_have_the_traced_shapes():
    params = {"a": normal(3, 8), "b": normal(8), "c": normal(8, 2)}
    fn = lambda p, x: jax.nn.relu(x @ p["a"] + p["b"][None]) @ p["c"]  # noqa: E731
    x = normal(4, 3)
    graph = trace(fn, params, x)
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    masks["c"] = masks["c"].at[:3].set(False)
    expected = fn({**params, "c": params["c"].at[:3].set(0.0)}, x)
    np.testing.assert_allclose(masked(graph)(params, masks, x), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"function has a of shape \(3, 8\); in masks it has shape \(3, 9\)"):
        masked(graph)(params, {**masks, "a": jnp.ones((3, 9), bool)}, x)


def test_state_in_another_form_is_refused():
    case, _, plan = traced("mlp")
    params = {**case.params, "c": normal(8, 6)}
    state = {"v_row": {"c": jnp.zeros(8)}}
    with pytest.raises(ValueError, match=r"tree\['v_row'\]\['c'\] belongs to c of shape \(8, 6\) but has shape \(8,\)"):
        shrink(plan, state)
    with pytest.raises(ValueError, match=r"if it was cut before, cut the original"):
        shrink(plan, shrink(plan, params))
    with pytest.raises(ValueError, match=r"none of the parameters that the plan cuts"):
        shrink(plan, {"other": jnp.ones(3)})


def test_shapes_shrink_like_arrays():
    case, _, plan = traced("mlp")
    shapes = jax.eval_shape(lambda: case.params)
    small = shrink(plan, shapes)
    assert small == jax.eval_shape(lambda: shrink(plan, case.params))


class _Normed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.BatchNorm(use_running_average=True)(nn.Dense(8)(x))
        return nn.Dense(3)(nn.relu(x))


@functools.cache
def of_variables() -> tuple[Any, Graph, Plan]:
    """A plan for Linen's variables, whose optimizer knows the parameters alone."""
    variables = _Normed().init(jax.random.key(0), normal(4, 5))
    graph = trace(_Normed().apply, variables, normal(4, 5))
    return variables, graph, select_channels(graph, variables, 0.5)


def shapes_of(tree: Any) -> Any:
    return jax.tree.map(jnp.shape, tree)


STATES: dict[str, Any] = {
    "adamw": optax.adamw(1e-2),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-2, 0.9), optax.ema(0.9)),
    "partition": optax.partition(
        {"a": optax.adam(1e-2), "b": optax.sgd(0.1, 0.9)}, {"Dense_0": "a", "BatchNorm_0": "b", "Dense_1": "b"}
    ),
    "masked": optax.masked(optax.adam(1e-2), lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)),
}


@pytest.mark.parametrize("name", STATES)
def test_state_of_one_collection_is_cut_by_a_plan_for_all(name: str):
    variables, _, plan = of_variables()
    tx = STATES[name]
    small = shrink(plan, variables)
    assert shapes_of(shrink(plan, tx.init(variables["params"]))) == shapes_of(tx.init(small["params"]))
    assert small["params"]["Dense_0"]["kernel"].shape == (5, 4)


def test_collections_alone_are_cut_as_in_the_whole():
    variables, _, plan = of_variables()
    small = shrink(plan, variables)
    for name in ("params", "batch_stats"):
        jax.tree.map(np.testing.assert_array_equal, shrink(plan, variables[name]), small[name])
        masks = channel_masks(plan, variables[name])
        jax.tree.map(np.testing.assert_array_equal, masks, channel_masks(plan, variables)[name])
    # And the reverse: a plan for parameters alone.
    stats = variables["batch_stats"]
    inner = trace(
        lambda p, x: _Normed().apply({"params": p, "batch_stats": stats}, x), variables["params"], normal(4, 5)
    )
    alone = select_channels(inner, variables["params"], 0.5)
    assert set(alone.shapes) == {f"{name}/{leaf}" for name, known in variables["params"].items() for leaf in known}
    found, masks = shrink(alone, variables), channel_masks(alone, variables)
    jax.tree.map(np.testing.assert_array_equal, found["params"], shrink(alone, variables["params"]))
    jax.tree.map(np.testing.assert_array_equal, found["batch_stats"], stats)
    jax.tree.map(np.testing.assert_array_equal, masks["params"], channel_masks(alone, variables["params"]))
    assert all(mask.all() for mask in jax.tree.leaves(masks["batch_stats"]))


def test_masks_of_variables_keep_what_an_optimizer_of_parameters_prunes():
    variables, _, plan = of_variables()
    masks = channel_masks(plan, variables)
    tx = optax.chain(optax.sgd(0.1), jaxprune.keep_pruned(masks))
    params = jaxprune.apply_masks(variables["params"], masks)
    state = tx.init(params)
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
    params = optax.apply_updates(params, updates)
    held = jaxprune.masks_in(state)
    jax.tree.map(np.testing.assert_array_equal, held, masks["params"])
    algebra.require_pruned(params, held)
    # What the state holds is for the parameters; the other collections stay whole.
    found = jaxprune.apply_masks(variables, held)
    jax.tree.map(np.testing.assert_array_equal, found["params"], jaxprune.apply_masks(variables["params"], held))
    jax.tree.map(np.testing.assert_array_equal, found["batch_stats"], variables["batch_stats"])
    assert shapes_of(shrink(plan, state)) == shapes_of(tx.init(variables["params"])[:1]) + (
        jaxprune.transforms.KeepPrunedState(shapes_of(shrink(plan, variables["params"]))),
    )


def test_what_may_be_of_two_collections_is_refused():
    kept = {1: (0, 1)}
    towers = {name: {"w": normal(3, 8), "b": normal(8)} for name in ("left", "right")}
    plan = Plan({"left/w": kept}, {"left/w": (3, 8), "left/b": (8,), "right/w": (3, 8), "right/b": (8,)})
    state = optax.sgd(0.1, 0.9).init(towers["left"])
    with pytest.raises(ValueError, match=r"The tree at '0/trace/b' may be of left or right: .* as \{'left': tree\}"):
        shrink(plan, state)
    assert shrink(plan, {"left": towers["left"]})["left"]["w"].shape == (3, 2)
    with pytest.raises(ValueError, match=r"in each of \['left', 'right'\]; pass the one that is meant"):
        channel_masks(plan, towers["left"])
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), towers)
    with pytest.raises(ValueError, match=r"masks has the paths 'b'... in each of"):
        jaxprune.apply_masks(towers["left"], masks)
    with pytest.raises(ValueError, match=r"params has the paths 'b'... in each of"):
        jaxprune.apply_masks(towers, masks["left"])
    # Shapes tell them apart.
    apart = Plan({"left/w": kept}, {"left/w": (3, 8), "left/b": (8,), "right/w": (8, 3), "right/b": (3,)})
    assert shrink(apart, state)[0].trace["w"].shape == (3, 2)
    # What stands beside parameters of the plan is another layer, were it the same but for its name.
    layers = {"a": towers, "b": {**towers, "middle": towers["left"]}}
    found = shrink(Plan({"left/w": kept}, {"left/w": (3, 8), "left/b": (8,)}), layers)
    assert shapes_of(found["a"]["right"]) == shapes_of(towers["right"])
    assert shapes_of(found["b"]["middle"]) == shapes_of(towers["left"])
    assert found["b"]["left"]["w"].shape == (3, 2)
    # Part of a collection is none: another model's arrays of the same names stay.
    whole = Plan({"left/w": kept}, {"left/w": (3, 8), "left/b": (8,)})
    other = {"left": towers["left"], "other": {"w": normal(4, 4)}}
    assert shrink(whole, other)["other"]["w"].shape == (4, 4)


@pytest.mark.slow
def test_a_plan_moves_from_evaluation_to_training():
    case, graph, plan = traced("resnet_eval")
    train, train_graph, _ = traced("resnet_train")
    small = shrink(plan, case.params)
    outputs = rebuild(train_graph, plan)(small, *case.inputs)
    shapes = lambda tree: [leaf.shape for leaf in jax.tree.leaves(tree)]  # noqa: E731
    assert shapes(outputs["batch_stats"]) == shapes(small["batch_stats"])
    assert verify(train_graph, plan, train.params, *case.inputs).passed
    # What training returns goes back into evaluation.
    logits = rebuild(graph, plan)({**small, "batch_stats": outputs["batch_stats"]}, *case.inputs)
    assert logits.shape == (2, 3)


def test_new_masks_compile_nothing():
    case, graph, plan = traced("mlp")
    fn = masked(graph)
    other = select_channels(graph, case.params, 0.25)
    for chosen in (plan, other):
        fn(case.params, channel_masks(chosen, case.params), *case.inputs)
    assert fn._cache_size() == 1


def test_counts_of_a_norm_are_kept_or_rescaled():
    """A layer norm over channels: kept divides by their number before, rescaled by the number that stays."""
    params = {"a": normal(3, 8), "b": normal(8, 2)}

    def fn(params: Any, x: Any) -> Any:
        h = x @ params["a"]
        h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(jnp.square(h).mean(-1, keepdims=True))
        return h @ params["b"]

    x = normal(4, 3)
    graph = trace(fn, params, x)
    plan = select_channels(graph, params, 0.5)
    small = shrink(plan, params)
    np.testing.assert_allclose(rebuild(graph, plan, counts="rescaled")(small, x), fn(small, x), rtol=1e-4, atol=1e-6)
    h = np.asarray(x @ small["a"])
    kept = (h - h.sum(-1, keepdims=True) / 8) / np.sqrt(np.square(h).sum(-1, keepdims=True) / 8)
    np.testing.assert_allclose(rebuild(graph, plan)(small, x), kept @ np.asarray(small["b"]), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"counts is 'kept' or 'rescaled', not 'new'"):
        rebuild(graph, plan, counts="new")


def test_means_over_the_batch_follow_the_batch():
    params = {"a": normal(3, 8), "b": normal(8, 2)}
    fn = lambda p, x: (lambda h: h - h.mean(0, keepdims=True))(jnp.tanh(x @ p["a"])) @ p["b"]  # noqa: E731
    graph = trace(fn, params, normal(4, 3))
    plan = select_channels(graph, params, 0.5)
    x, small = normal(7, 3), shrink(plan, params)
    np.testing.assert_allclose(rebuild(graph, plan)(small, x), fn(small, x), atol=1e-6)
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = jax.eval_shape(lambda: small), jax.ShapeDtypeStruct((batch, 3), jnp.float32)
    found = jax.export.export(rebuild(graph, plan))(*shapes).call(small, x)
    np.testing.assert_allclose(found, fn(small, x), atol=1e-6)


@pytest.mark.slow
def test_verify_tells_where_masked_parameters_are_another_thing():
    case, graph, plan = traced("vgg_haiku")
    result = verify(graph, plan, case.params, *case.inputs)
    (output,) = result.outputs
    assert result
    assert output.difference < 1e-6 < 1e-2 < output.zeroed
    assert "equals the masked one" in str(result)
    strict = verify(graph, plan, case.params, *case.inputs, tolerance=0.0)
    assert strict.passed == (output.difference == 0)


def edited(plan: Plan, path: str, kept: dict[int, tuple[int, ...]], shape: Any = None) -> Plan:
    return Plan({**plan.kept, path: kept}, {**plan.shapes, path: shape or plan.shapes.get(path, (3, 8))})


@pytest.mark.parametrize(
    ("path", "kept", "shape", "message"),
    [
        ("other", {0: (0,)}, (4,), r"The plan has other of shape \(4,\), which the function does not have"),
        ("a", {1: (0, 1)}, (3, 9), r"plan has a of shape \(3, 9\); in the function it has shape \(3, 8\)"),
        ("b", {0: (0, 1)}, (8,), r"contradicts another axis"),
        ("a", {0: (0,), 1: (0, 1)}, (3, 8), r"cuts axis 0 of a, which must stay: an input|contradicts"),
        ("b", {}, (8,), r"does not cut axis 0 of b as it cuts what is coupled"),
    ],
)
def test_plans_that_do_not_fit(path: str, kept: dict, shape: Any, message: str):
    _, graph, plan = traced("mlp")
    with pytest.raises(ValueError, match=message):
        rebuild(graph, edited(plan, path, kept, shape))


def test_wrong_arguments_of_a_smaller_function():
    case, graph, plan = traced("mlp")
    small_fn, small = rebuild(graph, plan), shrink(plan, case.params)
    with pytest.raises(ValueError, match=r"function has a of shape \(3, 4\); in params it has shape \(3, 8\)"):
        small_fn(case.params, *case.inputs)
    with pytest.raises(ValueError, match=r"params has no entry for b"):
        small_fn({name: leaf for name, leaf in small.items() if name != "b"}, *case.inputs)
    with pytest.raises(
        ValueError, match=r"takes no inputs of shapes \(4, 5\); it was traced with \(4, 3\): dot_general"
    ):
        small_fn(small, normal(4, 5))
    with pytest.raises(ValueError, match=r"traced with inputs of structure"):
        small_fn(small, *case.inputs, *case.inputs)


def test_a_symbolic_batch_is_not_tied_nor_one():
    params = {"a": normal(3, 8), "b": normal(8, 2), "row": normal(4, 8)}
    fn = lambda p, x: (x @ p["a"] + p["row"][: len(x)]) @ p["b"]  # noqa: E731
    sizes = jax.export.symbolic_shape("batch, length")
    symbolic = [jax.ShapeDtypeStruct((n, 3), jnp.float32) for n in sizes]
    shapes = jax.eval_shape(lambda: params)
    for graph, message in [
        (trace(fn, params, normal(4, 3)), "tied to a parameter or a constant"),
        (trace(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, normal(1, 3)), "traced with a batch of 1"),
    ]:
        plan = select_channels(graph, params, 0.5)
        with pytest.raises(ValueError, match=message):
            jax.export.export(rebuild(graph, plan))(shrink(plan, shapes), symbolic[0])
    with pytest.raises(ValueError, match=r"\(4, batch\); .* \(1, 3\), of which the leading axis alone may be symbolic"):
        jax.export.export(rebuild(graph, plan))(shrink(plan, shapes), jax.ShapeDtypeStruct((4, sizes[0]), jnp.float32))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_parameters_are_cut_alike_and_their_masks_sharded_as_they_are(kind):
    rng = np.random.default_rng(0)
    params = {
        "up": jnp.asarray(rng.normal(size=(6, 24)), jnp.float32),
        "down": jnp.asarray(rng.normal(size=(24, 8)), jnp.float32),
    }
    plan = Plan(
        {"up": {1: tuple(range(0, 24, 2))}, "down": {0: tuple(range(0, 24, 2))}}, {"up": (6, 24), "down": (24, 8)}
    )
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    specs = {"up": PartitionSpec(None, "y"), "down": PartitionSpec("y", None)}
    sharded = {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in params.items()}
    chex.assert_trees_all_equal(shrink(plan, sharded), {"up": params["up"][:, ::2], "down": params["down"][::2]})
    masks = channel_masks(plan, sharded)
    chex.assert_trees_all_equal(masks, channel_masks(plan, params))
    assert {name: mask.sharding for name, mask in masks.items()} == {
        name: leaf.sharding for name, leaf in sharded.items()
    }
