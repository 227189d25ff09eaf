"""GGUF files: names, layouts and blocks by the format's definition, there and back, own sizes, what is refused."""

import dataclasses
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import export, oneshot, storage
from jaxprune.export._language._functions import stretched
from tests.support.llama_models import CONFIG, CONFIGS, cut, make

LLAMA, QWEN2, QWEN3 = (CONFIGS[name] for name in ("llama", "qwen2", "qwen3"))
# Rows of 32 and 64, so that integers have whole blocks.
WIDE = CONFIG | {"hidden_size": 32, "intermediate_size": 64, "head_dim": 16, "vocab_size": 40, "model_type": "llama"}


def tensors(path) -> dict[str, np.ndarray]:
    """What the library's own reader and dequantisers find, by name."""
    return {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}  # fmt: skip


def fields(path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def paired(rows: np.ndarray, dim: int) -> np.ndarray:
    """Rows [heads * dim, ...] one after the other: of each head 0, dim / 2, 1, dim / 2 + 1, ..."""
    order = [
        head * dim + half * dim // 2 + i for head in range(len(rows) // dim) for i in range(dim // 2) for half in (0, 1)
    ]
    return rows[order]


def oracle(params, dim: int, *, pairs: bool) -> dict[str, np.ndarray]:
    """The tensors that a file should hold, as llama.cpp names and lays them out."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    found = {"token_embd.weight": params["embed"]["embedding"], "output_norm.weight": params["norm"]["scale"]}
    if "head" in params:
        found["output.weight"] = params["head"]["kernel"].T
    theirs = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}  # fmt: skip
    layers = sorted((name for name in params if name.startswith("layer_")), key=lambda name: int(name[6:]))
    for i, name in enumerate(layers):
        of = params[name]
        found[f"blk.{i}.attn_norm.weight"] = of["attention_norm"]["scale"]
        found[f"blk.{i}.ffn_norm.weight"] = of["mlp_norm"]["scale"]
        for ours, their in theirs.items():
            leaves = {"weight": of[f"{ours}_proj"]["kernel"].T}
            if "bias" in of[f"{ours}_proj"]:
                leaves["bias"] = of[f"{ours}_proj"]["bias"]
            for leaf, array in leaves.items():
                found[f"blk.{i}.{their}.{leaf}"] = paired(array, dim) if pairs and ours in "qk" else array
        for norm in "qk":
            if f"{norm}_norm" in of:
                found[f"blk.{i}.attn_{norm}_norm.weight"] = of[f"{norm}_norm"]["scale"]
    return found


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


ARCHITECTURES = {"llama": "llama", "llama with biases": "llama", "smollm2": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["F16", "BF16"])
def test_a_file_has_their_names_and_layouts_and_comes_back(name, kind, tmp_path):
    config, path = CONFIGS[name], tmp_path / "m.gguf"
    params = make(config, dtype={"F16": jnp.float16, "BF16": jnp.bfloat16}[kind])
    kinds = export.write_gguf(path, params, config, kind=kind)
    architecture = ARCHITECTURES[name]
    assert_same(tensors(path), oracle(params, config["head_dim"], pairs=architecture == "llama"))
    assert kinds == {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert {name: found for name, found in kinds.items() if found != kind} == {name: "F32" for name in kinds if "norm" in name or "bias" in name}  # fmt: skip
    found = {name.removeprefix(f"{architecture}."): value for name, value in fields(path).items()}
    expected = {
        "general.architecture": architecture, "general.file_type": {"F16": 1, "BF16": 32}[kind], "block_count": 3, "vocab_size": 24,
        "embedding_length": 16, "feed_forward_length": 20, "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.key_length": config["head_dim"], "attention.value_length": config["head_dim"],
        "rope.dimension_count": config["head_dim"], "rope.freq_base": 100.0, "context_length": 64,
        "attention.layer_norm_rms_epsilon": np.float32(1e-5), "tokenizer.ggml.model": "none", "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    back, config_back = export.read_gguf(path)
    jax.tree.map(np.testing.assert_array_equal, back, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {np.dtype(np.float32)}
    kept = {name: value for name, value in config_back.items() if config.get(name) != value}
    kept.pop("model_type") if name == "mistral" else None  # which is a llama there
    assert kept == ({} if config.get("tie_word_embeddings") else {"tie_word_embeddings": False})


def blocks(path, name: str, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The scales and the bytes of a tensor's blocks of 32."""
    data = next(tensor.data for tensor in gguf.GGUFReader(path).tensors if tensor.name == name)
    of_blocks = np.ascontiguousarray(data).reshape(-1, size)
    return of_blocks[:, :2].copy().view(np.float16).astype(np.float32), of_blocks[:, 2:]


def test_integers_are_blocks_of_32_with_a_scale_and_zeros_stay(tmp_path):
    params = make(WIDE | {"tie_word_embeddings": True})
    weights = params["layer_0"]["down_proj"]["kernel"]
    params["layer_0"]["down_proj"]["kernel"] = jnp.where(jnp.abs(weights) > 0.3, weights, 0)
    rows = np.asarray(params["layer_0"]["down_proj"]["kernel"]).T.reshape(-1, 32)
    largest = np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], 1)
    for kind, of_table in (("Q8_0", "Q8_0"), ("Q4_0", "Q8_0")):
        path = tmp_path / f"{kind}.gguf"
        kinds = export.write_gguf(path, params, WIDE, kind=kind)
        assert set(kinds.values()) == {kind, "F32", of_table}
        assert kinds["token_embd.weight"] == of_table
        if kind == "Q8_0":
            scales, codes = blocks(path, "blk.0.ffn_down.weight", 34)
            np.testing.assert_allclose(scales, np.abs(largest) / 127, rtol=1e-3)
            values = scales * codes.view(np.int8)
        else:
            scales, codes = blocks(path, "blk.0.ffn_down.weight", 18)
            np.testing.assert_allclose(scales, largest / -8, rtol=1e-3)  # the code -8 is the largest by magnitude
            values = scales * (np.concatenate([codes & 15, codes >> 4], axis=1).astype(np.float32) - 8)
        found, _ = export.read_gguf(path)
        np.testing.assert_array_equal(np.asarray(found["layer_0"]["down_proj"]["kernel"]).T.reshape(-1, 32), values)
        assert (values[rows == 0] == 0).all()
        # To the nearest code; the one at the other end of four bits is cut off by one.
        steps = np.abs(values - rows) / np.abs(scales)
        assert steps.max() <= (0.6 if kind == "Q8_0" else 1.1)
        assert np.median(steps) < 0.3
    assert fields(tmp_path / "Q4_0.gguf")["general.file_type"] == 2
    assert fields(tmp_path / "Q4_0.gguf")["general.quantization_version"] == 2


