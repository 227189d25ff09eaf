"""What can be dropped: scanned layers and residual branches, and the function without some, by hand."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune.structured import (
    Graph,
    channel_masks,
    count_macs,
    count_parameters,
    masked,
    rebuild,
    select_channels,
    shrink,
    trace,
    verify,
)
from jaxprune.structured._axes import _reasons
from jaxprune.structured._axes._program import walk
from jaxprune.structured._axes._residuals import find_branches, needed
from jaxprune.structured._plan import plan_of
from tests.support.structured_depth import STACK, close, dropping, mlp, mlp_without, residual, stack, traced
from tests.support.structured_zoo import normal

# ---- by hand


@pytest.mark.slow
def test_branches_by_hand():
    fn, params, x = mlp()
    graph = trace(fn, params, x)
    assert [(block.name, block.size, block.paths) for block in graph.blocks] == [
        ("f", 1, ("f/bias", "f/down", "f/up")),
        ("g/adapter", 1, ("g/adapter/a", "g/adapter/b")),
        ("g", 1, ("g/adapter/a", "g/adapter/b", "g/kernel")),
    ]
    assert "What can be dropped as a whole" in str(graph)
    assert "What can be dropped" not in str(traced("cnn_linen")[1])
    plan = dropping(graph, ["f"])
    small = shrink(plan, params)
    assert small["f"] == {"up": None, "bias": None, "down": None}
    np.testing.assert_array_equal(
        rebuild(graph, plan)(small, x), jax.jit(functools.partial(mlp_without, ["f"]))(params, x)
    )
    masks = channel_masks(plan, params)
    assert [bool(mask.any()) for mask in jax.tree.leaves(masks)] == [False] * 3 + [True] * 4
    assert count_parameters(graph, plan) == sum(leaf.size for leaf in jax.tree.leaves(small)) == 12 + 16 + 16
    assert count_macs(graph, plan) == 5 * (12 + 16 + 16)
    # Whoever deletes the entries has the same parameters.
    del small["f"]
    close(rebuild(graph, plan)(small, x), mlp_without(["f"], params, x), 1e-6)


SUBSETS = [subset for n in range(4) for subset in itertools.combinations(["f", "g/adapter", "g"], n)]


@pytest.mark.slow
def test_every_choice_of_branches():
    fn, params, x = mlp()
    graph = trace(fn, params, x)
    masked_fn = masked(graph)
    for names in SUBSETS:
        plan, expected = dropping(graph, names), mlp_without(names, params, x)
        close(rebuild(graph, plan)(shrink(plan, params), x), expected, 1e-6)
        close(masked_fn(params, channel_masks(plan, params), x), expected, 1e-6)
    assert masked_fn._cache_size() == 1  # masks are arguments


def test_what_a_dropped_branch_would_have_computed_is_of_no_consequence():
    """A NaN in it reaches no result; of the smaller function, no gradient either."""
    params = {"a": normal(3, 4), "f": jnp.full((4, 4), jnp.nan)}
    fn = lambda p, x: (lambda h: h + jnp.tanh(h @ p["f"]))(x @ p["a"])  # noqa: E731
    x = normal(5, 3)
    graph = trace(fn, params, x)
    plan = dropping(graph, ["f"])
    np.testing.assert_allclose(masked(graph)(params, channel_masks(plan, params), x), x @ params["a"], rtol=1e-6)
    small_fn = rebuild(graph, plan)
    close(jax.grad(lambda p: small_fn(p, x).sum())(shrink(plan, params))["a"], np.tile(x.sum(0)[:, None], 4))


# ---- what is a block


def blocks_of(fn: Any, params: Any, *inputs: Any) -> list[tuple[str, int]]:
    return [(block.name, block.size) for block in trace(fn, params, *inputs).blocks]


X = normal(5, 4)
W = {"a": normal(4, 4), "b": normal(4, 4, salt=1), "bias": normal(4)}


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        pytest.param(lambda p, x: x @ p["a"] + p["bias"][None], [], id="a bias"),
        pytest.param(lambda p, x: x + jnp.broadcast_to(p["bias"], x.shape), [], id="positions"),
        pytest.param(lambda p, x: x @ p["a"] + x @ p["b"], [], id="a projection on the shortcut"),
        pytest.param(lambda p, x: x + x @ p["a"] + x @ p["b"], ["a", "b"], id="branches side by side"),
        pytest.param(lambda p, x: x @ p["a"] + x @ p["b"] + x, ["a"], id="two in one branch"),
        pytest.param(lambda p, x: (x @ p["b"] + p["bias"][None]) + x @ p["a"] @ p["b"], [], id="no common stream"),
        pytest.param(lambda p, x: (x + x @ p["a"]) + (x + x @ p["a"]) @ p["a"], [], id="shared parameters"),
        pytest.param(lambda p, x: x @ (p["a"] + jnp.tanh(p["a"]) @ p["b"]), [], id="a weight made of weights"),
        pytest.param(lambda p, x: jax.nn.gelu(x @ p["a"]), [], id="a cubic without parameters"),
        pytest.param(lambda p, x: x @ p["a"] + (x @ p["a"] + x @ p["b"]).sum(1, keepdims=True), [], id="broadcast"),
        pytest.param(
            lambda p, x: x + (lambda h: h + h @ p["a"])(jax.nn.relu(x)), ["a"], id="nothing beyond the inner branch"
        ),
        pytest.param(lambda p, x: lax.scan(lambda c, w: (c, x @ w), x, jnp.stack([p["a"]]))[1], [], id="one layer"),
    ],
)
def test_sums_that_are_residual(fn: Any, expected: list[str]):
    assert [name for name, _ in blocks_of(fn, W, X)] == expected


def test_a_branch_may_read_other_inputs():
    """A padding mask, an encoder: the branch is that in which the stream is read."""
    fn = lambda p, x, mask: x + jnp.tanh(x @ p["a"]) * mask[:, None]  # noqa: E731
    graph = trace(fn, W, X, jnp.ones(5))
    assert [block.paths for block in graph.blocks] == [("a",)]
    plan = dropping(graph, ["a"])
    np.testing.assert_array_equal(rebuild(graph, plan)(shrink(plan, W), X, jnp.ones(5)), X)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"unroll": 2}, {"unroll": 4}])
def test_scanned_layers_are_slices_of_the_stack(options: dict[str, Any]):
    fn, x = functools.partial(stack, **options), normal(5, 3)
    graph = trace(fn, STACK, x)
    assert [(block.name, block.size, block.paths) for block in graph.blocks] == [("layers", 4, ("layers",))]
    plan = dropping(graph, (), {"layers": (0, 3)})
    assert plan.kept == {"layers": {0: (0, 3)}}
    small = {**STACK, "layers": STACK["layers"][jnp.array([0, 3])]}
    np.testing.assert_array_equal(shrink(plan, STACK)["layers"], small["layers"])
    np.testing.assert_array_equal(rebuild(graph, plan)(small, x), jax.jit(fn)(small, x))
    close(masked(graph)(STACK, channel_masks(plan, STACK), x), fn(small, x), 1e-6)
    assert (count_macs(graph), count_macs(graph, plan)) == (5 * (12 + 4 * 16 + 8), 5 * (12 + 2 * 16 + 8))


def test_layers_are_no_channels():
    graph = trace(stack, STACK, normal(5, 3))
    assert [group.name for group in graph.groups] == ["in[1]"]
    assert all(0 not in plan.get("layers", {}) for plan in [select_channels(graph, STACK, 0.5).kept])
    assert ("layers", 0) not in {(axis.path, axis.axis) for axis in graph.frozen}


def test_steps_that_are_no_layers():
    """Along an input, with nothing carried, or where each step's result is a result: the axis stays, with the reason."""

    def why(fn: Any, *inputs: Any) -> list[tuple[str, ...]]:
        graph = trace(fn, STACK, *inputs)
        assert graph.blocks == ()
        return [axis.reasons for axis in graph.frozen if (axis.path, axis.axis) == ("layers", 0)]

    x = normal(5, 4)
    cache = normal(4, 5, 4)
    each = lambda p, x: lax.map(lambda w: x @ w, p["layers"]).sum(0)  # noqa: E731
    assert why(each, x) == [(_reasons.SCANNED,)]
    outs = lambda p, x: lax.scan(lambda x, w: (residual(w, x), x), x, p["layers"])[1]  # noqa: E731
    assert why(outs, x) == [(_reasons.of_output("outputs", 0),)]
    cached = lambda p, x, c: lax.scan(lambda x, s: (residual(s[0], x + s[1]), None), x, (p["layers"], c))[0]  # noqa: E731
    assert why(cached, x, cache) == [(_reasons.of_input("inputs[1]", 0),)]
    count = lambda x: lax.scan(lambda x, number: (jnp.tanh(x + number), x), x, jnp.arange(4.0))[1]  # noqa: E731
    assert why(lambda p, x: jnp.einsum("lnd,lde->ne", count(x), p["layers"]), x) == [(_reasons.SCANNED,)]
    over_time = lambda p, x: lax.scan(lambda h, x: (jnp.tanh(h @ p["a"] + x[None]), None), x, x)[0]  # noqa: E731
    graph = trace(over_time, W, normal(4, 4))
    assert graph.blocks == ()


