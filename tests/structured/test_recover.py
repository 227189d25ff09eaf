"""The hyperparameters of smaller modules, worked out by hand; the modules beside the rebuilt function; and reasons."""

from collections.abc import Callable
from typing import Any

import cnn
import cnn_nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune.structured import combine, rebuild, recover, select_blocks, select_channels, shrink, trace, verify_module
from tests.support.recover_modules import CNN, Cut, NnxBlock, NnxCNN, ResNet, Transformer
from tests.support.structured_zoo import KEY, normal

IMAGES = normal(2, 8, 8, 1)


def check(cut: Cut, expected: dict[str, Any]) -> None:
    found = cut.recovered()
    assert found == expected
    result = cut.verified(found)
    assert result.passed, result
    assert max(output.difference for output in result.outputs) <= 1e-5


# ---- convolutions


@pytest.mark.slow
def test_widths_of_a_linen_cnn():
    cut = Cut(CNN, IMAGES, {"features": (6, 8), "hidden": 10, "activation": nn.tanh}, 0.5)
    check(cut, {"features": (3, 4), "hidden": 5, "activation": nn.tanh})


def test_widths_by_layer_and_those_that_stay():
    cut = Cut(CNN, IMAGES, {"features": (6, 8), "hidden": 10}, {"params/Conv_1": 0.25})
    check(cut, {"features": (6, 6), "hidden": 10})


def test_widths_of_an_nnx_cnn():
    """The image's shape changes the dense layer, too, and stays."""
    cut = Cut(NnxCNN, IMAGES, {"image_shape": (8, 8, 1), "features": [6, 8], "hidden": 10}, 0.5)
    check(cut, {"image_shape": (8, 8, 1), "features": [3, 4], "hidden": 5})


@pytest.mark.slow
def test_a_residual_network_with_batch_statistics():
    widths = [{"inner": 6, "outer": 4}, {"inner": 10, "outer": 8}]
    cut = Cut(ResNet, IMAGES, {"stem": 4, "widths": widths}, 0.5)
    check(cut, {"stem": 2, "widths": [{"inner": 3, "outer": 2}, {"inner": 5, "outer": 4}]})


def test_networks_whose_widths_are_written_down():
    x = normal(2, 8, 8, 1)
    module = cnn.CNN(3)
    params = jax.eval_shape(module.init, KEY, x)
    narrow = jax.eval_shape(CNN((16, 32), 100).init, KEY, x)
    with pytest.raises(ValueError, match=r"params/Conv_0/kernel\[3\] has 16 of 32 elements, which no hyperparameter"):
        recover(lambda **h: cnn.CNN(**h).init(KEY, x), {"classes": 3}, narrow)
    assert recover(lambda **h: cnn.CNN(**h).init(KEY, x), {"classes": 3}, params) == {"classes": 3}
    init = lambda **h: nnx.state(cnn_nnx.CNN(**h, rngs=nnx.Rngs(0)), nnx.Param)  # noqa: E731
    hyperparameters = {"classes": 3, "image_shape": (8, 8, 1)}
    small = jax.eval_shape(lambda: init(**hyperparameters))
    small["conv_1"]["bias"] = jax.ShapeDtypeStruct((16,), jnp.float32)
    with pytest.raises(ValueError, match=r"conv_1/bias\[0\] has 16 of 32 elements, which no hyperparameter changes"):
        recover(init, hyperparameters, small)


# ---- attention

TOKENS = normal(2, 5, 4)
ATTENTION = ["MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1"]
HIDDEN = ["Dense_2", "Dense_4"]  # the layer around each was made first
SIZES = {"width": 12, "heads": (4, 2), "qkv": (16, 12), "hidden": (10, 12)}


@pytest.mark.slow
def test_heads_and_hidden_units_of_a_transformer():
    cut = Cut(Transformer, TOKENS, SIZES, {f"params/{layer}": 0.5 for layer in ATTENTION + HIDDEN})
    check(cut, {"width": 12, "heads": (2, 1), "qkv": (8, 6), "hidden": (5, 6)})