def test_rows_that_are_no_whole_blocks_are_float16(tmp_path):
    config = WIDE | {"intermediate_size": 40}
    kinds = export.write_gguf(tmp_path / "m.gguf", make(config), config, kind="Q4_0")
    assert {name for name, kind in kinds.items() if kind == "F16"} == {f"blk.{i}.ffn_down.weight" for i in range(3)}
    assert {kind for name, kind in kinds.items() if name.endswith(("gate.weight", "attn_q.weight"))} == {"Q4_0"}
    assert kinds["output.weight"] == "Q8_0"


@pytest.mark.parametrize("name", ["llama", "llama with biases", "qwen2"])
def test_layers_of_different_sizes_have_arrays_of_them(name, tmp_path):
    config, path = CONFIGS[name], tmp_path / "m.gguf"
    params = make(config, dtype=jnp.float16)
    smaller = cut(params, config, drop=1, inner=12, groups=1) | {"layer_2": params["layer_2"]}
    export.write_gguf(path, smaller, config, kind="F16")
    found = fields(path)
    assert found["general.architecture"] == "deci"
    assert [found[f"deci.{name}"] for name in ("feed_forward_length", "attention.head_count", "attention.head_count_kv")] == [[12, 20], [2, 4], [1, 2]]  # fmt: skip
    assert_same(tensors(path), oracle(smaller, 4, pairs=True))
    back, sizes = export.read_gguf(path)
    assert (sizes["model_type"], sizes["intermediate_size"]) == (config["model_type"], [12, 20])
    renumbered = {name: leaf for name, leaf in smaller.items() if name != "layer_2"} | {"layer_1": smaller["layer_2"]}
    jax.tree.map(np.testing.assert_array_equal, back, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), renumbered))
    # And again: the lists are as good as a number.
    export.write_gguf(tmp_path / "again.gguf", back, sizes, kind="F16")
    assert_same(tensors(tmp_path / "again.gguf"), tensors(path))


def test_a_qwen2_with_fewer_heads_is_a_llama_with_biases(tmp_path):
    smaller = cut(make(QWEN2, dtype=jnp.float16), QWEN2, drop=1, inner=12, groups=1)
    export.write_gguf(tmp_path / "m.gguf", smaller, QWEN2, kind="F16")
    assert fields(tmp_path / "m.gguf")["general.architecture"] == "llama"
    assert_same(tensors(tmp_path / "m.gguf"), oracle(smaller, 4, pairs=True))
    assert export.read_gguf(tmp_path / "m.gguf")[1]["model_type"] == "qwen2"


