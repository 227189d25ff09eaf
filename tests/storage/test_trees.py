"""Pruned models in files: the layout by hand, round trips, quantised values, compression."""

import json
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from flax.core import FrozenDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxprune
from jaxprune import load_sparse, rules, save_sparse, storage
from tests.support.storage_models import FLOATS, OTHERS, W, bits, random_model, raw

# The layout


def test_the_layout_by_hand(tmp_path):
    kernel = np.array([[0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 9.0], [1.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    mask = kernel != 0
    mask[1, 8] = True  # a kept weight that is zero
    params = {"dense": {"kernel": kernel.astype(np.float32), "bias": np.ones(9, np.float32)}}
    masks = {"dense": {"kernel": mask, "bias": np.ones(9, bool)}}
    saved = save_sparse(tmp_path / "m", params, masks)
    found = raw(tmp_path / "m")
    assert sorted(found) == [
        "dense/bias", "dense/kernel.bitmask", "dense/kernel.compressed", "dense/kernel.row_offsets",
        "dense/kernel.shape",
    ]  # fmt: skip
    assert found["dense/kernel.shape"].tolist() == [2, 9]
    assert found["dense/kernel.compressed"].tolist() == [2.0, 9.0, 1.0, 3.0, 0.0]
    assert found["dense/kernel.bitmask"].tolist() == [[0b10, 1], [0b1001, 1]]
    assert found["dense/kernel.row_offsets"].tolist() == [0, 2]
    assert found["dense/kernel.row_offsets"].dtype == found["dense/kernel.shape"].dtype == np.int64
    assert found["dense/bias"].tolist() == [1.0] * 9
    row = saved.tensors[1]
    assert (row.path, row.size, row.kept, row.dense_bytes) == ("dense/kernel", 18, 5, 72)
    assert row.stored_bytes == 2 * 8 + 5 * 4 + 4 + 2 * 8
    assert saved.bytes == (tmp_path / "m").stat().st_size
    assert (saved.dense_bytes, saved.compression) == (72 + 36, (72 + 36) / saved.bytes)


def test_names_that_end_in_weight_lose_that_ending_in_the_file_alone(tmp_path):
    params = {"a.weight": np.array([[1.0, 0.0]], np.float32), "b": np.array([[0.0, 2.0]], np.float32)}
    save_sparse(tmp_path / "m", params, {name: value != 0 for name, value in params.items()})
    assert {name.rpartition(".")[0] for name in raw(tmp_path / "m")} == {"a", "b"}
    assert load_sparse(tmp_path / "m")[0].keys() == {"a.weight", "b"}


def test_every_number_lies_at_a_multiple_of_its_size(tmp_path):
    params = {"a": np.ones((3, 5), np.float16), "b": np.ones((2, 3), np.float64), "c": np.ones((3, 3), np.float32)}
    save_sparse(tmp_path / "m", params, jax.tree.map(lambda w: np.arange(w.size).reshape(w.shape) % 2 == 0, params))
    data = (tmp_path / "m").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    sizes = {"F16": 2, "F32": 4, "F64": 8, "I64": 8, "U8": 1}
    assert length % 8 == 0
    del header["__metadata__"]
    assert all(record["data_offsets"][0] % sizes[record["dtype"]] == 0 for record in header.values())


# Round trips


@st.composite
def leaf_and_mask(draw):
    dtype = np.dtype(draw(st.sampled_from(FLOATS)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))
    data = draw(st.randoms(use_true_random=False))
    values = np.frombuffer(data.randbytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)
    density = draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    mask = np.array([data.random() < density for _ in range(values.size)], bool).reshape(shape)
    if draw(st.booleans()):
        values, mask = values.T, mask.T  # not contiguous
    return values, mask


@pytest.mark.slow
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(pair=leaf_and_mask(), compress=st.booleans())
def test_what_is_kept_comes_back_bit_for_bit_and_the_rest_is_zero(tmp_path, pair, compress):
    values, mask = pair
    save_sparse(tmp_path / "m", {"x": values}, {"x": mask}, compress=compress, force=True)
    params, masks = load_sparse(tmp_path / "m")
    assert params["x"].dtype == values.dtype
    np.testing.assert_array_equal(masks["x"], mask)
    # Of every NaN the payload, of every zero the sign.
    expected = np.where(mask, values, np.zeros((), values.dtype))
    np.testing.assert_array_equal(bits(params["x"]), bits(expected))


@pytest.mark.parametrize("dtype", [*FLOATS, *OTHERS])
def test_every_dtype_comes_back(tmp_path, dtype):
    values = np.arange(12).reshape(3, 4).astype(dtype)
    save_sparse(tmp_path / "m", {"x": values, "empty": values[:0], "scalar": values[1, 2]})
    params, masks = load_sparse(tmp_path / "m")
    for name, expected in {"x": values, "empty": values[:0], "scalar": values[1, 2]}.items():
        assert params[name].dtype == np.dtype(dtype)
        assert params[name].shape == expected.shape
        np.testing.assert_array_equal(bits(params[name]), bits(expected))
        assert np.asarray(masks[name]).all()
        assert masks[name].shape == expected.shape


def test_plain_leaves_are_those_the_safetensors_library_reads_and_writes(tmp_path):
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    save_sparse(tmp_path / "m", {"x": values.T, "y": values.astype(np.complex64)}, metadata={"rule": "none"})
    with safetensors.safe_open(tmp_path / "m", framework="np") as file:
        np.testing.assert_array_equal(file.get_tensor("x"), values.T)
        np.testing.assert_array_equal(file.get_tensor("y"), values.astype(np.complex64))
        assert file.metadata()["rule"] == "none"
    safetensors.numpy.save_file({"block/kernel": values, "b": values[0]}, tmp_path / "n", {"epoch": "3"})
    params, masks = load_sparse(tmp_path / "n")
    np.testing.assert_array_equal(params["block"]["kernel"], values)
    assert jax.tree.all(jax.tree.map(lambda mask: bool(mask.all()), masks))
    assert storage.read_metadata(tmp_path / "n") == {"epoch": "3"}


def test_masks_are_stored_and_not_guessed_from_zeros(tmp_path):
    params = {"kernel": jnp.array([[0.0, 0.0, -0.0, jnp.nan]])}
    masks = {"kernel": jnp.array([[True, False, True, True]])}
    save_sparse(tmp_path / "m", params, masks)
    loaded, found = load_sparse(tmp_path / "m")
    assert found["kernel"].tolist() == masks["kernel"].tolist()
    assert np.signbit(loaded["kernel"]).tolist()[0][:3] == [False, False, True]
    assert np.isnan(loaded["kernel"][0, 3])


def test_pruned_weights_that_are_not_zero_are_left_out(tmp_path):
    save_sparse(tmp_path / "m", [jnp.array([5.0, 7.0])], [jnp.array([False, True])])
    assert load_sparse(tmp_path / "m")[0]["0"].tolist() == [0.0, 7.0]


def test_a_leaf_of_64_bits_stays_in_numpy(tmp_path):
    save_sparse(tmp_path / "m", {"step": np.int64(2**40), "x": np.float32(1.5)})
    params, _ = load_sparse(tmp_path / "m")
    assert params["step"] == 2**40
    assert isinstance(params["step"], np.ndarray)
    assert isinstance(params["x"], jax.Array)


def test_a_bare_array_and_an_empty_tree_are_pytrees_too(tmp_path):
    save_sparse(tmp_path / "m", jnp.array([1.0, 2.0]), jnp.array([True, False]), force=True)
    params, masks = load_sparse(tmp_path / "m")
    assert (params.tolist(), masks.tolist()) == ([1.0, 0.0], [True, False])
    save_sparse(tmp_path / "m", {}, force=True)
    assert load_sparse(tmp_path / "m") == ({}, {})
    assert load_sparse(tmp_path / "m", like={}) == ({}, {})


def test_like_gives_the_treedef_of_any_framework(tmp_path):
    params, masks = random_model()
    save_sparse(tmp_path / "m", params, masks)
    frozen = FrozenDict(params)
    loaded, found = load_sparse(tmp_path / "m", like=frozen)
    assert jax.tree.structure(loaded) == jax.tree.structure(frozen) == jax.tree.structure(found)
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    kept = jaxprune.make_masks(state, 0.5, rule=rules.layer_sparsity)
    save_sparse(tmp_path / "n", state, kept)
    loaded, found = load_sparse(tmp_path / "n", like=jax.eval_shape(lambda: state))
    assert jax.tree.structure(loaded) == jax.tree.structure(state)
    expected = jaxprune.apply_masks(state, kept)
    for got, want in zip(jax.tree.leaves((loaded, found)), jax.tree.leaves((expected, kept)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_like_gives_the_shardings(tmp_path):
    params, masks = random_model()
    params["dense"]["kernel"] = params["dense"]["kernel"][:24]
    masks["dense"]["kernel"] = masks["dense"]["kernel"][:24]
    save_sparse(tmp_path / "m", params, masks)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("d"))
    like = jax.tree.map(jnp.asarray, params)
    like["dense"]["kernel"] = jax.device_put(params["dense"]["kernel"], sharding)
    loaded, found = load_sparse(tmp_path / "m", like=like)
    assert loaded["dense"]["kernel"].sharding == found["dense"]["kernel"].sharding == sharding
    np.testing.assert_array_equal(loaded["dense"]["kernel"], jaxprune.apply_masks(params, masks)["dense"]["kernel"])


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": np.zeros((2, 3), np.float32)}, r"no tensor 'a' for like\['a'\]; it has 'kernel'"),
        (
            {"kernel": np.zeros((3, 2), np.float32)},
            r"like\['kernel'\] an array of float32\[2, 3\], not of float32\[3, 2\]",
        ),
        ({"kernel": np.zeros((2, 3), np.float16)}, r"like\['kernel'\].*float32\[2, 3\], not of float16"),
        ({}, "no leaf for: 'kernel'"),
    ],
)
def test_like_must_fit(tmp_path, like, message):
    save_sparse(tmp_path / "m", {"kernel": np.zeros((2, 3), np.float32)})
    with pytest.raises(ValueError, match=message):
        load_sparse(tmp_path / "m", like=like)


def test_metadata_come_back(tmp_path):
    save_sparse(tmp_path / "m", {"w": jnp.zeros(2)}, metadata={"rule": "layer_sparsity", "k": "0.9"}, compress=True)
    assert storage.read_metadata(tmp_path / "m") == {"rule": "layer_sparsity", "k": "0.9"}


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (({"w": W}, {"w": np.ones((2, 3), bool)}), ValueError, r"params\['w'\] an array of bool\[2, 3\]"),
        (({"w": W}, {"v": W > 0}), ValueError, "no entry for"),
        (({"n": np.arange(2)}, {"n": np.array([True, False])}), ValueError, r"prunes params\['n'\].*int64"),
        (({"w": "text"},), TypeError, r"params\['w'\] is the string 'text'"),
        (({"key": jax.random.key(0)},), ValueError, r"params\['key'\] is a PRNG key"),
        (({"w": W.astype(ml_dtypes.int4)},), ValueError, r"params\['w'\] is int4"),
        (({"": W, "b": W},), ValueError, "empty path beside other leaves; rename it"),
        (({"..": W},), ValueError, r"params\['\.\.'\].*rename"),
        (({"a\nb": W},), ValueError, "cannot be printed"),
        (({"w": W, "w.scale": W}, {"w": W < 0, "w.scale": None}), ValueError, "'w.scale' would be read as a part of 'w'"),
        (({"w.bitmask": W},), ValueError, "'w.bitmask' would be read as a part of another"),
        (({"w": W, "w.weight": W}, {"w": W < 0, "w.weight": W < 0}), ValueError, "two tensors .* 'w.shape'"),
    ],
)  # fmt: skip
def test_what_cannot_be_saved_is_refused_by_name_and_nothing_is_written(tmp_path, arguments, kind, message):
    with pytest.raises(kind, match=message):
        save_sparse(tmp_path / "m", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("keywords", "kind", "message"),
    [
        ({"metadata": {"k": 0.9}}, TypeError, "'k' is 0.9"),
        ({"metadata": {"jaxprune": "x"}}, ValueError, "taken"),
        ({"quantize": 3}, ValueError, "8, 4 or None, not 3"),
        ({"quantize": True}, ValueError, "8, 4 or None, not True"),
    ],
)
def test_bad_options_are_refused(tmp_path, keywords, kind, message):
    with pytest.raises(kind, match=message):
        save_sparse(tmp_path / "m", {"w": W}, **keywords)