def test_what_is_summed_over_layers_is_summed_over_those_that_stay():
    """A loss of every layer, weighted by a parameter and by the number of the layer, which stays what it was."""
    params = {**STACK, "weights": normal(4)}

    def fn(params: Any, x: Any) -> Any:
        def step(x: Any, layer: Any) -> Any:
            w, number = layer
            return residual(w, x) * (1 + number), jnp.square(x).mean()

        x, losses = lax.scan(step, x @ params["in"], (params["layers"], jnp.arange(4.0)))
        return x, (losses * params["weights"]).sum()

    x = normal(5, 3)
    graph = trace(fn, params, x)
    (block,) = graph.blocks
    assert block.paths == ("layers", "weights")
    plan = dropping(graph, (), {"layers": (1, 3)})
    h = x @ params["in"]
    losses = []
    for layer in (1, 3):
        losses.append(jnp.square(h).mean())
        h = residual(params["layers"][layer], h) * (1 + layer)
    expected = h, jnp.dot(jnp.array(losses), params["weights"][jnp.array([1, 3])])
    close(rebuild(graph, plan)(shrink(plan, params), x), expected)
    assert verify(graph, plan, params, x).passed


def test_parts_of_layers_are_layers():
    """Where results of the layers are divided later on, so are the layers, and none of it is a channel."""

    def run(params: Any, x: Any) -> tuple[Any, Any]:
        return lax.scan(lambda x, w: (residual(w, x), jnp.square(x).mean()), x @ params["in"], params["layers"])

    def thirds(params: Any, x: Any) -> Any:
        x, losses = run(params, x)
        return x, losses[:2].sum() + losses[:4].sum()

    def pairs(params: Any, x: Any) -> Any:
        x, losses = run(params, x)
        return x, losses.reshape(3, 2).sum(1) @ params["weights"]

    x = normal(5, 3)
    params = {**STACK, "layers": normal(6, 4, 4) / 2, "weights": normal(3)}
    for fn, sizes, kept in [
        (thirds, [2, 2, 2], {"layers": (1,), "layers#3": (0,)}),
        (pairs, [3, 2], {"layers": (0, 2)}),
    ]:
        graph = trace(fn, params, x)
        assert [block.size for block in graph.blocks] == sizes
        assert not any(member.axis == 0 for group in graph.groups for member in group.members)
        plan = dropping(graph, (), kept)
        assert verify(graph, plan, params, x).passed


