"""Networks without some layers and branches: against shallower networks; which ones go; plans of layers."""

import functools
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax

import jaxprune
from jaxprune.structured import (
    Plan,
    channel_masks,
    combine,
    count_macs,
    count_parameters,
    masked,
    rebuild,
    select_blocks,
    select_channels,
    shrink,
    trace,
    verify,
)
from jaxprune.structured._plan import plan_of

# Adam raises a float to the count of steps, which is a whole number.
from tests.support.promotion import standard_promotion as standard_promotion
from tests.support.slow import slow_but
from tests.support.structured_depth import (
    STACK,
    close,
    dropping,
    masked_function,
    mlp,
    mlp_without,
    one_each,
    residual,
    stack,
    traced,
)
from tests.support.structured_zoo import _Block, normal
from tests.support.structured_zoo_sequences import _Transformer

# ---- networks

NETWORKS = ["resnet_eval", "resnet_train", "mobilenet", "transformer", "transformer_scan", "llama", "vit", "mixer"]


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(["transformer"], NETWORKS))
def test_the_shallower_function_equals_the_masked_one(name: str):
    case, graph = traced(name)
    assert graph.blocks
    for plan in one_each(graph)[:2]:
        small = shrink(plan, case.params)
        assert count_parameters(graph, plan) == sum(leaf.size for leaf in jax.tree.leaves(small))
        assert count_macs(graph, plan) < count_macs(graph)
        found = rebuild(graph, plan)(small, *case.inputs)
        expected = masked_function(name)(case.params, channel_masks(plan, case.params), *case.inputs)
        if name == "resnet_train":
            expected = shrink(plan, expected)  # no statistics of a block that is not there
        close(found, expected)
    assert masked_function(name)._cache_size() == 1


def test_blocks_of_a_transformer():
    case, graph = traced("transformer")
    assert [(block.name, len(block.paths)) for block in graph.blocks] == [
        ("_Transformer_0", 2 + 8),  # a norm, four projections with biases
        ("_Transformer_0#2", 2 + 4),
        ("_Transformer_1", 2 + 8),
        ("_Transformer_1#2", 2 + 4),
    ]
    plan = dropping(graph, ["_Transformer_0", "_Transformer_0#2"])
    small = shrink(plan, case.params)
    assert jax.tree.leaves(small["_Transformer_0"]) == []

    @jax.jit
    def native(params: Any, tokens: Any) -> Any:
        x = nn.Embed(7, 6).apply({"params": params["Embed_0"]}, tokens) + params["pos"]
        x, _ = _Transformer().apply({"params": params["_Transformer_1"]}, x)
        x = nn.LayerNorm().apply({"params": params["LayerNorm_0"]}, x)
        return nn.Dense(7).apply({"params": params["Dense_0"]}, x)

    close(rebuild(graph, plan)(small, *case.inputs), native(small, *case.inputs), 1e-6)