def test_traced_parameters_are_refused(tmp_path):
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda w: save_sparse(tmp_path / "m", {"w": w}))(W)


# Quantised


def test_quantised_values_by_hand(tmp_path):
    # Columns are output channels: their largest kept magnitudes are 127 and 254, their scales 1 and 2.
    kernel = np.array([[127.0, -3.0], [2.4, 254.0], [99.0, 5.1]], np.float32)
    mask = np.array([[True, True], [True, True], [False, True]])
    saved = save_sparse(tmp_path / "m", {"kernel": kernel}, {"kernel": mask}, quantize=8)
    found = raw(tmp_path / "m")
    assert found["kernel.scale"].tolist() == [[1.0, 2.0]]
    assert found["kernel.compressed"].dtype == np.int8
    assert found["kernel.compressed"].tolist() == [127, -2, 2, 127, 3]  # -1.5 goes to the even -2
    params, masks = load_sparse(tmp_path / "m")
    assert params["kernel"].tolist() == [[127.0, -4.0], [2.0, 254.0], [0.0, 6.0]]
    assert masks["kernel"].tolist() == mask.tolist()
    row = saved.tensors[0]
    assert row.largest_error == 1.0
    kept = np.where(mask, kernel, 0)
    assert row.relative_error == pytest.approx(np.linalg.norm(params["kernel"] - kept) / np.linalg.norm(kept), rel=1e-5)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    shape=hnp.array_shapes(min_dims=2, max_dims=4, min_side=1, max_side=7),
    dtype=st.sampled_from([np.float16, ml_dtypes.bfloat16, np.float32, np.float64]),
    size=st.sampled_from([1e-3, 1.0, 1e4]),
    width=st.sampled_from([4, 8]),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_no_weight_moves_by_more_than_half_its_channels_scale(tmp_path, shape, dtype, size, width, density, seed):
    rng = np.random.default_rng(seed)
    kernel = (size * rng.standard_normal(shape)).astype(dtype)
    mask = rng.random(shape) < density
    saved = save_sparse(tmp_path / "m", {"kernel": kernel}, {"kernel": mask}, quantize=width, force=True)
    params, masks = load_sparse(tmp_path / "m")
    np.testing.assert_array_equal(masks["kernel"], mask)
    kept = np.where(mask, kernel, np.zeros((), dtype)).astype(np.float64)
    largest = np.max(np.abs(kept), axis=tuple(range(len(shape) - 1)), keepdims=True)
    error = np.abs(np.asarray(params["kernel"], np.float64) - kept)
    # Half a step of a scale that was rounded up by at most 1 / 128, and the rounding of the dtype itself.
    step = largest / (2 ** (width - 1) - 1) * (1 + 1 / 128)
    rounding = float(ml_dtypes.finfo(dtype).eps) * largest + float(ml_dtypes.finfo(dtype).smallest_subnormal)
    assert (error <= 0.5 * step + rounding).all()
    assert saved.tensors[0].largest_error == pytest.approx(float(error.max()), rel=1e-3, abs=1e-9 * size)
    assert params["kernel"].dtype == np.dtype(dtype)
    assert (np.asarray(params["kernel"])[~mask] == 0).all()


