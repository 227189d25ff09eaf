"""What `trace` says of a function: groups, frozen axes with their reasons, tables, and what it refuses."""

import inspect
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune.structured import Graph, count_macs, count_parameters, select_channels, trace, verify
from jaxprune.structured._axes import _reasons
from tests.support.structured_cases import CASES
from tests.support.structured_zoo import normal


def reasons(graph: Graph) -> dict[tuple[str, int], tuple[str, ...]]:
    return {(axis.path, axis.axis): axis.reasons for axis in graph.frozen}


def traced(name: str) -> Graph:
    case = CASES[name]()
    return trace(case.fn, case.params, *case.inputs, prunable_outputs=case.outputs)


def test_members_by_hand():
    graph = traced("cnn_linen")
    group = graph.group("Conv_1/kernel[3]")
    members = {(member.path, member.axis): member for member in group.members}
    assert set(members) == {("Conv_1/bias", 0), ("Conv_1/kernel", 3), ("Dense_0/kernel", 0)}
    assert [key for key, member in members.items() if member.produces] == [("Conv_1/kernel", 3)]
    # Flattened images of 2 x 2 places: the channel is the inner factor.
    assert members["Dense_0/kernel", 0].channels.tolist() == [*range(8)] * 4
    assert members["Conv_1/bias", 0].channels.tolist() == [*range(8)]
    assert group.span == 1


def test_heads_stand_for_their_dimensions():
    graph = traced("transformer")
    name = "_Transformer_0/MultiHeadDotProductAttention_0/key/kernel"
    assert (graph.group(f"{name}[1]").span, graph.group(f"{name}[2]").span) == (4, 2)
    assert graph.group("Embed_0/embedding[1]").span == 1