@pytest.mark.slow
def test_a_number_of_heads_that_does_not_divide_the_old_width():
    """Three heads cannot share 16 units, so that both must change at once; the stream is cut as well."""
    check(Cut(Transformer, TOKENS, SIZES, 0.25), {"width": 9, "heads": (3, 1), "qkv": (12, 6), "hidden": (7, 9)})


@pytest.mark.slow
def test_heads_as_wide_as_the_stream_lets_them():
    cut = Cut(Transformer, TOKENS, {**SIZES, "qkv": None}, 0.5)
    check(cut, {"width": 6, "heads": (2, 1), "qkv": None, "hidden": (5, 6)})
    heads = Cut(Transformer, TOKENS, {**SIZES, "qkv": None}, {f"params/{ATTENTION[0]}": 0.5})
    message = r"_0/\w+/kernel\[\d\] has 3 of 3 elements, but follows heads\[0\]=2 \(which .*_0/\w+/kernel\[\d\] asks for\) and width=12 "
    with pytest.raises(ValueError, match=message):
        heads.recovered()


@pytest.mark.slow
def test_heads_of_nnx_attention():
    cut = Cut(NnxBlock, normal(2, 5, 6), {"width": 6, "heads": 4, "qkv": 20, "hidden": 10}, 0.25)
    check(cut, {"width": 6, "heads": 3, "qkv": 15, "hidden": 7})


@pytest.mark.slow
def test_dimensions_of_heads_are_found_but_scores_are_scaled_otherwise():
    """The module divides scores by the root of the dimensions that stay; with that undone it is the same."""
    hyperparameters = {"width": 6, "heads": 2, "qkv": 16, "hidden": 10}
    x = normal(2, 5, 6)
    names = [group.name for group in Cut(NnxBlock, x, hyperparameters, 0.0).graph.groups if group.outer]
    assert len(names) == 2  # queries with keys, and values
    cut = Cut(NnxBlock, x, hyperparameters, dict.fromkeys(names, 0.5))
    found = cut.recovered()
    assert found == {**hyperparameters, "qkv": 8}
    result = cut.verified(found)
    assert not result
    (output,) = result.outputs
    assert 1e-4 < output.difference < 1
    assert "does NOT equal" in str(result)

    def scaled(params: Any, x: Any) -> Any:
        query = jax.tree.map(lambda leaf: leaf * jnp.sqrt(4 / 8), params["attention"]["query"])
        attention = {**params["attention"], "query": query}
        return cut.function(found)(nnx.State({**params, "attention": attention}), x)

    assert verify_module(cut.graph, cut.plan, scaled, cut.params, x).passed
    one = Cut(NnxBlock, x, hyperparameters, {names[0]: 0.5})
    with pytest.raises(
        ValueError, match=r"out/kernel\[1\] has 8 of 8 elements, but follows heads=2 .* and qkv=8 \(which"
    ):
        one.recovered()


# ---- what shapes do not tell


@pytest.mark.slow
def test_what_shows_in_no_shape_is_left_to_verification():
    class Normed(nn.Module):
        features: int
        groups: int

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Dense(3)(nn.relu(nn.GroupNorm(self.groups)(nn.Conv(self.features, (3, 3))(x))).mean((1, 2)))

    cut = Cut(Normed, IMAGES, {"features": 8, "groups": 2}, 0.5)
    found = cut.recovered()
    assert found == {"features": 4, "groups": 2}
    assert not cut.verified(found)
    assert cut.verified({"features": 4, "groups": 1}).passed
    with pytest.raises(ValueError, match=r"ask for features=4, with which init raises ValueError\("):
        recover(lambda **h: cut.init(**h, groups=8), {"features": 8}, shrink(cut.plan, cut.params))


def shapes(**sizes: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in sizes.items()}


def grouped(heads: int, kv: int, dim: int) -> Any:
    """Queries, keys and values in one matrix, and what reads the values."""
    if heads % kv:
        raise RuntimeError("heads must be a multiple of kv")
    return {"qkv": jnp.ones((5, (heads + 2 * kv) * dim)), "out": jnp.ones((heads * dim, 5))}