def test_biases_and_embeddings_are_not_quantised_and_dense_kernels_are(tmp_path):
    params, _ = random_model()
    params["embedding"] = np.ones((4, 3), np.float32)
    save_sparse(tmp_path / "m", params, quantize=8)
    found = raw(tmp_path / "m")
    assert found["embedding"].dtype == found["dense/bias"].dtype == np.float32
    assert found["dense/kernel.compressed"].dtype == np.int8
    assert "dense/kernel.bitmask" not in found
    loaded, masks = load_sparse(tmp_path / "m")
    assert masks["dense"]["kernel"].all()
    np.testing.assert_allclose(loaded["dense"]["kernel"], params["dense"]["kernel"], atol=0.02)


def test_attention_kernels_have_a_scale_for_each_head_and_dimension(tmp_path):
    kernel = np.random.default_rng(0).standard_normal((8, 2, 3), np.float32)
    weight = np.random.default_rng(0).standard_normal((8, 5), np.float32)
    save_sparse(tmp_path / "m", {"query": {"kernel": kernel}, "linear.weight": weight}, quantize=4)
    found = raw(tmp_path / "m")
    assert found["query/kernel.scale"].shape == (1, 2, 3)
    assert found["linear.scale"].shape == (8, 1)
    assert found["query/kernel.compressed"].shape == (24,)