@pytest.mark.slow
def test_two_scans_over_one_stack_and_scans_in_scans():
    def halves(params: Any, x: Any) -> Any:
        first = {**params, "layers": params["layers"][:2], "out": params["in"].T}
        return stack({**params, "layers": params["layers"][2:]}, stack(first, x))

    x = normal(5, 3)
    graph = trace(halves, STACK, x)
    assert [(block.name, block.size) for block in graph.blocks] == [("layers", 2), ("layers#2", 2)]
    plan = dropping(graph, (), {"layers": (1,), "layers#2": (0,)})
    assert plan.kept == {"layers": {0: (1, 2)}}
    h = residual(STACK["layers"][1], x @ STACK["in"]) @ STACK["in"].T
    close(rebuild(graph, plan)(shrink(plan, STACK), x), residual(STACK["layers"][2], h @ STACK["in"]) @ STACK["out"])
    assert verify(graph, plan, STACK, x).passed

    params = normal(2, 3, 4, 4) / 2
    inner = lambda x, group: (lax.scan(lambda x, w: (residual(w, x), None), x, group)[0], None)  # noqa: E731
    nested = lambda p, x: lax.scan(inner, x, p)[0]  # noqa: E731
    graph = trace(nested, params, X)
    assert [block.size for block in graph.blocks] == [2, 3]
    outer, layers = graph.blocks
    plan = plan_of(graph, {outer.place: np.array([1]), layers.place: np.array([0, 2])})
    close(rebuild(graph, plan)(shrink(plan, params), X), residual(params[1, 2], residual(params[1, 0], X)))
    assert verify(graph, plan, params, X).passed