def test_products_have_more_than_one_answer():
    small = shapes(qkv=(5, 64), out=(32, 5))
    with pytest.raises(ValueError, match=r"More than one .*: dim=4 or heads=4, kv=2.*pass what shall stay in init"):
        recover(grouped, {"heads": 8, "kv": 4, "dim": 8}, small)
    found = recover(lambda **h: grouped(**h, dim=8), {"heads": 8, "kv": 4}, small)
    assert found == {"heads": 4, "kv": 2}
    assert recover(lambda **h: grouped(8, 4, **h), {"dim": 8}, small) == {"dim": 4}
    # A table of a column for each head tells one from the other.
    init = lambda **h: {**grouped(**h), "positions": jnp.ones((9, h["heads"]))}  # noqa: E731
    found = recover(init, {"heads": 8, "kv": 4, "dim": 8}, {**small, **shapes(positions=(9, 4))})
    assert found == {"heads": 4, "kv": 2, "dim": 8}


@pytest.mark.parametrize(
    ("size", "before", "after"),
    [
        (lambda n: 2 * n + 1, 9, 4),
        (lambda n: n * n, 8, 4),
        (lambda n: (2 * n - 1) ** 2, 7, 3),
        (lambda n: int(8 / 3 * n), 64, 24),
        (lambda n: 8 * -(-n // 8), 60, 24),
        (lambda n: 60 // n, 3, 12),
        (lambda n: 100 - n, 40, 70),
        (lambda n: n // 4, 28, 12),
    ],
)
def test_sizes_that_are_no_multiples(size: Callable[[int], int], before: int, after: int):
    init = lambda n: {"w": jnp.ones((size(n), 2))}  # noqa: E731
    found = recover(init, {"n": before}, shapes(w=(size(after), 2)))
    assert size(found["n"]) == size(after)


def test_layers_that_are_stacked_and_sums():
    def init(layers: int, width: int, growth: int) -> Any:
        return {"stack": jnp.ones((layers, width, width)), "last": jnp.ones((width + 2 * growth, 1))}

    small = shapes(stack=(2, 5, 5), last=(11, 1))
    assert recover(init, {"layers": 3, "width": 8, "growth": 4}, small) == {"layers": 2, "width": 5, "growth": 3}


def stacked(layers: int, width: int) -> Any:
    blocks = {f"block_{i}": {"w": jnp.ones((width, width))} for i in range(layers)}
    return {**blocks, "head": jnp.ones((width, 2))}


def test_layers_dropped_from_the_end():
    small = {**jax.eval_shape(lambda: stacked(2, 5)), "block_2": {"w": None}, "block_3": None}
    assert recover(stacked, {"width": 8, "layers": 4}, small) == {"layers": 2, "width": 5}
    gap = {**small, "block_1": None, "block_2": {"w": jnp.ones((5, 5))}}
    with pytest.raises(ValueError, match=r"small has no block_1/w, and no hyperparameter leaves out .* the last ones"):
        recover(stacked, {"width": 8, "layers": 4}, gap)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_whatever_was_cut_is_found(data: st.DataObject):
    """Widths, heads and their dimensions of any sizes, some of them as before."""

    def sizes() -> tuple[int, int]:
        before = data.draw(st.integers(1, 40))
        return before, data.draw(st.integers(1, before))

    width, new_width = sizes()
    before, after = [], []
    for _ in range(data.draw(st.integers(1, 2))):
        (heads, new_heads), (dim, new_dim), (hidden, new_hidden) = sizes(), sizes(), sizes()
        before.append({"heads": heads, "qkv": heads * dim, "hidden": hidden, "bias": True})
        after.append({"heads": new_heads, "qkv": new_heads * new_dim, "hidden": new_hidden, "bias": True})

    def init(width: int, blocks: Any, rate: float, activation: str) -> Any:
        assert all(block["qkv"] % block["heads"] == 0 for block in blocks)
        return [
            {
                "query": jnp.ones((width, block["heads"], block["qkv"] // block["heads"])),
                "up": jnp.ones((width, block["hidden"])),
                "down": jnp.ones((block["hidden"], width)),
            }
            for block in blocks
        ]

    others = {"rate": 0.5, "activation": "gelu"}
    small = jax.eval_shape(lambda: init(new_width, after, **others))
    found = recover(init, {"width": width, "blocks": tuple(before), **others}, small)
    assert found == {"width": new_width, "blocks": tuple(after), **others}


# ---- what is refused


def mlp(width: int) -> Any:
    return {"a": jnp.ones((3, width)), "b": jnp.ones((width, width)), "c": jnp.ones((width, 2))}


@pytest.mark.parametrize(
    ("small", "message"),
    [
        (
            shapes(a=(3, 12), b=(12, 20), c=(20, 2)),
            r"a\[1\] and b\[1\] share width=32, but have 12 of 32 and 20 of 32 elements. Give the module a hyperparam",
        ),
        (shapes(a=(2, 32), b=(32, 32), c=(32, 2)), r"^a\[0\] has 2 of 3 elements, which no hyperparameter changes"),
        (shapes(a=(3, 32), b=(32, 32)), r"^small has no c, and no hyperparameter leaves out just what it lacks"),
        (shapes(a=(3, 32), B=(32, 32), c=(32, 2)), r"^small has no entry for the result of init\['b'\]"),
        (shapes(a=(3, 32), b=(32,), c=(32, 2)), r"small has b of shape \(32,\); init makes it in shape \(32, 32\)"),
    ],
)
def test_shapes_that_no_width_gives(small: Any, message: str):
    with pytest.raises(ValueError, match=message):
        recover(mlp, {"width": 32}, small)


def test_odd_sizes_of_what_comes_in_pairs():
    init = lambda n: {"w": jnp.ones((2 * n,))}  # noqa: E731
    with pytest.raises(ValueError, match=r"w\[0\] has 7 of 16 elements, which no other value of n=8 alone gives"):
        recover(init, {"n": 8}, shapes(w=(7,)))


def test_what_the_constructor_raises_of_itself_is_passed_on():
    with pytest.raises(RuntimeError, match="heads must be a multiple of kv"):
        recover(grouped, {"heads": 8, "kv": 3, "dim": 8}, shapes(qkv=(5, 48), out=(32, 5)))


def test_outputs_of_another_shape_are_infinitely_far_and_of_other_paths_refused():
    cut = Cut(CNN, IMAGES, {"features": (6, 8), "hidden": 10}, 0.5)
    small_fn = rebuild(cut.graph, cut.plan)
    result = verify_module(cut.graph, cut.plan, lambda p, x: small_fn(p, x)[:1], cut.params, IMAGES)
    assert [(output.path, output.difference) for output in result.outputs] == [("", np.inf)]
    with pytest.raises(ValueError, match=r"module's outputs has no entry for the rebuilt function's outputs"):
        verify_module(cut.graph, cut.plan, lambda p, x: {"logits": small_fn(p, x)}, cut.params, IMAGES)


# ---- depth and width together


class _Residual(nn.Module):
    layers: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for i in range(self.layers):
            x = x + nn.Dense(6, name=f"down_{i}")(nn.relu(nn.Dense(self.hidden, name=f"up_{i}")(x)))
        return nn.Dense(2, name="out")(x)


@pytest.mark.slow
def test_a_network_that_lost_a_block_and_channels():
    x, net = normal(4, 6), _Residual(3, 8)
    params = jax.tree.map(lambda leaf: normal(*leaf.shape), net.init(KEY, x)["params"])
    params["down_2"] = jax.tree.map(jnp.zeros_like, params["down_2"])  # its absence changes nothing
    fn = lambda params, x: net.apply({"params": params}, x)  # noqa: E731
    graph, y = trace(fn, params, x), fn(params, x)
    depth = select_blocks(graph, params, 1, lambda fn, params: jnp.square(fn(params, x) - y).mean())
    plan = combine(depth, select_channels(graph, params, {f"up_{i}": 0.5 for i in range(3)}))
    found = recover(lambda **h: _Residual(**h).init(KEY, x)["params"], {"layers": 3, "hidden": 8}, shrink(plan, params))
    assert found == {"layers": 2, "hidden": 4}

    def module(params: Any, x: jax.Array) -> jax.Array:
        present = {name: layer for name, layer in params.items() if layer["kernel"] is not None}
        return _Residual(**found).apply({"params": present}, x)

    assert verify_module(graph, plan, module, params, x)
