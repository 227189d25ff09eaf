"""Folders of compressed-tensors: their tensors by the format's definition, what is read back, what is refused."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxprune import export, load_sparse, oneshot, storage
from jaxprune.export._compressed import _words
from jaxprune.export._compressed._words import pack_words, unpack_words


def test_four_bits_are_eight_codes_in_a_word_the_first_in_the_lowest():
    # Above -8: 0, 15, 8, 9, 7.
    words = pack_words(np.array([[-8, 7, 0, 1, -1]], np.int8), 4)
    assert words.tolist() == [[0x798F0]]


def test_three_bits_go_on_in_the_next_word():
    # Above -4: ten times 0, then 7: two of its bits end the first word, one begins the second.
    codes = np.array([[-4] * 10 + [3]], np.int8)
    assert pack_words(codes, 3).tolist() == [[-(2**30), 1]]


@given(st.data(), st.integers(1, 8))
def test_packing_is_a_string_of_bits_in_each_row_and_undone(data, bits):
    limits = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    shape = st.tuples(st.integers(0, 4), st.integers(0, 70))
    codes = data.draw(arrays.arrays(np.int8, shape, elements=limits))
    packed = pack_words(codes, bits)
    count = -(-codes.shape[1] * bits // 32)
    assert (packed.dtype, packed.shape) == (np.int32, (len(codes), count))
    for row, words in zip(codes.tolist(), packed, strict=True):
        number = sum((code + 2 ** (bits - 1)) << (bits * i) for i, code in enumerate(row))
        assert words.tobytes() == number.to_bytes(4 * count, "little")
    np.testing.assert_array_equal(unpack_words(packed, codes.shape[1], bits), codes)


def codes_of(inputs, outputs, bits=4, groups=1, symmetric=True, transposed=False) -> oneshot.Codes:
    rng = np.random.default_rng(bits)
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    draw = lambda *shape: rng.integers(least, most, shape, np.int8, endpoint=True)  # noqa: E731
    zero = np.zeros((groups, outputs), np.int8) if symmetric else draw(groups, outputs)
    scale = rng.integers(1, 256, (groups, outputs)).astype(np.float32) / 256
    turn = np.transpose if transposed else np.asarray
    return oneshot.Codes(*(jnp.asarray(turn(part)) for part in (draw(inputs, outputs), scale, zero)), bits)


def values_of(codes: oneshot.Codes, dtype=np.float32) -> np.ndarray:
    """The numbers, and exact zeros for every third of them, under a mask."""
    held, scale, zero = (np.asarray(part) for part in (codes.codes, codes.scale, codes.zero_point))
    wide = [
        np.kron(part, np.ones([-(-n // s) for n, s in zip(held.shape, part.shape, strict=True)]))
        for part in (scale, zero)
    ]
    return ((held - wide[1]) * wide[0]).astype(dtype)


def found_of(tree: dict, dtype=np.float32) -> oneshot.Quantized:
    """A tree of codes and of plain arrays, by path."""
    params = {path: values_of(leaf, dtype) if isinstance(leaf, oneshot.Codes) else leaf for path, leaf in tree.items()}
    masks = {path: leaf != 0 for path, leaf in params.items()}
    codes = {path: leaf for path, leaf in tree.items() if isinstance(leaf, oneshot.Codes)}
    return oneshot.Quantized(params, masks, codes)


def test_the_tensors_and_the_configuration_by_hand(tmp_path):
    held = np.array([[-8, 7], [1, 0], [2, 2], [-1, 3]], np.int8)  # [inputs, outputs], groups of two
    scale, zero = np.array([[0.5, 1.0], [2.0, 4.0]], np.float32), np.array([[0, -8], [1, 7]], np.int8)
    codes = oneshot.Codes(*map(jnp.asarray, (held, scale, zero)), 4)
    params = {"mlp": {"up": {"kernel": values_of(codes)}}, "norm": {"scale": np.ones(2, np.float32)}}
    saved = export.write_compressed_tensors(tmp_path, oneshot.Quantized(params, None, {"mlp/up/kernel": codes}))
    tensors, _ = load_sparse(tmp_path / "model.safetensors")
    assert {name: np.asarray(tensor).tolist() for name, tensor in tensors.items()} == {
        "mlp.up.weight_packed": [[0x7A90], [0xBA8F]],
        "mlp.up.weight_scale": [[0.5, 2.0], [1.0, 4.0]],
        "mlp.up.weight_shape": [2, 4],
        "mlp.up.weight_zero_point": [[0x08, 0xF9]],  # of both outputs, a column for each group
        "norm.scale": [1.0, 1.0],
    }
    assert tensors["mlp.up.weight_packed"].dtype == tensors["mlp.up.weight_zero_point"].dtype == np.int32
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["mlp.up"],
                    "weights": {
                        "num_bits": 4,
                        "type": "int",
                        "symmetric": False,
                        "strategy": "group",
                        "group_size": 2,
                        "dynamic": False,
                    },
                    "input_activations": None,
                    "output_activations": None,
                    "format": "pack-quantized",
                }
            },
            "ignore": [],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
    }
    assert storage.read_metadata(tmp_path / "model.safetensors") == {"format": "pt"}
    assert [(row.path, row.bits, row.largest_error) for row in saved.tensors] == [
        ("mlp/up/kernel", 4, 0),
        ("norm/scale", 32, 0),
    ]
    assert saved.bytes == sum(file.stat().st_size for file in tmp_path.iterdir())


@pytest.mark.parametrize("round_inputs", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_what_is_read_is_what_was_written(tmp_path, dtype, round_inputs):
    rng = np.random.default_rng(0)
    tree = {
        "a/kernel": codes_of(64, 40, 8),
        "b/kernel": codes_of(66, 7, 3, groups=11, symmetric=False),
        "c/weight": codes_of(12, 20, 4, groups=3, transposed=True),  # Equinox keeps (out, in)
        "conv/kernel": rng.integers(-1, 2, (3, 3, 2, 5)).astype(dtype),
        "head/kernel": rng.integers(-1, 2, (4, 6)).astype(dtype),
        "norm/scale": np.arange(4, dtype=dtype),
        "steps": np.int32(3),
    }
    found = found_of(tree, dtype)
    found.masks["steps"] = None
    export.write_compressed_tensors(tmp_path, found, round_inputs=round_inputs)
    plain, _ = load_sparse(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(plain["conv.weight"], tree["conv/kernel"].transpose(3, 2, 0, 1))
    np.testing.assert_array_equal(plain["head.weight"], tree["head/kernel"].T)
    like = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in found.params.items()}
    again = export.read_compressed_tensors(tmp_path, like=like)
    for path, leaf in tree.items():
        assert again.params[path].dtype == found.params[path].dtype, path
        np.testing.assert_array_equal(again.params[path], found.params[path], path)
        np.testing.assert_array_equal(again.masks[path], True if path == "steps" else found.masks[path], path)
        if path in found.codes:
            jax.tree.map(np.testing.assert_array_equal, again.codes[path], leaf)
    assert again.codes.keys() == found.codes.keys()
    bare = export.read_compressed_tensors(tmp_path)
    np.testing.assert_array_equal(bare.params["a"]["kernel"], found.params["a/kernel"])


def test_what_masks_prune_is_zero_whatever_the_tree_holds(tmp_path):
    found = found_of({"a/kernel": codes_of(8, 4), "b/kernel": np.ones((2, 2), np.float32)})
    found.masks["b/kernel"] = np.array([[True, False], [True, True]])
    export.write_compressed_tensors(tmp_path, found)
    plain, _ = load_sparse(tmp_path / "model.safetensors")
    assert np.asarray(plain["b.weight"]).tolist() == [[1.0, 1.0], [0.0, 1.0]]


def test_names_and_the_rest_of_the_configuration_are_given(tmp_path):
    found = found_of({"up/kernel": codes_of(8, 4), "table": np.ones((3, 2), np.float32)})
    names = {"up/kernel": "model.layers.0.up_proj.weight", "table": "model.embed_tokens.weight"}
    export.write_compressed_tensors(tmp_path, found, names=names.__getitem__, config={"model_type": "llama"})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["quantization_config"]["config_groups"]["group_0"]["targets"] == ["model.layers.0.up_proj"]
    assert set(load_sparse(tmp_path / "model.safetensors")[0]) >= {
        "model.layers.0.up_proj.weight_packed",
        names["table"],
    }
    assert export.read_compressed_tensors(tmp_path).params.keys() == {"up", "table"}
    (tmp_path / "masks.jaxprune").unlink()  # as by another program: its names, nothing known of masks
    others = export.read_compressed_tensors(tmp_path)
    np.testing.assert_array_equal(others.params["model"]["layers"]["0"]["up_proj"]["kernel"], found.params["up/kernel"])
    assert others.codes.keys() == {"model/layers/0/up_proj/kernel"}
    assert np.all(others.masks["model"]["layers"]["0"]["up_proj"]["kernel"])


STACKED = oneshot.Codes(jnp.zeros((2, 4, 4), jnp.int8), jnp.ones((2, 1, 4)), jnp.zeros((2, 1, 4), jnp.int8), 4)
SHARED = oneshot.Codes(jnp.zeros((4, 4), jnp.int8), jnp.ones((1, 2)), jnp.zeros((1, 2), jnp.int8), 4)


@pytest.mark.parametrize(
    ("codes", "path", "match"),
    [
        (
            STACKED,
            "a/kernel",
            r"codes of params\['a/kernel'\] are of shape \(2, 4, 4\); .* for matrices only. Take its entry out",
        ),
        (
            codes_of(10, 4, groups=4),
            "a/kernel",
            r"4 scales for 10 inputs; .* Choose a group_size that divides 10, or take",
        ),
        (SHARED, "a/kernel", r"have scales \(1, 2\) that outputs share"),
        (codes_of(4, 4), "kernel", r"'weight' is not the name of a module's weight"),
        (codes_of(4, 4), "a/w", r"'a\.w' is not the name of a module's weight, '<module>.weight'. Give names="),
    ],
)
def test_codes_that_the_format_has_no_words_for_are_refused(tmp_path, codes, path, match):
    found = oneshot.Quantized({path: np.asarray(codes.values())}, None, {path: codes})
    with pytest.raises(ValueError, match=match):
        export.write_compressed_tensors(tmp_path / "model", found)
    assert not (tmp_path / "model").exists()


def test_what_does_not_belong_together_is_refused(tmp_path):
    found = found_of({"a/kernel": codes_of(8, 4)})
    write = lambda found: export.write_compressed_tensors(tmp_path / "model", found)  # noqa: E731
    with pytest.raises(ValueError, match=r"No leaf of params has codes; jaxprune.save_sparse"):
        write(found._replace(codes={}))
    with pytest.raises(ValueError, match=r"codes has for 'b/kernel' .* which is no leaf's"):
        write(found._replace(codes={"b/kernel": found.codes["a/kernel"]}))
    with pytest.raises(ValueError, match=r"codes of params\['a/kernel'\] keep weights that masks prune"):
        write(found._replace(masks={"a/kernel": np.zeros((8, 4), bool)}))
    with pytest.raises(TypeError, match=r"takes an oneshot.Quantized; got a dict"):
        write(found.params)
    write(found)
    with pytest.raises(FileExistsError, match=r"force=True replaces it"):
        write(found)
    (tmp_path / "model" / "model.safetensors.index.json").touch()
    with pytest.raises(
        FileExistsError, match=r"holds model.safetensors.index.json beside model.safetensors, which readers take"
    ):
        export.write_compressed_tensors(tmp_path / "model", found, force=True)


def changed(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["weights"] |= entries.pop("weights", {})
    group |= entries
    (folder / "config.json").write_text(json.dumps(config))


def other_masks(folder):
    other = found_of({"a/kernel": codes_of(8, 4, bits=5)})
    other.masks["a/kernel"] = ~other.masks["a/kernel"]
    pruned = other._replace(
        params={"a/kernel": 0 * other.params["a/kernel"]}, codes={"a/kernel": codes_of(8, 4, bits=5)}
    )
    zeros = jax.tree.map(jnp.zeros_like, pruned.codes["a/kernel"].codes)
    export.write_compressed_tensors(
        folder / "other",
        pruned._replace(codes={"a/kernel": oneshot.Codes(zeros, jnp.ones((1, 4)), jnp.zeros((1, 4), jnp.int8), 5)}),
    )
    (folder / "other" / "masks.jaxprune").replace(folder / "masks.jaxprune")


DAMAGE = {
    "no configuration": (lambda f: (f / "config.json").write_text("{}"), "has no quantization_config of compressed-tensors"),
    "other integers": (lambda f: changed(f, weights={"num_bits": 7}), r"\(4, 8\) has int32\[4, 1\], no matrix of 7-bit integers"),
    "floats": (lambda f: changed(f, weights={"type": "float"}), r"'a\.weight' has weights of 'float' and 4 bits, not integers"),
    "a scale of all": (lambda f: changed(f, weights={"strategy": "tensor"}), r"scales of the strategy 'tensor'"),
    "other groups": (lambda f: changed(f, weights={"strategy": "group", "group_size": 4}), r"has scales of float32\[4, 1\], which"),
    "other modules": (lambda f: changed(f, targets=["b"]), r"'a\.weight' is none of the modules that config.json has a scheme for"),
    "cut off": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-3]), "has .* bytes"),
    "cut off masks": (lambda f: (f / "masks.jaxprune").write_bytes(b"12"), r"masks.jaxprune: is no whole safetensors file"),
    "other masks": (other_masks, r"masks.jaxprune prunes weights of 'a\.weight' that model.safetensors keeps"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folders_are_refused_in_a_line(tmp_path, name):
    damage, match = DAMAGE[name]
    export.write_compressed_tensors(tmp_path, found_of({"a/kernel": codes_of(8, 4)}))
    damage(tmp_path)
    with pytest.raises(storage.StorageError, match=match):
        export.read_compressed_tensors(tmp_path)


def test_modules_are_named_by_patterns_and_classes_too(tmp_path):
    export.write_compressed_tensors(tmp_path, found_of({"a/kernel": codes_of(8, 4)}))
    for target in ("re:.*a$", "Linear"):
        changed(tmp_path, targets=[target])
        assert export.read_compressed_tensors(tmp_path).codes["a/kernel"].bits == 4


def test_packing_goes_piece_by_piece(monkeypatch):
    codes = np.random.default_rng(0).integers(-4, 4, (9, 21)).astype(np.int8)
    whole = pack_words(codes, 3)
    monkeypatch.setattr(_words, "_PIECE", 50)
    np.testing.assert_array_equal(pack_words(codes, 3), whole)
    np.testing.assert_array_equal(unpack_words(whole, 21, 3), codes)
