"""Bundles: what is saved computes the same when it is opened again, whatever its parameters were held in and stored as."""

import dataclasses
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from safetensors.numpy import load as load_safetensors

import jaxprune
from jaxprune import export, oneshot, rules
from jaxprune.structured import rebuild, select_channels, shrink, trace

RNG = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def shaped(*shape: Any, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


ATTENTION = {"table": normal(11, 6), **{name: {"kernel": normal(6, 2, 3)} for name in "qkv"}, "out": {"kernel": normal(2, 3, 6)}}  # fmt: skip


def attention(params: Any, tokens: Any) -> Any:
    """Causal attention over a batch of sequences of any length."""
    length = tokens.shape[1]
    h = params["table"][tokens]
    q, k, v = (jnp.einsum("bti,ihd->bthd", h, params[name]["kernel"]) for name in "qkv")
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
    weights = jax.nn.softmax(jnp.where(causal, jnp.einsum("bthd,bshd->bhts", q, k), -1e9))
    return {"hidden": jnp.einsum("bhts,bshd,hdo->bto", weights, v, params["out"]["kernel"])}


PARAMS = {"up": {"kernel": normal(16, 64), "bias": normal(64)}, "down": {"kernel": normal(64, 4)}}
X = normal(8, 16)


def dense(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None]) @ params["down"]["kernel"]


@pytest.mark.optimised
def test_any_batch_and_length_bit_for_bit(tmp_path: Path):
    export.save(tmp_path / "b", attention, ATTENTION, shaped("batch", "length", dtype=jnp.int32))
    bundle = export.load(tmp_path / "b")
    assert [str(n) for n in bundle.inputs[0].shape] == ["batch", "length"]
    assert [str(n) for n in bundle.outputs["hidden"].shape] == ["batch", "length", "6"]
    for shape in [(2, 5), (3, 1), (1, 9)]:
        tokens = jnp.asarray(RNG.integers(0, 11, shape), jnp.int32)
        for params in (ATTENTION, jax.tree.map(lambda w: w * 2, ATTENTION)):
            np.testing.assert_array_equal(
                bundle.fn(params, tokens)["hidden"], jax.jit(attention)(params, tokens)["hidden"]
            )
        np.testing.assert_array_equal(bundle(tokens)["hidden"], bundle.fn(ATTENTION, tokens)["hidden"])


def test_what_a_bundle_says(tmp_path: Path):
    saved = export.save(
        tmp_path / "b", dense, PARAMS, shaped("batch", 16), metrics={"accuracy": np.float32(0.5), "epoch": 3}
    )
    bundle = export.load(tmp_path / "b")
    assert (bundle.platforms, bundle.plan, bundle.metrics) == (
        ("cpu", "cuda", "tpu"),
        None,
        {"accuracy": 0.5, "epoch": 3},
    )
    assert bundle.versions == {"jax": jax.__version__, "jaxprune": jaxprune.__version__}
    assert jax.tree.structure(bundle.params) == jax.tree.structure(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, bundle.params, PARAMS)
    assert saved.bytes == (tmp_path / "b").stat().st_size
    with zipfile.ZipFile(tmp_path / "b") as archive:
        parts = {info.filename: info for info in archive.infolist()}
    assert list(parts) == ["program.jax", "params.safetensors", "bundle.json"]
    assert {info.compress_type for info in parts.values()} == {zipfile.ZIP_STORED}
    # Weights are in the file once, and not in the program.
    assert parts["program.jax"].file_size < sum(w.nbytes for w in jax.tree.leaves(PARAMS)) == saved.dense_bytes
    assert saved.bytes - sum(info.file_size for info in parts.values()) < 600
    text = str(bundle)
    assert all(
        word in text for word in ("float32[batch, 16]", "float32[batch, 4]", "1,344 in 3 arrays", "accuracy", "0.5")
    )


def test_without_jaxprune(tmp_path: Path):
    export.save(tmp_path / "b", dense, PARAMS, shaped("batch", 16))
    with zipfile.ZipFile(tmp_path / "b") as archive:
        program = jax.export.deserialize(bytearray(archive.read("program.jax")))
        params = load_safetensors(archive.read("params.safetensors"))
    np.testing.assert_array_equal(program.call(params, X), export.load(tmp_path / "b")(X))


def test_a_rebuilt_function_and_its_plan(tmp_path: Path):
    graph = trace(dense, PARAMS, X)
    plan = select_channels(graph, PARAMS, 0.5)
    small, small_fn = shrink(plan, PARAMS), rebuild(graph, plan)
    export.save(tmp_path / "b", small_fn, small, shaped("batch", 16), plan=plan)
    bundle = export.load(tmp_path / "b")
    assert bundle.plan == plan
    for rows in (8, 3):
        np.testing.assert_array_equal(bundle(X[:rows]), small_fn(small, X[:rows]))
    with pytest.raises(ValueError, match="the leading axis alone may be symbolic"):
        export.save(tmp_path / "c", small_fn, small, shaped(8, "width"))
    # A function that reads its widths from its parameters needs no rebuilding, and has any length.
    cut = select_channels(trace(attention, ATTENTION, jnp.zeros((2, 5), jnp.int32)), ATTENTION, {"v/*": 0.5})
    export.save(tmp_path / "c", attention, shrink(cut, ATTENTION), shaped("batch", "length", dtype=jnp.int32), plan=cut)
    tokens = jnp.arange(8, dtype=jnp.int32).reshape(2, 4)
    found = export.load(tmp_path / "c")(tokens)["hidden"]
    np.testing.assert_allclose(found, attention(shrink(cut, ATTENTION), tokens)["hidden"], rtol=1e-5, atol=1e-5)


