"""Files of few bytes: tables as integers, scales for groups of inputs, what stays floating-point in fewer bits."""

import json
import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jaxprune
from jaxprune import load_sparse, rules, save_sparse, storage
from jaxprune._cli._parser import main
from jaxprune._tree._prunable import is_table
from tests.support.storage_models import raw, torch_like

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def rounded_up(scale: float, dtype: np.dtype) -> float:
    """To 8 significant bits, and then to the next number of the dtype that is no smaller."""
    if scale == 0:
        return 0.0
    unit = 2.0 ** (math.floor(math.log2(scale)) + 1 - 8)
    found = math.ceil(scale / unit) * unit
    cast = np.array(found, dtype)
    return float(cast if cast >= np.float32(scale) else np.nextafter(cast, np.array(np.inf, dtype)))


def oracle(weights: np.ndarray, groups: list[np.ndarray], bits: int, dtype: np.dtype) -> np.ndarray:
    """What loads after each group, given by its flat indices, has been stored by a scale: one group after the other."""
    flat = weights.reshape(-1).astype(np.float32)
    found = np.zeros(flat.shape, dtype)
    most = 2 ** (bits - 1) - 1
    for group in groups:
        scale = rounded_up(float(np.max(np.abs(flat[group])) / np.float32(most)), dtype)
        if scale:
            codes = np.clip(np.rint(flat[group] / np.float32(scale)), -most, most)
            found[group] = (codes * np.float32(scale)).astype(dtype)
    return found.reshape(weights.shape)