@pytest.mark.slow
def test_scanned_layers_of_a_transformer():
    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            layers = nn.scan(nn.remat(_Transformer), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            x, _ = layers()(nn.Dense(6)(x), None)
            return nn.Dense(2)(x)

    case, graph = traced("transformer_scan")
    (block,) = graph.blocks
    assert (block.size, len(block.paths)) == (3, 16)
    plan = dropping(graph, (), {block.name: (0, 2)})
    small = shrink(plan, case.params)
    close(rebuild(graph, plan)(small, *case.inputs), jax.jit(Stack().apply)({"params": small}, *case.inputs), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_layers_with_dropout_keep_their_own_keys(make_key: Any):
    params = {"up": normal(4, 6, 8), "down": normal(4, 8, 6)}

    def layer(x: jax.Array, up: jax.Array, down: jax.Array, key: jax.Array) -> jax.Array:
        kept = jax.random.bernoulli(key, 0.5, (x.shape[0], up.shape[1]))
        return x + jnp.where(kept, jnp.tanh(x @ up), 0.0) @ down

    def fn(params: Any, x: jax.Array) -> jax.Array:
        keys = jax.random.split(make_key(3), 4)
        step = lambda x, xs: (layer(x, xs[0], xs[1], xs[2]), None)  # noqa: E731
        return lax.scan(step, x, (params["up"], params["down"], keys))[0]

    x = normal(5, 6)
    graph = trace(fn, params, x)
    (block,) = graph.blocks
    plan = plan_of(graph, {block.place: np.array([0, 2, 3])})
    expected = x
    for i, key in enumerate(jax.random.split(make_key(3), 4)):
        if i != 1:
            expected = layer(expected, params["up"][i], params["down"][i], key)
    close(rebuild(graph, plan)(shrink(plan, params), x), expected)
    assert verify(graph, combine(plan, select_channels(graph, params, 0.5)), params, x)


@pytest.mark.slow
def test_a_block_of_a_resnet():
    case, graph = traced("resnet_eval")
    plan = dropping(graph, ["params/_Block_0"])
    small = shrink(plan, case.params)

    @jax.jit
    def native(params: Any, x: Any) -> Any:
        under = lambda name: {key: params[key][name] for key in params if name in params[key]}  # noqa: E731
        x = nn.Conv(4, (3, 3), use_bias=False).apply(under("Conv_0"), x)
        x = nn.relu(nn.BatchNorm(use_running_average=True).apply(under("BatchNorm_0"), x))
        x = _Block(6, 2, False).apply(under("_Block_1"), x)
        return nn.Dense(3).apply(under("Dense_0"), x.mean((1, 2)))

    close(rebuild(graph, plan)(small, *case.inputs), native(small, *case.inputs), 1e-6)
    # The same plan in training: the statistics made in the block go with it, and what is returned goes on.
    train, train_graph = traced("resnet_train")
    outputs = rebuild(train_graph, plan)(small, *case.inputs)
    assert jax.tree.structure(outputs["batch_stats"]) == jax.tree.structure(small["batch_stats"])
    assert verify(train_graph, plan, train.params, *train.inputs).passed
    assert rebuild(graph, plan)({**small, "batch_stats": outputs["batch_stats"]}, *case.inputs).shape == (2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(["mixer"], ["resnet_train", "mixer", "transformer_scan"]))
def test_gradients_equal_those_of_the_masked_function(name: str):
    case, graph = traced(name)
    plan = one_each(graph)[0]
    masks, masked_fn, small_fn = channel_masks(plan, case.params), masked_function(name), rebuild(graph, plan)
    loss = lambda outputs: jnp.sin(2 * jax.tree.leaves(outputs)[-1]).sum()  # noqa: E731
    expected = jax.jit(jax.grad(lambda p: loss(masked_fn(p, masks, *case.inputs))))(case.params)
    found = jax.jit(jax.grad(lambda p: loss(small_fn(p, *case.inputs))))(shrink(plan, case.params))
    assert any(float(jnp.abs(leaf).max()) > 1e-3 for leaf in jax.tree.leaves(found))
    close(found, shrink(plan, expected))
    # What is dropped has no gradient.
    gone = jax.tree.map(lambda grad, mask: jnp.where(mask, 0, grad), expected, masks)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gone))


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(["transformer"], ["transformer", "transformer_scan", "resnet_eval"]))
def test_layers_and_channels_together(name: str):
    case, graph = traced(name)
    depth, width = one_each(graph)[-1], select_channels(graph, case.params, 0.5)
    plan = combine(width, depth)
    assert count_macs(graph, plan) < min(count_macs(graph, width), count_macs(graph, depth))
    assert combine(depth, width).dropped == plan.dropped
    assert not set(plan.kept) & set(plan.dropped)
    expected = masked_function(name)(case.params, channel_masks(plan, case.params), *case.inputs)
    close(rebuild(graph, plan)(shrink(plan, case.params), *case.inputs), expected)


