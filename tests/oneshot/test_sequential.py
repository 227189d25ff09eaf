"""Pruning layer by layer: against calibrating anew before every layer, and the target of two streams in float64."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxprune.oneshot._gptq import gptq, prune_and_quantize
from jaxprune.oneshot._sequential import sequential
from jaxprune.oneshot._sparsegpt import sparsegpt
from jaxprune.sites._calibrate import Grams, calibrate_grams
from tests.support.graph_zoo import normal

HALF = functools.partial(sparsegpt, k=0.5)


def keep_weights(params: Any, grams: Grams, *, prunable: Any) -> Any:
    """Prune nothing."""
    return params, jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)


def halve(params: Any, grams: Grams, *, prunable: Any) -> Any:
    """Keep the outputs in even places, scaled by what the Gram matrix says."""
    (site,) = grams.sites
    weights = site.matrices(params[site.path])
    mask = jnp.arange(weights.shape[2]) % 2 == 0
    mask = jnp.broadcast_to(mask[None, None], weights.shape)
    scale = 1 + jnp.trace(grams.of(site), axis1=1, axis2=2)[:, None, None] / 1e3
    done = jnp.where(mask, weights * scale, 0)
    every = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    put = {site.path: site.put(params[site.path], done)}
    return {**params, **put}, {**every, site.path: site.put(every[site.path], mask)}


def perceptron(params: Any, x: Any) -> Any:
    h = jnp.tanh(x @ params["a"]["kernel"])
    h = h + jnp.tanh(h @ params["b"]["kernel"] + params["b"]["bias"][None])
    return h @ params["c"]["kernel"]


def weights() -> Any:
    return {
        "a": {"kernel": normal(6, 8) / 2},
        "b": {"kernel": normal(8, 8) / 2, "bias": normal(8)},
        "c": {"kernel": normal(8, 4) / 2},
    }


BATCHES = [normal(32, 6, salt=i) for i in range(3)]


def anew_before_every_layer(fn: Callable[..., Any], params: Any, method: Any, names: list[str]) -> Any:
    """The plain way: run the whole calibration again before each layer."""
    for name in names:
        grams = calibrate_grams(fn, params, BATCHES, where=lambda site, name=name: site.path == f"{name}/kernel")
        flat = {f"{key}/kernel": params[key]["kernel"] for key in names}
        pruned, _ = method(flat, grams, prunable=lambda path, leaf, name=name: path == f"{name}/kernel")
        params = {**params, name: {**params[name], "kernel": pruned[f"{name}/kernel"]}}
    return params


@pytest.mark.slow
@pytest.mark.parametrize("method", [halve, HALF], ids=["halve", "sparsegpt"])
def test_equals_calibrating_anew_before_every_layer(method: Any) -> None:
    found, masks = sequential(perceptron, weights(), BATCHES, method, target="current")
    expected = anew_before_every_layer(perceptron, weights(), method, ["a", "b", "c"])
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=2e-5)
    assert masks["b"]["bias"].all()
    assert [float(masks[name]["kernel"].mean()) for name in "abc"] == [0.5, 0.5, 0.5]
    assert all(bool((found[name]["kernel"][~masks[name]["kernel"]] == 0).all()) for name in "abc")


@pytest.mark.slow
def test_dense_target_is_the_least_squares_solution() -> None:
    params = weights()
    targets: dict[str, np.ndarray] = {}

    def record(tree: Any, grams: Grams, *, prunable: Any) -> Any:
        (site,) = grams.sites
        targets[site.path] = np.asarray(tree[site.path], np.float64)
        return halve(tree, grams, prunable=prunable)

    found, _ = sequential(perceptron, params, BATCHES, record)

    def inputs_of_c(params: Any) -> np.ndarray:
        x = np.concatenate(BATCHES).astype(np.float64)
        h = np.tanh(x @ np.asarray(params["a"]["kernel"], np.float64))
        b = {key: np.asarray(leaf, np.float64) for key, leaf in params["b"].items()}
        return h + np.tanh(h @ b["kernel"] + b["bias"])

    dense, pruned = inputs_of_c(params), inputs_of_c(found)
    gram, cross = pruned.T @ pruned, pruned.T @ dense
    dead = np.diagonal(gram) < 1e-6
    assert not dead.any()
    damping = 0.01 * np.mean(np.diagonal(gram)) * np.eye(8)
    w = np.asarray(params["c"]["kernel"], np.float64)
    expected = np.linalg.solve(gram + damping, (cross + damping) @ w)
    np.testing.assert_allclose(targets["c/kernel"], expected, rtol=1e-3, atol=1e-4)
    # The first layer sees the same inputs in both models.
    np.testing.assert_array_equal(targets["a/kernel"], params["a"]["kernel"])


def pooled(params: Any, x: Any) -> Any:
    """Attention by queries that are parameters: what comes before their projection is no data, but is pruned as well."""
    query = jnp.tanh(jnp.tile(params["query"], (32, 1, 1)) @ params["a"]["kernel"]) @ params["b"]["kernel"]
    return jax.nn.softmax(jnp.einsum("bqd,bd->bq", query, x @ params["c"]["kernel"]))


@pytest.mark.slow
def test_learned_queries_are_data_of_what_projects_them() -> None:
    shapes = {"a": (4, 8), "b": (8, 6), "c": (6, 6)}
    params = {"query": normal(1, 5, 4), **{name: {"kernel": normal(*shape)} for name, shape in shapes.items()}}
    found, masks = sequential(pooled, params, BATCHES, HALF, target="current", prunable="*/kernel")
    expected = anew_before_every_layer(pooled, params, HALF, ["a", "b", "c"])
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-4, atol=2e-5)
    assert [float(masks[name]["kernel"].mean()) for name in "abc"] == [0.5, 0.5, 0.5]


@pytest.mark.slow
def test_dense_target_makes_up_for_earlier_layers() -> None:
    params, fresh = weights(), normal(512, 6, salt=9)
    dense = perceptron(params, fresh)

    def error(pruned: Any) -> float:
        return float(jnp.mean(jnp.square(perceptron(pruned, fresh) - dense)))

    at_once = error(sparsegpt(params, calibrate_grams(perceptron, params, BATCHES), 0.5)[0])
    two_streams = error(sequential(perceptron, params, BATCHES, HALF)[0])
    assert two_streams < 0.9 * at_once


@pytest.mark.slow
@pytest.mark.parametrize("target", ["dense", "current"])
@pytest.mark.parametrize("reverse", [False, True])
def test_layers_of_a_scan_are_pruned_one_after_the_other(target: Any, reverse: bool) -> None:
    stack = {"layers": {"kernel": normal(3, 6, 6) / 2, "bias": normal(3, 6)}, "last": {"kernel": normal(6, 2)}}

    def step(h: Any, layer: Any) -> Any:
        return jnp.tanh(h @ layer["kernel"] + layer["bias"][None]), jnp.sum(h, 0)

    def scanned(params: Any, x: Any) -> Any:
        h, sums = lax.scan(step, x, params["layers"], reverse=reverse)
        return h @ params["last"]["kernel"] + jnp.sum(sums)

    def unrolled(params: Any, x: Any) -> Any:
        sums = []
        for name in ("2", "1", "0") if reverse else ("0", "1", "2"):
            x, total = step(x, params[name])
            sums.append(total)
        return x @ params["last"]["kernel"] + jnp.sum(jnp.stack(sums))

    apart = {str(i): jax.tree.map(lambda leaf, i=i: leaf[i], stack["layers"]) for i in range(3)}
    one, masks = sequential(scanned, stack, BATCHES, HALF, target=target)
    many, _ = sequential(unrolled, {**apart, "last": stack["last"]}, BATCHES, HALF, target=target)
    together = jnp.stack([many[str(i)]["kernel"] for i in range(3)])
    np.testing.assert_allclose(one["layers"]["kernel"], together, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(one["last"]["kernel"], many["last"]["kernel"], rtol=1e-3, atol=1e-4)
    assert masks["layers"]["kernel"].mean(axis=(1, 2)).tolist() == [0.5, 0.5, 0.5]


@pytest.mark.slow
def test_parts_of_a_fused_parameter_casts_and_calls() -> None:
    params = {"qkv": {"kernel": normal(6, 12)}, "out": {"kernel": normal(4, 6)}, "down": {"kernel": normal(6, 3)}}

    @jax.jit
    def attend(q: Any, k: Any, v: Any) -> Any:
        return jax.nn.softmax(q @ k.T) @ v

    @jax.checkpoint
    def fn(params: Any, x: Any) -> Any:
        q, k, v = (x.astype(jnp.float16) @ w.astype(jnp.float16) for w in jnp.split(params["qkv"]["kernel"], 3, 1))
        y = attend(q, k, v).astype(jnp.float32) @ params["out"]["kernel"]
        return lax.cond(y.sum() > 0, jnp.sin, jnp.cos, y) @ params["down"]["kernel"]

    found, masks = sequential(fn, params, BATCHES, HALF)
    for part in jnp.split(masks["qkv"]["kernel"], 3, axis=1):
        assert float(part.mean()) == 0.5
    assert jax.tree.all(jax.tree.map(lambda w, m: bool(((w != 0) == m).all()), found, masks))


@pytest.mark.slow
def test_recurrent_and_tied_weights_are_pruned_at_once() -> None:
    params = {"first": {"kernel": normal(6, 8)}, "cell": {"kernel": normal(8, 8) / 3}, "tied": {"kernel": normal(8, 8)}}

    def fn(params: Any, x: Any) -> Any:
        h = jnp.tanh(x @ params["first"]["kernel"])
        h = lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ params["cell"]["kernel"]), h)
        return jnp.tanh(h @ params["tied"]["kernel"]) @ params["tied"]["kernel"]

    found, masks = sequential(fn, params, BATCHES, HALF)
    at_once, _ = sparsegpt(params, calibrate_grams(fn, params, BATCHES), 0.5)
    for name in ("cell", "tied"):
        np.testing.assert_array_equal(found[name]["kernel"], at_once[name]["kernel"])
    assert [float(masks[name]["kernel"].mean()) for name in params] == [0.5] * 3


@pytest.mark.slow
def test_each_layer_is_handed_out_when_it_is_finished() -> None:
    stacks = {
        "qkv": normal(3, 6, 12) / 2,  # a stack, of three parts a layer
        "out": normal(12, 6) / 2,  # a stack only after a reshape
        "nested": normal(3, 2, 6, 6) / 2,  # a stack of stacks
        "last": normal(6, 2),
    }
    params = jax.tree.map(jnp.copy, stacks)

    def inner(h: Any, kernel: Any) -> Any:
        return jnp.tanh(h @ kernel), None

    def step(h: Any, layer: Any) -> Any:
        q, k, v = (h @ part for part in jnp.split(layer["qkv"], 3, axis=1))
        h = h + lax.scan(inner, h, layer["nested"])[0]
        return h + (q * k + v) @ layer["out"], None

    def fn(params: Any, x: Any) -> Any:
        layers = {"qkv": params["qkv"], "nested": params["nested"], "out": params["out"].reshape(3, 4, 6)}
        return lax.scan(step, x, layers)[0] @ params["last"]

    seen: list[tuple[str, tuple[int, ...]]] = []
    copies = {name: (np.zeros(leaf.shape), np.zeros(leaf.shape, bool)) for name, leaf in params.items()}

    def store(path: str, index: tuple[int, ...], weights: Any, mask: Any) -> None:
        seen.append((path, index))
        copies[path][0][index], copies[path][1][index] = weights, mask

    found, masks = sequential(fn, params, BATCHES, HALF, prunable=lambda path, leaf: True, on_layer=store)
    in_layers = [("qkv", (0,)), ("nested", (0, 0)), ("nested", (0, 1))]
    in_layers += [(path, (index[0] + i, *index[1:])) for i in (1, 2) for path, index in in_layers]
    assert seen == [*in_layers, ("out", ()), ("last", ())]
    for name, (weights, mask) in copies.items():
        np.testing.assert_array_equal(found[name], weights)
        np.testing.assert_array_equal(masks[name], mask)
    assert masks["qkv"].reshape(3, 6, 3, 4).mean(axis=(1, 3)).tolist() == [[0.5] * 3] * 3
    # What was given is as it was.
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, stacks))


def test_stops_behind_the_last_layer_and_keeps_what_is_not_pruned() -> None:
    params = weights()
    seen: list[str] = []

    def record(tree: Any, grams: Grams, *, prunable: Any) -> Any:
        seen.extend(site.path for site in grams.sites)
        return keep_weights(tree, grams, prunable=prunable)

    found, masks = sequential(perceptron, params, BATCHES, record, prunable=lambda path, leaf: path == "b/kernel")
    assert seen == ["b/kernel"]
    assert jax.tree.all(jax.tree.map(lambda new, old: bool((new == old).all()), found, params))
    assert jax.tree.structure(found) == jax.tree.structure(masks) == jax.tree.structure(params)


ROUND = functools.partial(prune_and_quantize, k=0.5, bits=4, group_size=3, symmetric=False)


@pytest.mark.slow
def test_a_method_that_rounds_gives_codes_each_layer_behind_rounded_ones() -> None:
    found = sequential(perceptron, weights(), BATCHES, ROUND, target="current")
    params = weights()
    for name in "abc":
        grams = calibrate_grams(perceptron, params, BATCHES)
        alone = ROUND(params, grams, prunable=f"{name}/kernel")
        params = alone.params
        codes, expected = found.codes[f"{name}/kernel"], alone.codes[f"{name}/kernel"]
        np.testing.assert_array_equal(codes.codes, expected.codes)
        np.testing.assert_array_equal(codes.values(), found.params[name]["kernel"])
        np.testing.assert_array_equal(found.masks[name]["kernel"], alone.masks[name]["kernel"])
    assert found.codes.keys() == {f"{name}/kernel" for name in "abc"}


@pytest.mark.slow
def test_the_codes_of_a_stack_are_those_of_its_layers() -> None:
    stack = {"kernel": normal(2, 3, 6, 6) / 2}

    def step(h: Any, kernel: Any) -> Any:
        return jnp.tanh(h @ kernel), None

    def fn(params: Any, x: Any) -> Any:
        return lax.scan(lambda h, kernels: (lax.scan(step, h, kernels)[0], None), x, params["kernel"])[0]

    found = sequential(fn, stack, BATCHES, ROUND)
    codes = found.codes["kernel"]
    assert codes.codes.shape == (2, 3, 6, 6)
    assert codes.scale.shape == codes.zero_point.shape == (2, 3, 2, 6)
    np.testing.assert_array_equal(codes.values(), found.params["kernel"])
    assert (found.masks["kernel"].sum((-1, -2)) == 18).all()


def test_what_a_method_finds_is_rounded_by_the_next() -> None:
    def method(params: Any, grams: Grams, *, prunable: Any) -> Any:
        pruned, masks = sparsegpt(params, grams, 0.5, prunable=prunable)
        return gptq(pruned, grams, masks=masks, bits=4, prunable=prunable)

    found = sequential(perceptron, weights(), BATCHES, method, prunable="a/kernel")
    pruned, masks = sequential(perceptron, weights(), BATCHES, HALF, prunable="a/kernel")
    np.testing.assert_array_equal(found.masks["a"]["kernel"], masks["a"]["kernel"])
    error = np.abs(found.params["a"]["kernel"] - pruned["a"]["kernel"])
    assert 0 < error.max() < 2 * found.codes["a/kernel"].scale.max()


@pytest.mark.slow
def test_strengths_may_be_a_tree() -> None:
    strengths = {"a": 0.25, "b": 0.5, "c": 0.75}
    _, masks = sequential(perceptron, weights(), BATCHES, functools.partial(sparsegpt, k=strengths))
    assert [float(masks[name]["kernel"].mean()) for name in "abc"] == [0.75, 0.5, 0.25]


def test_bad_input() -> None:
    params = weights()
    with pytest.raises(ValueError, match="no calibration batch"):
        sequential(perceptron, params, [], HALF)
    with pytest.raises(ValueError, match='takes target="dense" or "current", not \'middle\''):
        sequential(perceptron, params, BATCHES, HALF, target="middle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"batches\[1\]\[0\] is float32\[4, 6\]"):
        sequential(perceptron, params, [BATCHES[0], normal(4, 6)], HALF)
    with pytest.raises(ValueError, match="No site multiplies data by 'd/kernel'"):
        sequential(perceptron, {**params, "d": {"kernel": normal(3, 3)}}, BATCHES, HALF)
    with pytest.raises(ValueError, match="ways that share weights"):
        sequential(lambda p, x: (x @ p["kernel"]) @ p["kernel"].T, {"kernel": normal(6, 4)}, BATCHES, HALF)