def pieces(length: int, most: int) -> list[range]:
    """An axis cut into as few pieces as may be, of one length but for the last."""
    count = -(-length // most)
    each = -(-length // count)
    return [range(start, min(start + each, length)) for start in range(0, length, each)]


# Groups


def test_groups_by_hand(tmp_path):
    # Five inputs in groups of at most two make three groups: two, two and one.
    kernel = np.array([[7.0, 1.0], [-3.2, 0.0], [14.0, 0.0], [4.0, 0.0], [0.5, 21.0]], np.float32)
    save_sparse(tmp_path / "m", {"kernel": kernel}, quantize=4, group_size=2)
    found = raw(tmp_path / "m")
    scale = np.array([[1.0, 1 / 7], [2.0, 0.0], [0.5 / 7, 3.0]])
    np.testing.assert_allclose(found["kernel.scale"], scale, rtol=1 / 128)  # rounded up to 8 bits
    assert (found["kernel.scale"] >= scale.astype(np.float32)).all()
    params, _ = load_sparse(tmp_path / "m")
    assert params["kernel"][:4, 0].tolist() == [7.0, -3.0, 14.0, 4.0]
    assert params["kernel"][4, 1] == 21.0
    assert params["kernel"][2:4, 1].tolist() == [0.0, 0.0]
    # One scale a channel would have left nothing of the smallest input.
    save_sparse(tmp_path / "n", {"kernel": kernel}, quantize=4)
    assert load_sparse(tmp_path / "n")[0]["kernel"][4, 0] == 0.0 < params["kernel"][4, 0]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    shape=hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=19),
    name=st.sampled_from(["dense/kernel", "linear.weight"]),
    bits=st.sampled_from([4, 8]),
    group_size=st.integers(2, 12),
    dtype=st.sampled_from([None, "bfloat16", "float16"]),
    density=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_round_trip_equals_the_oracle(tmp_path, shape, name, bits, group_size, dtype, density, seed):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal(shape, np.float32)
    mask = rng.random(shape) < density
    saved = save_sparse(
        tmp_path / "m", {name: kernel}, {name: mask}, quantize=bits, group_size=group_size, dtype=dtype, force=True
    )
    params, masks = load_sparse(tmp_path / "m", like={name: jnp.zeros(shape, dtype or "float32")})
    places = np.arange(kernel.size).reshape(shape)
    places = places if name.endswith("kernel") else places.T  # inputs first
    groups = [places[list(piece), unit] for unit in range(places.shape[1]) for piece in pieces(len(places), group_size)]
    kept = np.where(mask, kernel, 0)
    expected = oracle(kept, groups, bits, params[name].dtype)
    np.testing.assert_array_equal(params[name], expected)
    np.testing.assert_array_equal(masks[name], mask)
    (row,) = saved.tensors
    error = expected.astype(np.float64) - kept
    assert row.largest_error == pytest.approx(np.max(np.abs(error)), rel=1e-5, abs=1e-12)
    if kept.any():
        assert row.relative_error == pytest.approx(np.linalg.norm(error) / np.linalg.norm(kept), rel=1e-4, abs=1e-9)
    assert row.dtype == str(params[name].dtype)


@pytest.mark.parametrize(
    ("path", "shape", "group_size", "scales"),
    [
        ("dense/kernel", (576, 4), 64, (9, 4)),
        ("dense/kernel", (576, 4), 128, (5, 4)),  # groups of 116, the last of 112
        ("model.layers.0.mlp.up_proj.weight", (4, 576), 64, (4, 9)),
        ("conv/kernel", (3, 3, 3, 8), 64, (1, 1, 1, 8)),  # the taps of so few channels fit into one group
        ("conv/kernel", (3, 3, 64, 8), 64, (3, 3, 1, 8)),
        ("conv/kernel", (3, 3, 20, 8), 64, (3, 1, 1, 8)),
        ("query/kernel", (100, 2, 8), 64, (2, 2, 8)),
        ("out/kernel", (9, 64, 5), 128, (5, 1, 5)),  # inputs are heads and their features: two heads a group
        ("embed/embedding", (10, 100), 64, (10, 2)),
    ],
)
def test_neighbours_in_memory_share_a_scale(tmp_path, path, shape, group_size, scales):
    rng = np.random.default_rng(0)
    save_sparse(
        tmp_path / "m",
        {path: rng.standard_normal(shape, np.float32)},
        quantize=8,
        quantize_tables=8 if "embed" in path else None,
        group_size=group_size,
    )
    assert raw(tmp_path / "m")[path.removesuffix(".weight") + ".scale"].shape == scales


# Tables


def test_a_table_has_a_scale_for_each_row_and_kernels_keep_their_values(tmp_path):
    table = np.array([[127.0, 1.0, -2.6], [0.0, 0.0, 0.0], [1.27, 0.01, 0.5]], np.float32)
    params = {
        "embed": {"embedding": table},
        "dense": {"kernel": np.ones((3, 2), np.float32)},
        "norm": {"scale": table[0]},
    }
    save_sparse(tmp_path / "m", params, quantize_tables=8)
    found = raw(tmp_path / "m")
    assert found["embed/embedding.scale"].shape == (3, 1)
    assert found["embed/embedding.compressed"].tolist()[:6] == [127, 1, -3, 0, 0, 0]
    loaded, _ = load_sparse(tmp_path / "m")
    expected = oracle(table, [np.arange(3) + 3 * row for row in range(3)], 8, np.dtype(np.float32))
    np.testing.assert_array_equal(loaded["embed"]["embedding"], expected)
    for module, name in (("dense", "kernel"), ("norm", "scale")):
        np.testing.assert_array_equal(loaded[module][name], params[module][name])


def test_tables_and_kernels_have_bits_of_their_own(tmp_path):
    rng = np.random.default_rng(0)
    params = {
        "wte.weight": rng.standard_normal((6, 8), np.float32),
        "fc.weight": rng.standard_normal((5, 8), np.float32),
    }
    masks = {"wte.weight": rng.random((6, 8)) < 0.5, "fc.weight": rng.random((5, 8)) < 0.5}
    saved = save_sparse(tmp_path / "m", params, masks, quantize=4, quantize_tables=8, force=True)
    assert {row.path: row.bits for row in saved.tensors} == {"wte.weight": 8, "fc.weight": 4}
    # Without, a table that is pruned is stored as the kernels are.
    saved = save_sparse(tmp_path / "m", params, masks, quantize=4, force=True)
    assert {row.path: row.bits for row in saved.tensors} == {"wte.weight": 4, "fc.weight": 4}


@pytest.mark.parametrize(
    ("path", "shape", "table"),
    [
        ("embed/embedding", (9, 4), True),
        ("linear/~/embed/embeddings", (9, 4), True),
        ("embedding/weight", (9, 4), True),
        ("model.embed_tokens.weight", (9, 4), True),
        ("transformer.wpe.weight", (9, 4), True),
        ("shared.weight", (9, 4), True),
        ("embeddings.word.weight", (9, 4), True),
        ("position", (9, 4), True),
        ("pos_embedding", (1, 9, 4), True),
        ("cls_token", (1, 1, 4), False),
        ("embeddings.LayerNorm.weight", (4,), False),
        ("embedding_norm/scale", (4,), False),
        ("pos_embed/bias", (2, 4), False),
        ("patch_embedding/kernel", (4, 4, 3, 8), False),
        ("lm_head.weight", (9, 4), False),
        ("dense/kernel", (9, 4), False),
    ],
)
def test_which_leaves_are_tables(path, shape, table):
    assert is_table(path, np.zeros(shape)) is table


# Fewer bits of what stays floating-point


def test_what_stays_floating_point_is_rounded_and_nothing_else_is(tmp_path):
    rng = np.random.default_rng(0)
    params = {
        "dense": {"kernel": rng.standard_normal((6, 5), np.float32), "bias": rng.standard_normal(5).astype(np.float64)},
        "norm": {"scale": np.array([1.0, np.nan, np.inf, 1 + 2**-9], np.float32)},
        "half": np.ones(3, np.float16),
        "eight": np.ones(3, ml_dtypes.float8_e5m2),
        "spectrum": np.ones(2, np.complex64),
        "step": np.int32(7),
    }
    masks = jaxprune.make_masks(params, 0.5, rule=rules.layer_sparsity)
    saved = save_sparse(tmp_path / "m", params, masks, dtype="bfloat16")
    loaded, found = load_sparse(tmp_path / "m")
    for values, mask, want in (
        (loaded["dense"]["kernel"], found["dense"]["kernel"], params["dense"]["kernel"]),
        (loaded["dense"]["bias"], found["dense"]["bias"], params["dense"]["bias"]),
        (loaded["norm"]["scale"], found["norm"]["scale"], params["norm"]["scale"]),
    ):
        assert values.dtype == BFLOAT16
        rounded = np.where(mask, want, 0).astype(BFLOAT16)
        np.testing.assert_array_equal(values.astype(np.float32), rounded.astype(np.float32))
    np.testing.assert_array_equal(found["dense"]["kernel"], masks["dense"]["kernel"])
    kept = {name: str(loaded[name].dtype) for name in ("half", "eight", "spectrum", "step")}
    assert kept == {"half": "float16", "eight": "float8_e5m2", "spectrum": "complex64", "step": "int32"}
    rows = {row.path: row for row in saved.tensors}
    assert rows["norm/scale"].largest_error == 2**-9  # to the even 1
    assert rows["norm/scale"].relative_error == pytest.approx(2**-9 / math.sqrt(2), rel=1e-2)
    assert rows["dense/kernel"].dtype == "bfloat16"
    assert rows["dense/kernel"].dense_bytes == 4 * 30
    assert rows["half"].largest_error == 0.0
    # A plain file of fewer bits.
    storage.convert_file(tmp_path / "m", tmp_path / "plain", dense=True, dtype="bfloat16")
    plain, _ = load_sparse(tmp_path / "plain")
    np.testing.assert_array_equal(plain["dense"]["kernel"], loaded["dense"]["kernel"])


def test_what_no_number_of_the_dtype_stands_for_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"params\['bias'\] holds 1e\+05, which is too large for float16"):
        save_sparse(tmp_path / "m", {"bias": np.array([1.0, -1e5], np.float32)}, dtype="float16")
    assert list(tmp_path.iterdir()) == []