def test_a_model_goes_from_a_folder_to_a_file_and_back(tmp_path):
    params = make(LLAMA, dtype=jnp.float16)
    export.write_hugging_face(tmp_path / "one", params, LLAMA)
    export.write_gguf(tmp_path / "m.gguf", *export.read_hugging_face(tmp_path / "one"), kind="F16")
    back, config = export.read_gguf(tmp_path / "m.gguf")
    export.write_hugging_face(tmp_path / "two", back, config)
    jax.tree.map(np.testing.assert_array_equal, export.read_hugging_face(tmp_path / "two")[0], jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))  # fmt: skip


# Rotations


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip


def test_long_waves_are_stretched_and_short_ones_stay(tmp_path):
    # Wavelengths of 2 pi base**(2 i / 8), base 10,000: 6.28, 62.8, 628, 6283; so 10.19, 1.019, 0.10, 0.01 turns in 64.
    short, between, *long = stretched(LLAMA3, 10_000.0, 8)
    assert short == 1
    share = (64 / (2 * np.pi * 10) - 1) / 3
    assert between == pytest.approx(1 / ((1 - share) / 8 + share))
    assert long == [8, 8]
    config = LLAMA | {"rope_parameters": LLAMA3 | {"rope_theta": 10_000.0}, "head_dim": 8, "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    export.write_gguf(tmp_path / "m.gguf", make(config), config)
    np.testing.assert_array_equal(tensors(tmp_path / "m.gguf")["rope_freqs.weight"], np.float32([1, between, 8, 8]))
    assert fields(tmp_path / "m.gguf")["llama.rope.freq_base"] == 10_000.0
    with pytest.raises(storage.StorageError, match="stretched by rope_freqs.weight, other than in Llama 3.1"):
        export.read_gguf(tmp_path / "m.gguf")  # for a context of 64, which no factor says


def test_the_rotations_of_llama_3_come_back(tmp_path):
    rotations = LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}
    config = LLAMA | {"rope_theta": 500_000.0, "rope_scaling": rotations, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}  # fmt: skip
    export.write_gguf(tmp_path / "m.gguf", make(config), config)
    found = export.read_gguf(tmp_path / "m.gguf")[1]
    assert (found["rope_theta"], found["rope_scaling"]) == (500_000.0, rotations)


def test_positions_that_are_divided_stay_divided(tmp_path):
    config = LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}}
    export.write_gguf(tmp_path / "m.gguf", make(config), config)
    assert export.read_gguf(tmp_path / "m.gguf")[1]["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


# A tokenizer


def with_tokenizer(path, count: int = 24, **more) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("letters")
    writer.add_size_label("1M")
    writer.add_file_type(7)
    writer.add_block_count(99)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(count)])
    writer.add_token_scores([0.5] * count)
    writer.add_token_merges(["a b"])
    writer.add_add_bos_token(False)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def types(path) -> dict:
    return {name: field.types for name, field in gguf.GGUFReader(path).fields.items() if "tokenizer" in name}


def test_a_tokenizer_is_copied_from_another_file(tmp_path):
    source, path = tmp_path / "source.gguf", tmp_path / "m.gguf"
    with_tokenizer(source)
    export.write_gguf(path, make(LLAMA), LLAMA, source=source)
    found = fields(path)
    expected = {name: value for name, value in fields(source).items() if name.startswith("tokenizer.")}
    assert len(expected) == 5
    assert {name: value for name, value in found.items() if name.startswith("tokenizer.")} == expected
    assert (found["general.name"], found["general.file_type"], found["llama.block_count"]) == ("letters", 7, 3)
    assert "general.size_label" not in found
    assert types(path) == types(source)
    export.write_gguf(path, make(LLAMA), LLAMA, source=path, force=True)  # the file itself can be the source
    assert fields(path) == found
    with_tokenizer(source, count=23)
    with pytest.raises(ValueError, match="tokenizer of 23 tokens, and params 24"):
        export.write_gguf(path, make(LLAMA), LLAMA, source=source, force=True)
    export.write_gguf(source, make(LLAMA), LLAMA, force=True)
    with pytest.raises(storage.StorageError, match="source.gguf has no tokenizer"):
        export.write_gguf(path, make(LLAMA), LLAMA, source=source, force=True)