def test_a_dropped_branch_does_not_say_which_channels_of_the_stream_stay():
    """The first parameter that has the stream's channels is one that is dropped, with masks that are all False."""
    params = {"branch": normal(4, 4) / 2, "in": normal(3, 4), "out": normal(4, 2)}
    fn = lambda p, x: residual(p["branch"], x @ p["in"]) @ p["out"]  # noqa: E731
    x = normal(5, 3)
    graph = trace(fn, params, x)
    (stream,) = graph.groups
    assert stream.members[0].path == "branch"
    plan = combine(plan_of(graph, {stream.var: np.array([0, 3])}), dropping(graph, ["branch"]))
    expected = x @ params["in"][:, jnp.array([0, 3])] @ params["out"][jnp.array([0, 3])]
    close(rebuild(graph, plan)(shrink(plan, params), x), expected, 1e-6)
    close(masked(graph)(params, channel_masks(plan, params), x), expected, 1e-6)


@pytest.mark.slow
def test_channels_after_layers():
    """The shallower function is a function like any other."""
    case, graph = traced("mixer")
    depth = one_each(graph)[0]
    small, small_fn = shrink(depth, case.params), rebuild(graph, depth)
    again = trace(small_fn, small, *case.inputs)
    assert [block.name for block in again.blocks] == ["Dense_3"]
    assert verify(again, select_channels(again, small, 0.5), small, *case.inputs).passed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transformer_scan", "resnet_eval"])
def test_export_with_a_symbolic_batch(name: str):
    case, graph = traced(name)
    plan = one_each(graph)[0]
    small_fn, small = rebuild(graph, plan), shrink(plan, case.params)
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in case.inputs]
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), small)
    text = jax.export.export(small_fn, platforms=("cpu", "cuda", "tpu"))(params, *shapes).serialize()
    close(jax.export.deserialize(text).call(small, *case.inputs), small_fn(small, *case.inputs), 1e-6)


# ---- trees of every kind