@pytest.mark.parametrize("cast_outside", [False, True])
def test_branches_in_what_is_rematerialised(cast_outside: bool):
    params = [normal(4, 4, salt=i) / 2 for i in range(3)]

    def fn(params: Any, x: Any) -> Any:
        for w in params:
            x = jax.checkpoint(residual)(w.astype(jnp.bfloat16).astype(x.dtype) if cast_outside else w, x)
        return x

    graph = trace(fn, params, X)
    assert [block.paths for block in graph.blocks] == [("0",), ("1",), ("2",)]
    plan = dropping(graph, ["1"])
    small, small_fn = shrink(plan, params), rebuild(graph, plan)
    assert small[1] is None
    close(small_fn(small, X), fn([params[0], params[2]], X), 1e-6)
    assert verify(graph, plan, params, X).passed
    found = jax.grad(lambda p: jnp.sin(small_fn(p, X)).sum())(small)
    close([found[0], found[2]], jax.grad(lambda p: jnp.sin(fn(p, X)).sum())([params[0], params[2]]))


def drawn(seed: int) -> tuple[Any, dict[str, jax.Array], Any]:
    """A function of layers, sums and products of whatever came before, some of them rematerialised; its results and state."""
    random = np.random.default_rng(seed)
    params = {f"w{i}": normal(4, 4, salt=i) for i in range(9)} | {f"old{i}": normal(5, 4, salt=i) for i in range(3)}
    steps = [(random.choice(["layer", "sum", "sum", "product", "remat"]), random.integers(0, 99, 4)) for _ in range(14)]
    outs = random.integers(0, 99, 4)

    def fn(params: dict[str, jax.Array], x: jax.Array) -> Any:
        values, weights = [x], [params[f"w{i}"] for i in range(9)]

        def layer(a: jax.Array, w: jax.Array, v: jax.Array) -> Any:
            return a + jnp.tanh(a @ w) @ v, jnp.tanh(a)

        for kind, numbers in steps:
            a, b = (values[-1 - n % min(len(values), 5)] for n in numbers[:2])
            w, v = (weights[n % len(weights)] for n in numbers[2:])
            if kind == "layer":
                values.append(jnp.tanh(a @ w))
            elif kind == "remat":
                values.extend(jax.checkpoint(layer)(a, w, v))
            else:
                values.append(a + b if kind == "sum" else a * b)
        state = [0.9 * params[f"old{i}"] + values[n % len(values)] for i, n in enumerate(outs[:3])]
        return values[-1], state

    return fn, params, normal(5, 4)