# What is refused


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (LLAMA, {"kind": "Q4_K"}, "kind is 'Q4_K'; known are F16, BF16, Q8_0, Q4_0"),
        (LLAMA | {"hidden_act": "gelu"}, {}, "hidden_act'] is 'gelu'; a GGUF file of this type has silu"),
        (LLAMA | {"rms_norm_eps": None}, {}, "rms_norm_eps'] is None, and no shape says it"),
        (LLAMA | {"max_position_embeddings": 0.5}, {}, "max_position_embeddings'] is 0.5"),
        (LLAMA | {"model_type": "mistral", "sliding_window": 8}, {}, "sliding window, .* Up to 8 tokens the model is the same"),
        (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, {}, "rotations of the type 'yarn'; known are linear, llama3"),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, {}, "'llama3' without low_freq_factor, high_freq_factor, original_max"),
        (LLAMA | {"model_type": "qwen3"}, {}, "params has no q_norm and k_norm; Qwen3ForCausalLM has them"),
        (LLAMA | {"model_type": "gpt2"}, {}, "config: model_type is 'gpt2'; known are"),
    ],
)  # fmt: skip
def test_what_a_file_has_no_field_for_is_refused(config, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export.write_gguf(tmp_path / "m.gguf", make(LLAMA), config, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_norms_of_heads_and_sizes_of_their_own_do_not_go_together(tmp_path):
    params = make(QWEN3)
    smaller = cut(params, QWEN3, drop=1, inner=12, groups=1) | {"layer_2": params["layer_2"]}
    with pytest.raises(ValueError, match=r"layers of different sizes.*norms of heads. Cut the same number"):
        export.write_gguf(tmp_path / "m.gguf", smaller, QWEN3)


@pytest.mark.parametrize(("value", "kind", "message"), [(np.nan, "Q8_0", "NaN or infinity"), (7e4, "F16", "7e.04, which is too large for F16")])  # fmt: skip
def test_weights_that_a_kind_cannot_hold_are_named_and_nothing_is_left(value, kind, message, tmp_path):
    params = make(LLAMA)
    params["layer_2"]["up_proj"]["kernel"] = params["layer_2"]["up_proj"]["kernel"].at[3, 4].set(value)
    with pytest.raises(ValueError, match=r"params\['layer_2'\]\['up_proj'\]\['kernel'\] holds " + message):
        export.write_gguf(tmp_path / "m.gguf", params, LLAMA, kind=kind)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_only_if_it_is_said(tmp_path):
    export.write_gguf(tmp_path / "m.gguf", make(LLAMA), LLAMA)
    with pytest.raises(FileExistsError, match="force=True"):
        export.write_gguf(tmp_path / "m.gguf", make(LLAMA), LLAMA)


def rewritten(path, target, *, drop=(), reshape=(), change=None, add=None, arch=None) -> None:
    """A file anew, without some tensors, with others misshapen, and with other fields."""
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, arch or "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            value = (change or {}).get(name, field.contents())
            writer.add_key_value(
                name, value, field.types[0] if not isinstance(value, list) else gguf.GGUFValueType.ARRAY
            )
    if add:
        name, value = add
        writer.add_uint16(name, value) if isinstance(value, int) else writer.add_string(name, value)
    for tensor in reader.tensors:
        if tensor.name not in drop:
            data = tensor.data[:-1] if tensor.name in reshape else tensor.data
            writer.add_tensor(tensor.name, np.ascontiguousarray(data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"drop": ["blk.1.ffn_up.weight"]}, "has no tensor 'blk.1.ffn_up.weight', which a llama of its sizes has"),
        ({"drop": ["token_embd.weight"]}, "has no tensor 'token_embd.weight'"),
        ({"reshape": ["blk.1.ffn_up.weight"]}, r"'blk.1.ffn_up.weight' has shape \[19, 16\]; by its sizes it should be \[20, 16\]"),
        ({"change": {"llama.block_count": 2}}, r"has blk.2.attn_k.weight, .* and 5 more, which a llama of its sizes has not"),
        ({"change": {"llama.attention.head_count": [4, 0, 4]}}, r"has attention.head_count \[4, 0, 4\], not a positive number"),
        ({"change": {"llama.block_count": 2**32 - 1}}, "has 30 tensors, and says that it has 4294967295 layers"),
        ({"change": {"llama.attention.head_count": [4, 4]}}, "has attention.head_count for 2 of 3 layers"),
        ({"change": {"llama.rope.freq_base": -1.0}}, "has rope.freq_base -1.0, not a positive number"),
        ({"change": {"llama.rope.dimension_count": 2}}, "has rope.dimension_count 2, other than the 4 features"),
        ({"add": ("split.count", 3)}, "is one of 3 parts; llama-gguf-split --merge"),
        ({"add": ("llama.rope.scaling.type", "yarn")}, "has rotations scaled as 'yarn'; known are linear"),
        ({"arch": "gemma"}, "has the architecture 'gemma'; known are llama, deci, qwen2, qwen3"),
        ({"arch": "qwen2"}, "does not say its qwen2.block_count"),
    ],
)  # fmt: skip
def test_a_file_of_another_model_is_refused_in_one_line(how, message, tmp_path):
    export.write_gguf(tmp_path / "m.gguf", make(LLAMA), LLAMA, kind="F16")
    rewritten(tmp_path / "m.gguf", tmp_path / "other.gguf", **how)
    with pytest.raises(storage.StorageError, match=message) as caught:
        export.read_gguf(tmp_path / "other.gguf")
    assert "\n" not in str(caught.value)