def test_two_codes_of_four_bits_share_a_byte(tmp_path):
    kernel = np.array([[7.0], [-7.0], [3.0]], np.float32)
    save_sparse(tmp_path / "m", {"kernel": kernel}, quantize=4)
    assert raw(tmp_path / "m")["kernel.compressed"].tolist() == [7 | (16 - 7) << 4, 3]
    assert load_sparse(tmp_path / "m")[0]["kernel"].tolist() == kernel.tolist()


def test_the_largest_numbers_survive_quantising(tmp_path):
    for dtype in (np.float16, np.float32, ml_dtypes.bfloat16):
        largest = float(ml_dtypes.finfo(dtype).max)
        save_sparse(tmp_path / "m", {"kernel": np.full((2, 2), largest, dtype)}, quantize=8, force=True)
        loaded = np.asarray(load_sparse(tmp_path / "m")[0]["kernel"], np.float64)
        np.testing.assert_allclose(loaded, largest, rtol=1e-2)


def test_what_is_not_finite_has_no_code_unless_it_is_pruned(tmp_path):
    kernel = np.array([[np.nan, 127.0]], np.float32)
    with pytest.raises(ValueError, match=r"params\['kernel'\] holds NaN"):
        save_sparse(tmp_path / "m", {"kernel": kernel}, quantize=8, force=True)
    save_sparse(tmp_path / "m", {"kernel": kernel}, {"kernel": np.array([[False, True]])}, quantize=8, force=True)
    assert load_sparse(tmp_path / "m")[0]["kernel"].tolist() == [[0.0, 127.0]]