def by_definition(graph: Graph, state: list[int]) -> list[tuple[Any, ...]]:
    """The branches, found by leaving out each sum's in turn and looking at what is needed then."""
    program, params = graph.program, graph.params
    results = [value for n, value in enumerate(program.outs) if n not in state]
    used, before = needed(program, (), program.outs), needed(program, (), results)
    found: list[tuple[Any, ...]] = []
    within: dict[Any, set[int]] = {}
    for node in (node for node in walk(program) if node.notes.stream is not None):
        after = needed(program, (node,), results)
        made = before - after
        for _ in range(2):  # what a rematerialised body makes is known to those behind it
            for other in walk(program):
                ins = [other.ins[other.notes.stream]] if other is node else other.ins
                outs = zip(other.outs, other.bodies[0].outs if other.bodies else [None] * len(other.outs), strict=True)
                made |= {id(out) for out, inner in outs if inner is not None and id(inner) in made}
                if not other.bodies and any(id(value) in made for value in ins):
                    made |= set(map(id, other.outs))
        lost = tuple(n for n in state if id(program.outs[n]) in made)
        after |= needed(program, (node,), [program.outs[n] for n in state if n not in lost])
        own = tuple(n for n, value in enumerate(params) if id(value) in used and id(value) not in after)
        if any(id(params[n]) in before for n in own):
            found.append((node, own, lost))
            within[node] = before - needed(program, (node,), results)

    def side_by_side(node: Any, other: Any) -> bool:
        return node is not other and id(other.outs[0]) not in within[node] and id(node.outs[0]) not in within[other]

    # A result that holds a part of each of several branches cannot go with one of them.
    return [
        (node, own, lost)
        for node, own, lost in found
        if not any(side_by_side(node, other) and set(lost) & set(theirs) for other, _, theirs in found)
    ]


@pytest.mark.parametrize("with_state", [False, True])
def test_branches_are_what_nothing_else_needs(with_state: bool):
    count = 0
    for seed in range(40):
        fn, params, x = drawn(seed)
        graph = trace(fn, params, x)
        state = [1, 2, 3] if with_state else []
        found = find_branches(graph.program, graph.params, state)
        expected = by_definition(graph, state)
        shown = [entry for entry in expected if entry[0] in {branch.node for branch in found}]
        assert [(branch.node, branch.params, branch.outs) for branch in found] == shown, seed
        # Left out are those that read nothing beyond what others inside of them read.
        for _, own, _ in (entry for entry in expected if entry not in shown):
            assert set(own) == set().union(*(entry[1] for entry in shown if set(entry[1]) <= set(own))), seed
        count += len(found)
    assert count > 40


@pytest.mark.slow
def test_a_deep_network_has_a_branch_for_each_layer():
    """Three hundred layers are read in the time of three hundred, not of their square: seconds, not minutes."""
    params = {"layers": [{"up": normal(4, 8, salt=i), "down": normal(8, 4, salt=i)} for i in range(300)]}

    def fn(params: Any, x: jax.Array) -> jax.Array:
        for layer in params["layers"]:
            x = x + jnp.tanh(x @ layer["up"]) @ layer["down"]
        return x

    graph = trace(fn, params, normal(5, 4))
    assert [block.name for block in graph.blocks] == [f"layers/{i}" for i in range(300)]
    assert [block.paths for block in graph.blocks[:1]] == [("layers/0/down", "layers/0/up")]
