"""A decoder with a cache of keys and values: cut with its heads, step by step against the masked one and by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune.structured import (
    Graph,
    Plan,
    channel_masks,
    combine,
    masked,
    rebuild,
    select_blocks,
    select_channels,
    shrink,
    trace,
    verify,
    verify_module,
    with_inputs,
)
from jaxprune.structured._plan import plan_of
from tests.support.promotion import standard_promotion as standard_promotion
from tests.support.structured_depth import close, dropping
from tests.support.structured_zoo import normal

LAYERS, WIDTH, HEADS, SIZE, INNER, WORDS = 3, 6, 4, 2, 8, 11
BATCH, LENGTH = 2, 5


def layer(p: Any, x: Any, position: Any, cache: Any) -> Any:
    """Attention over a cache {keys, values} [batch, length, heads, size], and a perceptron."""
    new = {name: jnp.einsum("bi,ihd->bhd", x, p[name])[:, None] for name in ("k", "v")}
    cache = {name: lax.dynamic_update_slice_in_dim(cache[name], new[name], position, 1) for name in ("k", "v")}
    seen = jnp.arange(cache["k"].shape[1]) <= position
    scores = jnp.einsum("bi,ihd,bthd->bht", x, p["q"], cache["k"])
    weights = jax.nn.softmax(jnp.where(seen[None, None], scores, -1e9))
    x = x + jnp.einsum("bht,bthd,hdo->bo", weights, cache["v"], p["o"])
    return x + jnp.tanh(x @ p["up"]) @ p["down"], cache


def looped(params: Any, token: Any, position: Any, caches: Any) -> Any:
    x, found = params["table"][token], []
    for p, cache in zip(params["layers"], caches, strict=True):
        x, cache = layer(p, x, position, cache)
        found.append(cache)
    return x @ params["table"].T, found


def scanned(params: Any, token: Any, position: Any, caches: Any) -> Any:
    x, caches = lax.scan(
        lambda x, p: layer(p[0], x, position, p[1]), params["table"][token], (params["layers"], caches)
    )
    return x @ params["table"].T, caches


def stack(trees: Any) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def empty(batch: int = BATCH, length: int = LENGTH, heads: int = HEADS) -> list[Any]:
    return [{name: jnp.zeros((batch, length, heads, SIZE)) for name in ("k", "v")} for _ in range(LAYERS)]


SHAPES = {"q": (WIDTH, HEADS, SIZE), "k": (WIDTH, HEADS, SIZE), "v": (WIDTH, HEADS, SIZE), "o": (HEADS, SIZE, WIDTH)}
SHAPES |= {"up": (WIDTH, INNER), "down": (INNER, WIDTH)}
LOOP = {
    "table": normal(WORDS, WIDTH),
    "layers": [{name: normal(*shape, salt=n) / 2 for name, shape in SHAPES.items()} for n in range(LAYERS)],
}
SCAN = {**LOOP, "layers": stack(LOOP["layers"])}
STEPS = [jnp.array([n, 3 * n + 1], jnp.int32) for n in range(3)]


def traced(fn: Any, params: Any, caches: Any) -> Graph:
    caches_alone = {"prunable_inputs": lambda path: path.startswith("2/"), "prunable_outputs": lambda path: path != "0"}
    return trace(fn, params, STEPS[0], jnp.int32(0), caches, **caches_alone)


GRAPHS = {"loop": traced(looped, LOOP, empty()), "scan": traced(scanned, SCAN, stack(empty()))}
CASES = {"loop": (looped, LOOP, empty()), "scan": (scanned, SCAN, stack(empty()))}
HEADS_GONE = {"loop": {"layers/*/v": 0.5}, "scan": {"layers/v": 0.5}}
CHANNELS = {"loop": {"layers/*/v": 0.5, "layers/*/up": 0.25}, "scan": {"layers/v": 0.5, "layers/up": 0.25}}


def plan_for(kind: str) -> Plan:
    return select_channels(GRAPHS[kind], CASES[kind][1], CHANNELS[kind])


def steps_are_equal(kind: str, plan: Plan, caches: Any) -> Any:
    """Decode token after token, masked and cut; return the caches of the latter."""
    graph, params = GRAPHS[kind], CASES[kind][1]
    small, masks, small_fn, masked_fn = (
        shrink(plan, params),
        channel_masks(plan, params),
        rebuild(graph, plan),
        masked(graph),
    )
    small_caches = shrink(plan, caches)
    batch = jax.tree.leaves(caches)[0].shape[-4]
    for position, token in enumerate(STEPS):
        token = jnp.resize(token, batch)
        logits, small_caches = small_fn(small, token, jnp.int32(position), small_caches)
        expected, caches = masked_fn(params, masks, token, jnp.int32(position), caches)
        close(logits, expected)
        close(small_caches, shrink(plan, caches))
    return small_caches


@pytest.mark.parametrize("kind", ["loop", "scan"])
def test_heads_go_with_their_caches(kind: str):
    fn, params, caches = CASES[kind]
    plan = plan_for(kind)
    assert verify(GRAPHS[kind], plan, params, STEPS[0], jnp.int32(0), caches)
    found = steps_are_equal(kind, plan, caches)
    # The function knows its sizes from the parameters alone.
    of_fn = shrink(plan, caches)
    for position, token in enumerate(STEPS):
        _, of_fn = fn(shrink(plan, params), token, jnp.int32(position), of_fn)
    close(found, of_fn)
    kept = plan.inputs.kept["2/0/k" if kind == "loop" else "2/k"]
    assert kept == ({2: plan.kept["layers/0/v"][1]} if kind == "loop" else {3: plan.kept["layers/v"][2]})
    assert jax.tree.leaves(found)[0].shape[-2] == HEADS // 2


def test_each_layer_of_a_scan_keeps_its_own_heads():
    plan, loop = plan_for("scan"), plan_for("loop")
    assert plan.inputs.layers == {"2/k": 0, "2/v": 0}
    rows = plan.inputs.kept["2/v"][3]
    assert rows == tuple(loop.inputs.kept[f"2/{n}/v"][2] for n in range(LAYERS))
    assert len(set(rows)) > 1
    caches = [{name: normal(BATCH, LENGTH, HEADS, SIZE, salt=n) for name in ("k", "v")} for n in range(LAYERS)]
    jax.tree.map(np.testing.assert_array_equal, shrink(plan, stack(caches)), stack(shrink(loop, caches)))
    np.testing.assert_array_equal(shrink(loop, caches)[1]["k"], caches[1]["k"][:, :, jnp.array(rows[1])])


@pytest.mark.parametrize("kind", ["loop", "scan"])
def test_layers_go_with_their_caches(kind: str):
    graph, (_, params, caches) = GRAPHS[kind], CASES[kind]
    if kind == "loop":
        name = next(block.name for block in graph.blocks if block.inputs == ("2/1/k", "2/1/v"))
        plan = dropping(graph, [name])
        assert plan.inputs.dropped == ("2/1/k", "2/1/v")
        assert shrink(plan, caches)[1] == {"k": None, "v": None}
    else:
        (block,) = graph.blocks
        plan = plan_of(graph, {block.place: np.array([0, 2])})
        assert shrink(plan, caches)["k"].shape == (2, BATCH, LENGTH, HEADS, SIZE)
    plan = combine(plan_for(kind), plan)
    if kind == "scan":
        assert plan.inputs.shapes["2/k"] == (LAYERS, None, None, HEADS, None)
    assert Plan.from_json(plan.to_json()) == plan
    assert verify(graph, plan, params, STEPS[1], jnp.int32(0), caches)
    if kind == "loop":
        steps_are_equal(kind, plan, caches)
        steps_are_equal(kind, plan, empty(3, 7))


@pytest.mark.parametrize("kind", ["loop", "scan"])
def test_other_batches_and_lengths(kind: str):
    plan = plan_for(kind)
    caches = empty(3, 7)
    caches = caches if kind == "loop" else stack(caches)
    steps_are_equal(kind, plan, caches)
    graph, params = GRAPHS[kind], CASES[kind][1]
    assert verify(graph, plan, params, jnp.array([1, 2, 3]), jnp.int32(4), caches)
    here = graph.at(jnp.array([1, 2, 3]), jnp.int32(0), caches)
    assert [group.name for group in here.groups] == [group.name for group in graph.groups]
    assert with_inputs(plan, here) == plan


def test_a_plan_of_another_function():
    """Chosen with a function that is trained, without a cache, cut from the one that decodes."""

    def forward(params: Any, tokens: Any) -> Any:
        logits, _ = looped(params, tokens, jnp.int32(0), empty(4, 1))
        return logits

    graph = trace(forward, LOOP, jnp.arange(4))
    plan = select_channels(graph, LOOP, CHANNELS["loop"])
    assert plan.inputs is None
    assert with_inputs(plan, GRAPHS["loop"]).inputs == plan_for("loop").inputs
    small = rebuild(GRAPHS["loop"], plan)(shrink(plan, LOOP), STEPS[1], jnp.int32(0), empty(heads=HEADS // 2))
    close(small, rebuild(GRAPHS["loop"], plan)(shrink(plan, LOOP), STEPS[1], jnp.int32(0), shrink(plan_for("loop"), empty())))  # fmt: skip
    fewer = select_blocks(
        GRAPHS["loop"], LOOP, 1, lambda fn, p: jnp.square(fn(p, STEPS[0], jnp.int32(0), empty())[0]).mean()
    )
    assert with_inputs(fewer, GRAPHS["loop"]) == fewer


def test_where_caches_stand():
    plan, params, caches = plan_for("loop"), LOOP, empty()
    alone = shrink(plan, caches)
    both = shrink(plan, (params, caches))
    every = shrink(plan, (STEPS[0], jnp.int32(0), caches))
    jax.tree.map(np.testing.assert_array_equal, both, (shrink(plan, params), alone))
    jax.tree.map(np.testing.assert_array_equal, every[2], alone)
    assert jax.tree.map(jnp.shape, shrink(plan, jax.eval_shape(lambda: caches))) == jax.tree.map(jnp.shape, alone)
    named = shrink(plan, {"params": params, "cache": caches, "step": jnp.int32(1)})
    jax.tree.map(np.testing.assert_array_equal, named["cache"], alone)
    with pytest.raises(ValueError, match="The tree has none of the parameters that the plan cuts"):
        shrink(plan, alone)  # which is cut already
    with pytest.raises(ValueError, match=r"inputs\[2\]\[0\]\['k'\] has shape \(2, 5, 4, 2\); along axis 2 the plan keeps 2 of 4 entries"):  # fmt: skip
        rebuild(GRAPHS["loop"], plan)(shrink(plan, params), STEPS[0], jnp.int32(0), caches)
    with pytest.raises(ValueError, match="prunable_inputs is true for none of the inputs, which are 0"):
        trace(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 2))}, jnp.ones((3, 2)), prunable_inputs=lambda path: False)


def test_two_states_of_one_shape():
    """A tree that may be one input or another is cut where both are cut alike, and refused where they are not."""

    def step(params: Any, x: Any, first: Any, second: Any) -> Any:
        first, second = first + x @ params["a"], second + x @ params["b"]
        return first @ params["c"] + second @ params["d"], first, second

    params = {"a": normal(3, 4), "b": normal(3, 4), "c": normal(4, 2), "d": normal(4, 2)}
    x, state = normal(5, 3), jnp.zeros((5, 4))
    graph = trace(step, params, x, state, state, prunable_inputs=lambda path: path != "0", prunable_outputs=lambda path: path != "0")  # fmt: skip
    shapes = {name: leaf.shape for name, leaf in params.items()}
    alike = with_inputs(Plan({name: {int(name in "ab"): (1, 3)} for name in "abcd"}, shapes), graph)
    assert shrink(alike, jnp.arange(20.0).reshape(5, 4)).tolist()[0] == [1, 3]
    rows = {"a": (0, 1), "c": (0, 1), "b": (1, 3), "d": (1, 3)}
    other = with_inputs(Plan({name: {int(name in "ab"): rows[name]} for name in "abcd"}, shapes), graph)
    with pytest.raises(ValueError, match=r"may be input 1 or 2, of which the plan keeps other entries"):
        shrink(other, state)
    _, first, second = shrink(other, (x, jnp.arange(20.0).reshape(5, 4), jnp.arange(20.0).reshape(5, 4)))
    assert (first.tolist()[0], second.tolist()[0]) == ([0, 1], [1, 3])
    assert verify(graph, other, params, x, state, state)


def test_one_array_for_all_layers_keeps_its_layers():
    """Caches of all layers in one array that a loop takes apart: heads go alike in each, and no layer goes alone."""

    def step(params: Any, token: Any, position: Any, caches: Any) -> Any:
        each = [{"k": caches[n, 0], "v": caches[n, 1]} for n in range(LAYERS)]
        logits, each = looped(params, token, position, each)
        return logits, jnp.stack([jnp.stack([cache["k"], cache["v"]]) for cache in each])

    caches = normal(LAYERS, 2, BATCH, LENGTH, HEADS, SIZE)
    graph = trace(step, LOOP, STEPS[0], jnp.int32(0), caches, prunable_inputs=lambda path: path == "2", prunable_outputs=lambda path: path == "1")  # fmt: skip
    assert all("up" in "".join(block.paths) for block in graph.blocks)
    assert len(graph.blocks) == LAYERS
    plan = select_channels(graph, LOOP, {"layers/0/v": 0.5})
    assert verify(graph, plan, LOOP, STEPS[0], jnp.int32(1), caches)
    assert shrink(plan, caches).shape == (LAYERS, 2, BATCH, LENGTH, HEADS // 2, SIZE)


def test_a_cache_that_grows():
    def step(params: Any, x: Any, keys: Any) -> Any:
        keys = jnp.concatenate([keys, (x @ params["k"])[:, None]], 1)
        weights = jax.nn.softmax(jnp.einsum("bd,btd->bt", x @ params["q"], keys))
        return jnp.einsum("bt,btd->bd", weights, keys) @ params["o"], keys

    params = {"k": normal(3, 4), "q": normal(3, 4), "o": normal(4, 2)}
    x, keys = normal(2, 3), normal(2, 2, 4)
    graph = trace(step, params, x, keys, prunable_inputs=lambda path: path == "1", prunable_outputs=lambda path: path == "1")  # fmt: skip
    plan = select_channels(graph, params, 0.5)
    small_fn, small, own = rebuild(graph, plan), shrink(plan, params), shrink(plan, keys)
    for length in (3, 4):
        found, own = small_fn(small, x, own)
        expected, keys = masked(graph)(params, channel_masks(plan, params), x, keys)
        close(found, expected)
        close(own, shrink(plan, keys))
        assert own.shape == (2, length, 2)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_llama(scan: bool):
    from examples._support.llama import Config, Llama, empty_caches

    config = Config(vocabulary=19, width=12, layers=2, heads=6, kv_heads=3, head_dim=4, inner=16)
    network = Llama(config, scan=scan)
    caches = empty_caches(config, 2, 6, scan=scan)
    tokens = jnp.array([[3], [7]], jnp.int32)
    params = network.init(jax.random.key(0), tokens)["params"]

    def decode(params: Any, tokens: Any, start: Any, caches: Any) -> Any:
        return network.apply({"params": params}, tokens, start, caches, method="decode")

    graph = trace(decode, params, tokens, jnp.int32(0), caches, prunable_inputs=lambda path: path.startswith("2/"), prunable_outputs=lambda path: path.startswith("1/"))  # fmt: skip
    plan = select_channels(graph, params, {"*/k_proj": 1 / 3, "*/gate_proj": 0.25})
    assert {np.shape(rows)[-1] for axes in plan.inputs.kept.values() for rows in axes.values()} == {2}
    small_network = Llama(config._replace(heads=4, kv_heads=2, inner=12), scan=scan)

    def small_decode(params: Any, tokens: Any, start: Any, caches: Any) -> Any:
        return small_network.apply({"params": params}, tokens, start, caches, method="decode")

    whole = empty_caches(config, 2, 6, scan=scan)
    small_fn, masked_fn = rebuild(graph, plan), masked(graph)
    small, masks, small_caches = shrink(plan, params), channel_masks(plan, params), shrink(plan, whole)
    close(
        jax.tree.map(jnp.shape, small_caches),
        jax.tree.map(jnp.shape, empty_caches(small_network.config, 2, 6, scan=scan)),
    )
    for start in range(3):
        step = tokens + start
        own = small_decode(small, step, jnp.int32(start), small_caches)
        logits, small_caches = small_fn(small, step, jnp.int32(start), small_caches)
        expected, whole = masked_fn(params, masks, step, jnp.int32(start), whole)
        close((logits, small_caches), own)
        close((logits, small_caches), (expected, shrink(plan, whole)))
    assert verify_module(graph, plan, small_decode, params, tokens, jnp.int32(0), caches)
    prompt = jnp.array([[3, 4, 5], [1, 2, 3]], jnp.int32)  # several tokens at once, a longer cache, another batch
    assert verify(graph, plan, params, prompt, jnp.int32(0), empty_caches(config, 2, 9, scan=scan))