MASKS = jaxprune.make_masks(PARAMS, 0.9, rule=rules.layer_sparsity)
CODES = oneshot.Codes(
    jnp.asarray(RNG.integers(-4, 4, (16, 64)), jnp.int8), jnp.ones((1, 64)), jnp.zeros((1, 64), jnp.int8), 3
)


def stored(**options: Any) -> Any:
    return pytest.param(options, id=" ".join(options))


@pytest.mark.parametrize(
    "options",
    [
        stored(masks=MASKS),
        stored(quantize=8),
        stored(masks=MASKS, quantize=4, group_size=16),
        stored(dtype="bfloat16"),
        stored(codes={"up/kernel": CODES}),
    ],
)
def test_parameters_are_stored_as_save_sparse_does(options: Any, tmp_path: Path):
    params = PARAMS
    if "codes" in options:
        params = PARAMS | {"up": PARAMS["up"] | {"kernel": CODES.values()}}
    saved = export.save(tmp_path / "b", dense, params, shaped("batch", 16), **options)
    bundle = export.load(tmp_path / "b")
    alone = jaxprune.save_sparse(tmp_path / "alone", params, options.pop("masks", None), **options)
    assert saved.tensors == alone.tensors
    decoded, _ = jaxprune.load_sparse(tmp_path / "alone")
    decoded = jax.tree.map(lambda w: w.astype(jnp.float32), decoded)
    jax.tree.map(np.testing.assert_array_equal, bundle.params, decoded)
    np.testing.assert_array_equal(bundle(X), bundle.fn(decoded, X))
    with zipfile.ZipFile(tmp_path / "b") as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    assert sizes["params.safetensors"] == alone.bytes


class Pair(NamedTuple):
    first: Any
    second: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    kernel: Any
    parts: Any


W = [normal(3, 3) for _ in range(3)]
TREES = {
    "a bare array": (W[0], lambda p: p),
    "a list": (W, sum),
    "a frozen dict": (FrozenDict({"a": {"b": W[0]}, "c": W[1]}), lambda p: p["a"]["b"] + p["c"]),
    "a named tuple": (Pair(W[0], (W[1],)), lambda p: p.first + p.second[0]),
    "a module": (Module(W[0], [Pair(W[1], W[2])]), lambda p: p.kernel + p.parts[0].first),
    "nothing": ({}, lambda p: jnp.ones((3, 3))),
}


@pytest.mark.parametrize("name", TREES)
def test_parameters_of_any_classes(name: str, tmp_path: Path):
    params, read = TREES[name]
    fn = lambda params, x: x @ read(params)  # noqa: E731
    export.save(tmp_path / "b", fn, params, X[:3, :3])
    bundle = export.load(tmp_path / "b")
    kinds = {type(node) for node in jax.tree.leaves(bundle.params, is_leaf=lambda node: True)}
    assert kinds <= {dict, type(W[0])}
    np.testing.assert_array_equal(bundle(X[:3, :3]), jax.jit(fn)(params, X[:3, :3]))
    np.testing.assert_array_equal(bundle.fn(params, X[:3, :3]), bundle(X[:3, :3]))


def test_inputs_and_results_of_any_shapes(tmp_path: Path):
    """A cache that is passed on, nothing, a number, a key, and results that are none."""

    def fn(params: Any, cache: Any, nothing: Any, scale: Any, key: Any) -> Any:
        keys = jnp.concatenate([cache["k"][0][1:], (params["w"] * scale)[None]])
        return {"k": (keys,)}, nothing, jax.random.uniform(key, (2,), jnp.float32)

    params = {"w": jnp.ones(3, jnp.bfloat16)}
    cache, key = {"k": (jnp.zeros((4, 3), jnp.bfloat16),)}, jax.random.key(3)
    export.save(tmp_path / "b", fn, params, cache, None, jnp.bfloat16(2), key)
    bundle = export.load(tmp_path / "b")
    assert bundle.params["w"].dtype == jnp.bfloat16
    found, expected = bundle(cache, None, jnp.bfloat16(3), key), fn(params, cache, None, jnp.bfloat16(3), key)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    # A list will do for a tuple: paths are what counts.
    np.testing.assert_array_equal(bundle({"k": [cache["k"][0]]}, None, jnp.bfloat16(3), key)[2], expected[2])


def test_nothing_is_donated(tmp_path: Path):
    given = jax.jit(lambda params, x: x + params, donate_argnums=(0, 1))
    params, x = jnp.ones((3,)), jnp.arange(3.0)
    export.save(tmp_path / "b", given, params, x)
    bundle = export.load(tmp_path / "b")
    assert not params.is_deleted()
    assert bundle(x).tolist() == bundle(x).tolist() == [1.0, 2.0, 3.0]


def test_symbols_of_jax_and_expressions(tmp_path: Path):
    (batch,) = jax.export.symbolic_shape("batch")
    fn = lambda params, x, y: jnp.concatenate([x, x]) + y  # noqa: E731
    export.save(tmp_path / "b", fn, {}, shaped(batch, 2), shaped("2*batch", 1))
    assert export.load(tmp_path / "b")(jnp.ones((3, 2)), jnp.ones((6, 1))).shape == (6, 2)