def test_the_outer_factor_is_the_parameters_whatever_a_contraction_lists_first():
    params = {"v": normal(6, 2, 4), "o": normal(2, 4, 6)}

    def fn(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.einsum("bqeh,hed->bqd", jnp.tanh(jnp.einsum("bqd,dhe->bqeh", x, params["v"])), params["o"])

    graph = trace(fn, params, normal(3, 5, 6))
    assert {group.name: group.outer for group in graph.groups} == {"v[1]": (), "v[2]": ("v[1]",)}


def test_why_axes_stay():
    found = reasons(traced("cnn_linen"))
    assert found["Conv_0/kernel", 0] == (_reasons.WINDOW,)
    assert found["Conv_0/kernel", 1] == (_reasons.WINDOW,)
    assert found["Dense_1/bias", 0] == (_reasons.of_output("outputs", 1),)
    assert found["Dense_0/kernel", 0] == (_reasons.POOLED,)
    assert ("Dense_0/kernel", 1) not in found


def test_why_nothing_of_the_weird_one_can_be_cut():
    found = reasons(traced("weird"))
    assert found["a", 1] == (_reasons.REVERSED,)
    assert found["b", 1] == (_reasons.runs_along("cumsum"),)
    assert found["c", 1] == (_reasons.runs_along("sort"),)
    assert found["d", 1] == (_reasons.CHOSEN,)


def test_what_has_no_rule_freezes_all_it_touches():
    def fn(params: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.fft.fft(x @ params).real.sum(1)

    graph = trace(fn, normal(3, 8), normal(4, 3))
    assert graph.groups == ()
    assert reasons(graph)["", 1] == (_reasons.no_rule("fft"),)


def test_axes_that_do_not_align_say_which():
    # 24 channels are 4 x 6 for the norm and 6 x 4 for the sum.
    def normed(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        h = x @ params["a"]
        g = h.reshape(5, 4, 6)
        h = (g - g.mean(2, keepdims=True)).reshape(5, 24)
        return h.reshape(5, 6, 4).sum(2) @ params["b"]

    graph = trace(normed, {"a": normal(3, 24), "b": normal(6, 2)}, normal(5, 3))
    (reason,) = reasons(graph)["a", 1]
    assert "reshape" in reason
    assert "do not align" in reason


def test_a_parameter_that_is_not_used_stays():
    graph = trace(lambda p, x: x @ p["a"], {"a": normal(3, 2), "spare": normal(4, 4)}, normal(5, 3))
    assert graph.groups == ()
    assert reasons(graph)["spare", 0] == (_reasons.UNUSED,)


def test_every_reason_says_what_does_it_and_what_to_do():
    texts = [text for name, text in vars(_reasons).items() if name.isupper()]
    texts += [_reasons.of_input("inputs[0]", 1), _reasons.of_output("outputs", 0), _reasons.no_rule("fft")]
    texts += [_reasons.runs_along("sort"), _reasons.numbers("top_k"), "reshape" + _reasons.unaligned("4 x 6", "6 x 4")]
    assert [text for text in texts if not any(mark in text for mark in (";", ":"))] == [_reasons.KEY_WORDS]


def test_a_reason_tells_its_line_in_the_function():
    def fn(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.cumsum(x @ params["up"], axis=1) @ params["down"]  # this line

    graph = trace(fn, {"up": normal(3, 4), "down": normal(4, 2)}, normal(5, 3))
    lines, first = inspect.getsourcelines(fn)
    line = first + next(number for number, text in enumerate(lines) if "# this line" in text)
    places = {(axis.path, axis.axis): axis.places for axis in graph.frozen}
    assert len(places["up", 1]) == 1
    assert places["up", 1][0].startswith(f"test_label.py:{line}, ")
    assert places["up", 0] == ("",)  # an input is no line
    assert f"test_label.py:{line}" in str(graph)


def test_sizes_are_plain_integers_whatever_jax_was_given():
    params = {"up": normal(3, 9), "down": normal(4, 2), "gate": normal(5, 2), "glu": normal(3, 8)}
    kernel = normal(3, 3, 1, 3)

    def fn(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        h = jnp.pad(x @ params["up"], ((0, 0), (np.int64(0), np.int64(0))))
        h = lax.slice_in_dim(h.reshape(np.int64(5), np.int64(9)), np.int64(0), np.int64(9), axis=1)
        left, right = jnp.split(h, np.array([4]), axis=np.int64(1))
        first, second = jnp.split(x @ params["glu"], 2, axis=1)
        image = lax.conv_general_dilated(
            jnp.broadcast_to(x[:, None, None], (np.int64(5), 4, 4, 3)), kernel, (np.int64(1),) * 2,
            ((np.int64(1), np.int64(1)),) * 2, feature_group_count=np.int64(3), dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return (
            left @ params["down"] + right @ params["gate"] + image.sum((1, 2))[:, :2] + (first * second).sum(1)[:, None]
        )

    graph = trace(fn, params, jax.ShapeDtypeStruct((np.int64(5), np.int64(3)), jnp.float32))
    plan = select_channels(graph, params, 0.5)
    for counted in (count_parameters(graph), count_macs(graph), count_parameters(graph, plan), count_macs(graph, plan)):
        assert type(counted) is int
    everything = [[group.size, group.span, group.outer] for group in graph.groups], [*graph.by_path.items()]
    assert json.loads(json.dumps(everything))[0] == [[4, 1, []], [5, 1, []], [4, 1, []]]
    assert "up[1]" in str(graph)


def batch_normed(collective: Any) -> Any:
    def fn(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        def each(x: jax.Array) -> jax.Array:
            h = jnp.tanh(x @ params["up"])
            return (h - collective(h)) @ params["down"]

        return jax.vmap(each, axis_name="batch")(x)

    return fn


@pytest.mark.parametrize("collective", [lax.pmean, lax.psum, lax.pmax, lax.pmin, lax.all_gather, lax.axis_index])
def test_a_reduction_over_an_axis_that_vmap_names_is_a_reduction(collective: Any):
    over = {
        "all_gather": lambda h: lax.all_gather(h, "batch").sum(0),
        "axis_index": lambda h: lax.axis_index("batch").astype(h.dtype),
    }.get(collective.__name__, lambda h: collective(h, "batch"))
    params, x = {"up": normal(3, 8), "down": normal(8, 2)}, normal(5, 3)
    graph = trace(batch_normed(over), params, x)
    (group,) = graph.groups
    assert [(member.path, member.axis) for member in group.members] == [("down", 0), ("up", 1)]
    assert verify(graph, select_channels(graph, params, 0.5), params, x)


def test_collectives_over_channels_count_those_that_stay():
    """The axis that vmap names holds channels here: a mean over them divides by those there were, a maximum skips the others."""
    params, x = {"up": normal(3, 8), "down": normal(8, 2)}, normal(5, 3)

    def fn(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        h = x @ params["up"] - 5.0  # below zero, so that a channel set to zero would be the largest
        each = lambda h: h / (1 + lax.pmean(h, "c") ** 2) - lax.pmax(h, "c")  # noqa: E731
        return jax.vmap(each, axis_name="c", in_axes=1, out_axes=1)(h) @ params["down"]

    graph = trace(fn, params, x)
    assert [group.name for group in graph.groups] == ["up[1]"]
    assert verify(graph, select_channels(graph, params, 0.5), params, x)


def test_a_copy_to_a_device_is_a_copy():
    params, x = {"up": normal(3, 8), "down": normal(8, 2)}, normal(5, 3)
    fn = lambda p, x: jax.device_put(jnp.tanh(jax.device_put((x @ p["up"], x)[0])), jax.devices()[0]) @ p["down"]  # noqa: E731
    graph = trace(fn, params, x)
    assert [group.name for group in graph.groups] == ["up[1]"]
    assert verify(graph, select_channels(graph, params, 0.5), params, x)


def layers_with_leftovers(params: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, Any]:
    """A stack of layers, and what nobody may ask for: every layer's activations, sorted, and the last layer's."""

    def step(x: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
        x = x + jnp.tanh(x @ w[0]) @ w[1]
        return x, (jnp.cumsum(x, 1), x)

    x, (sums, each) = lax.scan(step, x @ params["in"], params["layers"])
    return x @ params["out"], (sums[-1], each[::-1], jnp.sort(params["layers"], axis=0), params["spare"])


def in_a_branch(params: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, Any]:
    return lax.cond(x.sum() > 0, layers_with_leftovers, layers_with_leftovers, params, x)


@pytest.mark.parametrize("wrap", [lambda fn: fn, jax.jit, jax.checkpoint], ids=["plain", "jit", "checkpoint"])
@pytest.mark.parametrize("fn", [layers_with_leftovers, in_a_branch], ids=["scan", "cond"])
def test_what_nobody_uses_freezes_nothing(fn: Any, wrap: Any):
    params = {"in": normal(3, 4), "layers": normal(6, 2, 4, 4), "out": normal(4, 2), "spare": normal(3)}
    graph = trace(lambda params, x: wrap(fn)(params, x)[0], params, normal(5, 3))
    found = reasons(graph)
    assert [(block.name, block.size) for block in graph.blocks] == [("layers", 6)]
    assert ("layers", 0) not in found
    assert ("in", 1) not in found
    assert found["spare", 0] == (_reasons.UNUSED,)
    # Where it is asked for, it does freeze.
    assert ("layers", 0) in reasons(trace(wrap(fn), params, normal(5, 3)))


def test_outputs_may_be_cut_where_they_are_state():
    def fn(params: dict[str, jax.Array], x: jax.Array) -> dict[str, jax.Array]:
        h = x @ params["a"]
        return {"y": h @ params["b"], "mean": 0.9 * params["mean"] + 0.1 * h.mean(0)}

    params = {"a": normal(3, 8), "b": normal(8, 2), "mean": normal(8)}
    assert trace(fn, params, normal(4, 3)).groups == ()
    (group,) = trace(fn, params, normal(4, 3), prunable_outputs=lambda path: path == "mean").groups
    assert [(member.path, member.axis) for member in group.members] == [("a", 1), ("b", 0), ("mean", 0)]


def test_shapes_are_enough():
    params = {"up": jax.ShapeDtypeStruct((3, 8), jnp.bfloat16), "down": jax.ShapeDtypeStruct((8, 2), jnp.bfloat16)}
    x = jax.ShapeDtypeStruct((5, 3), jnp.bfloat16)
    (group,) = trace(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, x).groups
    assert (group.name, group.size) == ("up[1]", 8)


def test_calls_of_one_function_are_kept_apart():
    """A jitted function has one jaxpr; its calls have axes of their own."""
    layer = jax.jit(lambda x, w: jnp.tanh(x @ w))
    params = [normal(3, 8), normal(8, 8), normal(8, 8, salt=1), normal(8, 2)]

    def fn(params: list[jax.Array], x: jax.Array) -> jax.Array:
        for w in params:
            x = layer(x, w)
        return x

    graph = trace(fn, params, normal(4, 3))
    assert [group.name for group in graph.groups] == ["0[1]", "1[1]", "2[1]"]


def test_tables_and_drawing():
    graph = traced("llama")
    text = str(graph)
    assert "Channels that are cut together" in text
    assert "k[1]#2" in text
    assert "q[1] of 16" in text  # a head of keys stands for four positions of two queries' projections
    assert "an output" not in text.split("Axes that stay")[0]
    assert graph._repr_html_().count("<table") == len(text.split("┏")) - 1
    drawn = graph.to_dot()
    assert drawn.startswith("graph channels {")
    assert drawn.count(" -- ") == sum(len(group.members) for group in graph.groups)
    with pytest.raises(KeyError, match=r"'k' is no group"):
        graph.group("k")


def test_a_function_of_values_is_refused():
    with pytest.raises(TypeError, match=r"depends on the values .* functools.partial"):
        trace(lambda p, x: x @ p if x[0, 0] > 0 else x, normal(3, 3), normal(4, 3))
    with pytest.raises(TypeError, match=r"params\['a'\] is the string 'no array', not an array"):
        trace(lambda p, x: x, {"a": "no array"}, normal(4, 3))


def test_a_deep_network_is_traced_once():
    """Twelve layers of attention and a dense block, 768 wide, from shapes alone: work that grows with the layers."""
    width, heads, layers = 768, 12, 12
    shape = lambda *n: jax.ShapeDtypeStruct(n, jnp.float32)  # noqa: E731
    block = {
        "qkv": shape(width, 3 * width), "out": shape(width, width),
        "up": shape(width, 4 * width), "down": shape(4 * width, width), "scale": shape(width),
    }  # fmt: skip

    def fn(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
        for p in params:
            y = x * lax.rsqrt((x * x).mean(-1, keepdims=True)) * p["scale"][None, None]
            q, k, v = jnp.moveaxis((y @ p["qkv"]).reshape(*x.shape[:2], 3, heads, -1), 2, 0)
            x = x + jax.nn.dot_product_attention(q, k, v).reshape(x.shape) @ p["out"]
            x = x + jax.nn.gelu(x @ p["up"]) @ p["down"]
        return x.mean(-1)

    graph = trace(fn, [block] * layers, shape(2, 16, width))
    # Heads, and their dimensions, which one kernel holds for all three; the dense block. The stream is an input.
    assert len(graph.groups) == layers * 3
    assert sorted({group.size for group in graph.groups}) == [12, 64, 3072]