def test_what_is_no_whole_file_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    with pytest.raises(storage.StorageError, match="m.gguf is no file"):
        export.read_gguf(path)
    export.write_gguf(path, make(LLAMA), LLAMA)
    whole = path.read_bytes()
    for damaged in (b"", b"GGUF", b"something else", whole[:40], whole[:600], whole[: len(whole) // 2], whole[:-100]):
        path.write_bytes(damaged)
        with pytest.raises(storage.StorageError, match="m.gguf is no whole GGUF file"):
            export.read_gguf(path)


def test_without_the_library_its_command_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    for call in (lambda: export.read_gguf(tmp_path / "m.gguf"), lambda: export.write_gguf(tmp_path / "m.gguf", make(LLAMA), LLAMA)):  # fmt: skip
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxprune\[gguf\]'"):
            call()


def codes_of(params, bits: int) -> dict[str, oneshot.Codes]:
    """Integers of all kernels of the layers, with a scale for 32 inputs, and what they stand for."""
    rng, codes = np.random.default_rng(0), {}
    for name, layer in params.items():
        for module in [module for module in layer if module.endswith("_proj")] if name.startswith("layer_") else ():
            inputs, outputs = layer[module]["kernel"].shape
            scale = jnp.asarray(rng.integers(1, 200, (inputs // 32, outputs)) / 1024, jnp.float32)
            held = jnp.asarray(rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (inputs, outputs)), jnp.int8)
            found = oneshot.Codes(held, scale, jnp.zeros(scale.shape, jnp.int8), bits)
            codes[f"{name}/{module}/kernel"], layer[module]["kernel"] = found, found.values()
    return codes


@pytest.mark.parametrize(("bits", "kind"), [(4, "Q4_0"), (8, "Q8_0")])
def test_integers_are_written_as_they_are(bits, kind, tmp_path):
    params = make(WIDE)
    del params["layer_0"]  # the others are counted anew, their codes as well
    codes = codes_of(params, bits)
    kinds = export.write_gguf(tmp_path / "m.gguf", params, WIDE, kind="F16", codes=codes)
    assert {name for name, found in kinds.items() if found == kind} == {
        f"blk.{i}.{name}.weight" for i in (0, 1) for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    }  # fmt: skip
    held, expected = tensors(tmp_path / "m.gguf"), oracle(params, 16, pairs=True)
    for name, found in kinds.items():
        if found == kind:
            np.testing.assert_array_equal(held[name], expected[name], err_msg=name)
    again, _ = export.read_gguf(tmp_path / "m.gguf")
    np.testing.assert_array_equal(again["layer_0"]["q_proj"]["kernel"], params["layer_1"]["q_proj"]["kernel"])


def test_integers_that_blocks_cannot_hold_are_refused(tmp_path):
    params = make(WIDE)
    codes = codes_of(params, 4)
    path = "layer_0/up_proj/kernel"
    held = codes[path]
    refused = {
        "have 3 bits": dataclasses.replace(held, bits=3),
        r"scales \(1, 64\), and codes of zero": dataclasses.replace(held, zero_point=held.zero_point + 1),
        r"scales \(2, 64\)": dataclasses.replace(
            held, scale=jnp.ones((2, 64)), zero_point=jnp.zeros((2, 64), jnp.int8)
        ),
        "scales that float16 cannot hold": dataclasses.replace(held, scale=held.scale * 1e-7),
    }
    for message, wrong in refused.items():
        with pytest.raises(ValueError, match=r"params\['layer_0'\]\['up_proj'\]\['kernel'\].*" + message):
            export.write_gguf(tmp_path / "m.gguf", params, WIDE, codes={path: wrong})
    with pytest.raises(ValueError, match="'norm/scale', which is no kernel of a layer"):
        export.write_gguf(tmp_path / "m.gguf", params, WIDE, codes={"norm/scale": held})
    assert not list(tmp_path.iterdir())