# All of it


def small_model() -> tuple[dict, dict]:
    """A table, two kernels (one of which is pruned) and a norm."""
    rng = np.random.default_rng(0)
    params = {
        "embed": {"embedding": rng.standard_normal((50, 96), np.float32)},
        "up": {"kernel": rng.standard_normal((96, 33), np.float32)},
        "down": {"kernel": rng.standard_normal((33, 96), np.float32)},
        "norm": {"scale": rng.standard_normal(96, np.float32)},
    }
    masks = {name: {leaf: np.ones(array.shape, bool) for leaf, array in of.items()} for name, of in params.items()}
    masks["up"]["kernel"] = rng.random((96, 33)) < 0.5
    return params, masks


def test_the_bytes_of_a_file_are_those_of_the_formula(tmp_path):
    params, masks = small_model()
    saved = save_sparse(tmp_path / "m", params, masks, quantize=4, quantize_tables=8, group_size=64, dtype="bfloat16")
    kept = int(masks["up"]["kernel"].sum())
    shape = 2 * 8  # two numbers of int64
    table = 50 * 96 + 2 * (50 * 2) + shape  # codes, scales for two groups of 48 in each row
    up = -(-kept // 2) + 2 * (2 * 33) + 96 * -(-33 // 8) + 8 * 96 + shape  # and a bitmask with the offsets of its rows
    down = 33 * 96 // 2 + 2 * (1 * 96) + shape
    norm = 2 * 96
    content = (tmp_path / "m").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert len(content) == saved.bytes == header + table + up + down + norm
    assert {row.path: row.stored_bytes for row in saved.tensors} == {
        "embed/embedding": table,
        "up/kernel": up,
        "down/kernel": down,
        "norm/scale": norm,
    }
    assert saved.dense_bytes == 4 * (50 * 96 + 2 * 33 * 96 + 96)
    loaded, found = load_sparse(tmp_path / "m")
    assert {str(leaf.dtype) for of in loaded.values() for leaf in of.values()} == {"bfloat16"}
    np.testing.assert_array_equal(found["up"]["kernel"], masks["up"]["kernel"])


@pytest.mark.parametrize("folder", [False, True])
def test_a_file_is_converted_as_the_tree_is_saved_and_by_the_command_too(tmp_path, folder, capsys):
    model = torch_like(layers=2)
    source = tmp_path / "source" if folder else tmp_path / "source.safetensors"
    if folder:
        source.mkdir()
    safetensors.numpy.save_file(model, source / "1.safetensors" if folder else source)
    options = {"quantize": 4, "quantize_tables": 8, "group_size": 3, "dtype": "bfloat16"}
    saved = save_sparse(tmp_path / "saved", model, **options)
    storage.convert_file(source, tmp_path / "converted", **options)
    words = ["--quantize", "4", "--quantize-tables", "8", "--group-size", "3", "--dtype", "bfloat16"]
    assert main(["convert", str(source), str(tmp_path / "written"), *words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["tensors"]
    assert [(row["path"], row["stored_bytes"], row["dtype"]) for row in rows] == [
        (row.path, row.stored_bytes, row.dtype) for row in sorted(saved.tensors, key=lambda row: row.path)
    ]
    for name in ("converted", "written"):
        assert storage.diff_files(tmp_path / "saved", tmp_path / name) == []
    assert storage.summarize_file(tmp_path / "written").tensors[0].bits == 8  # embeddings.word.weight
    assert main(["prune", str(source), str(tmp_path / "pruned"), "--rule", "n_m", "--m", "4", "--k", "2", *words]) == 0
    dense = {name: values for name, values in model.items() if name.endswith("dense.weight")}
    masks = jaxprune.make_masks({name.replace(".", "/"): v for name, v in dense.items()}, 2, rule=rules.n_m(4))
    _, found = load_sparse(tmp_path / "pruned" / "1.safetensors" if folder else tmp_path / "pruned")
    for name in dense:  # chosen before anything was rounded
        np.testing.assert_array_equal(found[name], masks[name.replace(".", "/")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize_tables": 3}, "quantize_tables is 8, 4 or None, not 3"),
        ({"quantize_tables": True}, "quantize_tables is 8, 4 or None, not True"),
        ({"quantize_tables": 8}, "quantize_tables=8, but no leaf of .* is named like a table"),
        ({"quantize": 4, "group_size": 1}, "at least 2, or None; got 1"),
        ({"quantize": 4, "group_size": 64.0}, "at least 2, or None; got 64.0"),
        ({"group_size": 64}, "give quantize= or quantize_tables="),
        ({"dtype": "int8"}, "dtype is one of 'float32', 'float16', 'bfloat16' or None, not 'int8'"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(tmp_path, options, message):
    safetensors.numpy.save_file({"kernel": np.ones((4, 4), np.float32)}, tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        save_sparse(tmp_path / "m", {"kernel": np.ones((4, 4), np.float32)}, **options, force=True)
    with pytest.raises(ValueError, match=message):
        storage.convert_file(tmp_path / "source", tmp_path / "m", **options, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    safetensors.numpy.save_file({"kernel": np.ones((4, 4), np.float32)}, tmp_path / "source")
    for words, message in (
        (["--quantize-tables", "8", "--dense"], "--dense does not; choose one"),
        (["--quantize-tables", "8"], "no leaf of"),
        (["--group-size", "64"], "share a scale"),
    ):
        assert main(["convert", str(tmp_path / "source"), str(tmp_path / "m"), *words]) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert len(printed.splitlines()) == 1
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "source"), str(tmp_path / "m"), "--dtype", "float8"])


def test_each_layer_of_a_stack_has_its_own_scales(tmp_path):
    small = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    params = {"layers": {"kernel": np.stack([small, 1000 * small]), "bias": np.ones((2, 4), np.float32)}}
    shared = jaxprune.save_sparse(tmp_path / "shared.safetensors", params, quantize=8).tensors[1]
    own = jaxprune.save_sparse(tmp_path / "own.safetensors", params, quantize=8, stacked="layers", force=True).tensors[
        1
    ]
    found, _ = jaxprune.load_sparse(tmp_path / "own.safetensors")
    for layer, factor in enumerate((1, 1000)):
        alone = jaxprune.save_sparse(tmp_path / "one.safetensors", {"kernel": factor * small}, quantize=8, force=True)
        one, _ = jaxprune.load_sparse(alone.path)
        np.testing.assert_array_equal(found["layers"]["kernel"][layer], one["kernel"])
    assert own.path == "layers/kernel"
    assert own.stored_bytes == shared.stored_bytes + 4 * 4  # one more scale for each output
    grouped = jaxprune.save_sparse(
        tmp_path / "grouped.safetensors", params, quantize=8, stacked=lambda path, _: 1, group_size=3
    )
    assert grouped.tensors[1].stored_bytes == own.stored_bytes + 4 * 2 * 4  # two groups of inputs in place of one
    with pytest.raises(ValueError, match="stacked='blocks'"):
        jaxprune.save_sparse(tmp_path / "own.safetensors", params, quantize=8, stacked="blocks", force=True)