@pytest.mark.slow
def test_optimizer_state_goes_on():
    """Two steps of the smaller function are those of the masked one, cut; factored moments of what is dropped go too."""
    fn, params, x = mlp()
    params = {**params, "layers": STACK["layers"]}
    both = lambda p, x: lax.scan(lambda x, w: (residual(w, x), None), fn(p, x), p["layers"])[0]  # noqa: E731
    graph = trace(both, params, x)
    plan = dropping(graph, ["f"], {"layers": (1, 2, 3)})
    masks, masked_fn, small_fn = channel_masks(plan, params), masked(graph), rebuild(graph, plan)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))

    def steps(fn: Any, params: Any, state: Any, tx: Any) -> Any:
        def step(carry: Any, _: None) -> Any:
            params, state = carry
            grads = jax.grad(lambda p: jnp.square(fn(p, x)).sum())(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.jit(lambda carry: lax.scan(step, carry, length=2)[0])((params, state))

    kept = optax.chain(tx, jaxprune.keep_pruned(masks))
    params, (state, *rest) = steps(
        lambda p, x: masked_fn(p, masks, x), jaxprune.apply_masks(params, masks), kept.init(params), kept
    )
    small, small_state = shrink(plan, params), shrink(plan, state)
    assert jax.tree.structure(small_state) == jax.tree.structure(tx.init(small))
    expected, _ = steps(lambda p, x: masked_fn(p, masks, x), params, (state, *rest), kept)
    found, _ = steps(small_fn, small, small_state, tx)
    close(found, shrink(plan, expected))
    assert float(jnp.abs(found["in"] - small["in"]).max()) > 1e-3
    factored = optax.adafactor(1e-2, min_dim_size_to_factor=2)
    only = dropping(graph, ["f"])
    assert jax.tree.structure(shrink(only, factored.init(params))) == jax.tree.structure(
        factored.init(shrink(only, params))
    )


@pytest.mark.slow
def test_modules_of_frameworks():
    keys = jax.random.split(jax.random.key(0), 2)
    model = [eqx.nn.MLP(3, 3, 5, 1, key=key) for key in keys]
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def fn(params: Any, x: Any) -> Any:
        for layer in eqx.combine(params, static):
            x = x + jax.vmap(layer)(x)
        return x

    x = normal(4, 3)
    graph = trace(fn, params, x)
    assert [block.name for block in graph.blocks] == ["0/layers", "1/layers"]
    plan = dropping(graph, ["0/layers"])
    small = shrink(plan, params)
    assert small[0].layers[0].weight is None
    close(rebuild(graph, plan)(small, x), x + jax.vmap(model[1])(x), 1e-6)

    class Residual(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first, self.second = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = x + nnx.relu(self.first(x))
            return x + nnx.relu(self.second(x))

    module = Residual(nnx.Rngs(0))
    graphdef, state = nnx.split(module)
    graph = trace(lambda state, x: nnx.merge(graphdef, state)(x), state, x)
    plan = dropping(graph, ["first"])
    small = shrink(plan, state)
    assert len(jax.tree.leaves(small)) == 2
    close(rebuild(graph, plan)(small, x), x + nnx.relu(module.second(x)), 1e-6)


# ---- which go


def distance_from(target: jax.Array, x: jax.Array) -> Any:
    return lambda fn, params: jnp.square(fn(params, x) - target).mean()


def test_the_block_without_effect_is_the_first_to_go():
    _, params, x = mlp()
    params = {**params, "f": {**params["f"], "down": jnp.zeros((8, 4))}}
    fn = functools.partial(mlp_without, ())
    plan = select_blocks(trace(fn, params, x), params, 1, distance_from(fn(params, x), x))
    assert plan.dropped == ("f/bias", "f/down", "f/up")
    assert plan.kept == {}
    params = {**STACK, "layers": STACK["layers"].at[2].set(0)}
    x = normal(5, 3)
    plan = select_blocks(trace(stack, params, x), params, 1, distance_from(stack(params, x), x))
    assert (plan.kept, plan.dropped) == ({"layers": {0: (0, 1, 3)}}, ())


def test_the_choice_is_greedy_and_compiles_once():
    x = normal(5, 3)
    graph, target = trace(stack, STACK, x), stack(STACK, x)
    calls = []

    def loss(fn: Any, params: Any) -> Any:
        calls.append(1)
        return jnp.square(fn(params, x) - target).mean()

    def native(layers: list[int]) -> float:
        return float(jnp.square(stack({**STACK, "layers": STACK["layers"][jnp.array(layers)]}, x) - target).mean())

    left = [0, 1, 2, 3]
    for number in (1, 2, 3):
        left = min(([i for i in left if i != gone] for gone in left), key=native)
        plan = select_blocks(graph, STACK, number, loss)
        assert plan.kept == {"layers": {0: tuple(left)}}
        assert len(calls) == number  # one trace for each call of select_blocks, whatever the number


def test_all_branches_may_go_and_the_inner_ones_go_with_the_outer_one(capsys: pytest.CaptureFixture[str]):
    fn, params, x = mlp()
    graph = trace(fn, params, x)
    loss = distance_from(x @ params["in"], x)  # the target is the stream alone
    plan = select_blocks(graph, params, 2, loss, progress=True)
    assert "block 2 of 2" in capsys.readouterr().err
    assert set(plan.dropped) == {path for block in graph.blocks for path in block.paths}
    close(rebuild(graph, plan)(shrink(plan, params), x), x @ params["in"], 1e-6)
    with pytest.raises(ValueError, match=r"number is 3, but behind 2 nothing is left that can be dropped"):
        select_blocks(graph, params, 3, loss)


def test_what_cannot_be_selected():
    case, graph = traced("cnn_linen")
    with pytest.raises(ValueError, match=r"nothing that can be dropped: no scan .* and no sum x \+ f\(x\)"):
        select_blocks(graph, case.params, 1, lambda fn, params: 0.0)
    x = normal(5, 3)
    graph = trace(stack, STACK, x)
    for number in (0, 4, 1.5):
        with pytest.raises(ValueError, match=rf"number is how many blocks go, from 1 to 3 .*, not {number}"):
            select_blocks(graph, STACK, number, lambda fn, params: fn(params, x).sum())
    with pytest.raises(ValueError, match=r"loss is to return a scalar; it returned an array of shape \(5, 2\)"):
        select_blocks(graph, STACK, 1, lambda fn, params: fn(params, x))
    with pytest.raises(ValueError, match=r"With 0 of 2 blocks dropped, loss is finite for no choice"):
        select_blocks(graph, STACK, 2, lambda fn, params: jnp.log(-jnp.abs(fn(params, x)).sum()))
    with pytest.raises(ValueError, match=r"function has layers .*; in params it has shape \(3, 4, 4\)"):
        select_blocks(graph, {**STACK, "layers": normal(3, 4, 4)}, 1, lambda fn, params: fn(params, x).sum())


# ---- plans


def test_plans_are_text():
    _, graph = traced("transformer")
    plan = combine(dropping(graph, ["_Transformer_1"]), select_channels(graph, traced("transformer")[0].params, 0.5))
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json('{"parameters": {"up": {"shape": [3, 4], "kept": {"1": [0, 2]}}}}') == Plan(
        {"up": {1: (0, 2)}}, {"up": (3, 4)}
    )
    for text in ("kept", "[1]", '{"up": {}}'):
        with pytest.raises(
            ValueError, match=r"Plan.from_json reads what Plan.to_json wrote, a JSON object with parameters"
        ):
            Plan.from_json(text)


def test_plans_that_do_not_fit():
    fn, params, x = mlp()
    graph = trace(fn, params, x)
    shapes = dict(zip(graph.paths, graph.shapes, strict=True))
    with pytest.raises(ValueError, match=r"drops f/up, but no residual branch of which it drops all"):
        rebuild(graph, Plan({}, shapes, ("f/up",)))
    with pytest.raises(ValueError, match=r"has other of shape \(3,\), which the function does not have"):
        rebuild(graph, Plan({}, {"other": (3,)}, ("other",)))
    with pytest.raises(ValueError, match=r"The plan drops up, and says what it keeps of it"):
        Plan({"up": {0: (1,)}}, {"up": (3,)}, ("up",))
    with pytest.raises(ValueError, match=r"cuts up but does not say its shape"):
        Plan({}, {}, ("up",))
    plan = dropping(graph, ["f"])
    with pytest.raises(ValueError, match=r"params\['f'\]\['bias'\] has no counterpart in the traced function"):
        rebuild(graph, plan)(params, x)
    with pytest.raises(
        ValueError, match=r"tree\['f'\]\['up'\] belongs to f/up of shape \(4, 8\) but has shape \(2, 2\)"
    ):
        shrink(plan, {"f": {"up": jnp.ones((2, 2))}})
    with pytest.raises(ValueError, match=r"none of the parameters that the plan cuts"):
        shrink(plan, {"other": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"The plan has f/bias of shape .*, which params does not have"):
        channel_masks(plan, {"in": params["in"]})
    first, second = (Plan({"up": {0: kept}}, {"up": (3,)}) for kept in [(0, 1), (1, 2)])
    with pytest.raises(ValueError, match=r"The plans keep \(0, 1\) and \(1, 2\) along axis 0 of up"):
        combine(first, second)
    with pytest.raises(ValueError, match=r"The plans are for up of shapes \(3,\) and \(4,\)"):
        combine(first, Plan({"up": {0: (0,)}}, {"up": (4,)}))
    assert combine(first, first) == first