# Compressed


def test_a_compressed_file_is_smaller_and_zstd_makes_a_safetensors_file_of_it(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    rng = np.random.default_rng(0)
    params = {"kernel": rng.standard_normal((200, 300), np.float32)}
    masks = jaxprune.make_masks(params, 0.9, rule=rules.layer_sparsity)
    bare = save_sparse(tmp_path / "bare", params, masks, quantize=8)
    small = save_sparse(tmp_path / "small", params, masks, quantize=8, compress=True)
    assert small.bytes < 0.75 * bare.bytes
    for a, b in zip(jax.tree.leaves(load_sparse(tmp_path / "bare")), jax.tree.leaves(load_sparse(tmp_path / "small")),
                    strict=True):  # fmt: skip
        np.testing.assert_array_equal(a, b)
    with open(tmp_path / "small", "rb") as file:
        expanded = zstandard.ZstdDecompressor().stream_reader(file).read()
    (tmp_path / "expanded").write_bytes(expanded)
    assert sorted(raw(tmp_path / "expanded")) == ["kernel.bitmask", "kernel.compressed", "kernel.scale", "kernel.shape"]


def test_without_the_library_the_message_says_what_to_install(tmp_path, monkeypatch):
    save_sparse(tmp_path / "m", {"w": W}, compress=True)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxprune\[storage\]'"):
        load_sparse(tmp_path / "m")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxprune\[storage\]'"):
        save_sparse(tmp_path / "n", {"w": W}, compress=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
