"""Folders of Hugging Face's library: names and layouts by hand, there and back, cut configurations, what is refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jaxprune import export, oneshot, rules, storage
from jaxprune.export._compressed._words import unpack_words
from tests.support.llama_models import CONFIGS, cut, make, stack

LLAMA, QWEN2, MISTRAL = (CONFIGS[name] for name in ("llama", "qwen2", "mistral"))
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}  # fmt: skip


def oracle(params) -> dict[str, np.ndarray]:
    """The tensors that a folder should hold, as the classes of the library name and lay them out."""
    params = jax.tree.map(np.asarray, params)
    found = {"model.embed_tokens.weight": params["embed"]["embedding"], "model.norm.weight": params["norm"]["scale"]}
    if "head" in params:
        found["lm_head.weight"] = params["head"]["kernel"].T
    layers = sorted((name for name in params if name.startswith("layer_")), key=lambda name: int(name[6:]))
    for i, name in enumerate(layers):
        of = params[name]
        found[f"model.layers.{i}.input_layernorm.weight"] = of["attention_norm"]["scale"]
        found[f"model.layers.{i}.post_attention_layernorm.weight"] = of["mlp_norm"]["scale"]
        for within, modules in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down"))):
            for module in modules:
                found[f"model.layers.{i}.{within}.{module}_proj.weight"] = of[f"{module}_proj"]["kernel"].T
                if "bias" in of[f"{module}_proj"]:
                    found[f"model.layers.{i}.{within}.{module}_proj.bias"] = of[f"{module}_proj"]["bias"]
        for norm in ("q_norm", "k_norm"):
            if norm in of:
                found[f"model.layers.{i}.self_attn.{norm}.weight"] = of[norm]["scale"]
    return found


def tensors(folder) -> dict[str, np.ndarray]:
    return {name: array for path in folder.glob("*.safetensors") for name, array in safetensors.numpy.load_file(path).items()}  # fmt: skip


def assert_same(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_has_their_names_and_layouts_and_comes_back(name, tmp_path):
    config = CONFIGS[name]
    params = make(config)
    written = export.write_hugging_face(tmp_path / "m", params, config, max_shard_bytes=6_000)
    assert_same(tensors(tmp_path / "m"), oracle(params))
    assert written == json.loads((tmp_path / "m/config.json").read_text())
    assert written["architectures"] == [ARCHITECTURES[config["model_type"]]]
    assert {name: written[name] for name in config} == config  # nothing was cut
    assert (written["dtype"], written["tie_word_embeddings"]) == ("float32", "head" not in params)
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in oracle(params).values())
    shards = sorted(path.name for path in (tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards == [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for shard in shards:
        held = safetensors.numpy.load_file(tmp_path / "m" / shard)
        assert set(held) == {tensor for tensor, at in index["weight_map"].items() if at == shard}
        assert sum(array.nbytes for array in held.values()) <= 6_000
    assert_same_trees(*export.read_hugging_face(tmp_path / "m"), params, written)


def assert_same_trees(found, config, params, written) -> None:
    assert config == written
    jax.tree.map(np.testing.assert_array_equal, found, params)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_smaller_model_has_a_smaller_configuration(name, tmp_path):
    config = CONFIGS[name] | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
    smaller = cut(make(config, dtype=jnp.bfloat16), config, drop=1, inner=12, groups=1)
    written = export.write_hugging_face(tmp_path, smaller, config)
    assert_same(tensors(tmp_path), oracle(smaller))
    changed = {field: value for field, value in written.items() if config.get(field) != value}
    expected = {
        "architectures": [ARCHITECTURES[config["model_type"]]], "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": ["full_attention"] * 2, "dtype": "bfloat16",
    }  # fmt: skip
    expected |= {"tie_word_embeddings": False} if "head" in smaller else {}
    expected |= {} if name != "qwen3" else {"attention_bias": False}
    expected |= {} if name != "smollm2" else {"attention_bias": False, "mlp_bias": False}
    assert changed == expected
    renumbered = {name: leaf for name, leaf in smaller.items() if name != "layer_2"} | {"layer_1": smaller["layer_2"]}
    assert_same_trees(*export.read_hugging_face(tmp_path), renumbered, written)


def test_stacked_layers_are_written_as_a_loop(tmp_path):
    params = make(QWEN2)
    export.write_hugging_face(tmp_path / "loop", params, QWEN2)
    export.write_hugging_face(tmp_path / "stacked", stack(params), QWEN2)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "loop" / file).read_bytes() == (tmp_path / "stacked" / file).read_bytes()
    shallower = stack({name: leaf for name, leaf in params.items() if name != "layer_1"})
    alike, mixed = (
        QWEN2 | {"layer_types": ["full_attention", "full_attention", last]} for last in ("full_attention", "other")
    )
    written = export.write_hugging_face(tmp_path / "shallower", shallower, alike)
    assert written["layer_types"] == ["full_attention"] * 2
    windows = QWEN2 | {"use_sliding_window": True, "max_window_layers": 2}
    for unclear in (mixed, windows):
        with pytest.raises(ValueError, match="2 stacked layers do not say which of 3"):
            export.write_hugging_face(tmp_path / "mixed", shallower, unclear)


def test_layers_whose_leaves_are_gone_do_not_count(tmp_path):
    params = make(LLAMA)
    assert export.write_hugging_face(tmp_path, params | {"layer_1": {}}, LLAMA)["num_hidden_layers"] == 2


def test_a_window_begins_behind_the_layers_that_are_left(tmp_path):
    config = QWEN2 | {"use_sliding_window": True, "max_window_layers": 2}
    for dropped, first in ((0, 1), (1, 1), (2, 2)):
        params = {name: leaf for name, leaf in make(config).items() if name != f"layer_{dropped}"}
        written = export.write_hugging_face(tmp_path, params, config, force=True)
        assert written["max_window_layers"] == first


def test_what_a_file_leaves_out_is_what_the_classes_have(tmp_path):
    params = make(LLAMA | {"num_key_value_heads": 4})
    written = export.write_hugging_face(tmp_path, params, LLAMA)
    edit(tmp_path, head_dim=None, num_key_value_heads=None)
    found, config = export.read_hugging_face(tmp_path)
    assert config == written | {"num_key_value_heads": None}
    assert_same_trees(found, config, params, config)


def test_a_tied_table_and_angles_that_are_there_twice_are_passed_over(tmp_path):
    params = make(CONFIGS["smollm2"])
    written = export.write_hugging_face(tmp_path, params, CONFIGS["smollm2"])
    twice = {
        "lm_head.weight": np.ones((24, 16), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2),
    }
    safetensors.numpy.save_file(tensors(tmp_path) | twice, tmp_path / "model.safetensors")
    assert_same_trees(*export.read_hugging_face(tmp_path), params, written)


def test_a_folder_that_was_pruned_on_disk_is_read(tmp_path):
    params = make(LLAMA)
    export.write_hugging_face(tmp_path / "m", params, LLAMA)
    storage.prune_file(tmp_path / "m/model.safetensors", tmp_path / "model.safetensors", 0.5, rule=rules.layer_sparsity)
    shutil.copy(tmp_path / "m/config.json", tmp_path)
    kernel = np.asarray(export.read_hugging_face(tmp_path)[0]["layer_0"]["up_proj"]["kernel"])
    dense = np.asarray(params["layer_0"]["up_proj"]["kernel"])
    median = np.sort(np.abs(dense).ravel())[dense.size // 2]
    np.testing.assert_array_equal(kernel, np.where(np.abs(dense) >= median, dense, 0))


# What a class cannot express


def changed(params, changes):
    """The parameters with other leaves at some paths; None for what goes."""
    params = jax.tree.map(lambda leaf: leaf, params)
    for path, shape in changes.items():
        *modules, last = path.split("/")
        within = params
        for module in modules:
            within = within.setdefault(module, {})
        if shape is None:
            del within[last]
        else:
            within[last] = jnp.zeros(shape, jnp.float32)
    return params


def widths(layer: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {f"layer_{layer}/{name}/kernel": (16, inner) for name in ("gate_proj", "up_proj")} | {f"layer_{layer}/down_proj/kernel": (inner, 16)}  # fmt: skip


def heads(count: int, kv: int, layers=(0, 1, 2)) -> dict[str, tuple[int, ...]]:
    kernels = {"q_proj": (16, 4 * count), "k_proj": (16, 4 * kv), "v_proj": (16, 4 * kv), "o_proj": (4 * count, 16)}
    return {f"layer_{i}/{name}/kernel": shape for i in layers for name, shape in kernels.items()}


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (LLAMA, widths(1, 12), r"layer 0 has intermediate_size 20 and layer 1 12.*LlamaForCausalLM has one for all.*Nearest are 12.*or 20"),
        (MISTRAL | {"head_dim": 4}, heads(2, 2, [2]), "layer 0 has num_attention_heads 4 and layer 2 2"),
        (LLAMA, heads(3, 1), r"3 heads; LlamaForCausalLM refuses a hidden_size \(16\).*Nearest are 2, 4 heads.*MistralForCausalLM"),
        (LLAMA, heads(3, 2), r"3 heads for 2 of keys and values.*nearest that do are 2, 4\."),
        (LLAMA, {"layer_0/q_proj/kernel": (16, 10)}, r"params\['layer_0'\]\['q_proj'\]\['kernel'\] has 10 outputs, which are no heads of 4"),
        (MISTRAL | {"head_dim": 4}, {f"layer_{i}/o_proj/bias": (16,) for i in range(3)}, "biases in o_proj, which MistralForCausalLM has not anywhere"),
        (LLAMA, {f"layer_{i}/o_proj/bias": (16,) for i in range(3)}, "no biases in k_proj, q_proj, v_proj; LlamaForCausalLM has them in all of .* Put zeros"),
        (QWEN2, {f"layer_{i}/q_proj/bias": None for i in range(3)}, "no biases in q_proj; Qwen2ForCausalLM"),
        (LLAMA, {"layer_1/o_proj/bias": (16,)}, r"params\['layer_1'\]\['o_proj'\]\['bias'\] has no place"),
        (LLAMA | {"model_type": "qwen3"}, {}, "no q_norm and k_norm; Qwen3ForCausalLM has them"),
        (LLAMA | {"model_type": "gpt2"}, {}, "config: model_type is 'gpt2'; known are llama, mistral, qwen2, qwen3"),
        (LLAMA | {"head_dim": None}, {}, r"config\['head_dim'\] is None"),
        (LLAMA, {"layer_1/q_proj/kernel": None}, "params has no layer_1/q_proj/kernel.*drop whole layers"),
        (LLAMA, {"layer_1/mlp_norm/scale": None}, "params has no layer_1/mlp_norm/scale"),
        (LLAMA, {"norm/scale": None}, "params has no norm/scale, which every Llama has"),
        (LLAMA, {"norm/scale": (15,)}, r"params\['norm'\]\['scale'\] has shape \(15,\); beside the other leaves it should be \(16,\)"),
        (LLAMA, {"layer_00/norm/scale": (2, 2)}, r"params\['layer_00'\]\['norm'\]\['scale'\] has no place"),
        (LLAMA, {"extra/kernel": (2, 2)}, r"params\['extra'\]\['kernel'\] has no place"),
        (LLAMA, {"layers/x": (2, 2)}, "layers should be layer_0, layer_1, ... or stacked"),
        (LLAMA, {"embed/embedding": (2, 16), "head/kernel": (16, 2)}, r"config\['eos_token_id'\] is 2, and params has 2 tokens"),
        (LLAMA | {"layer_types": ["full_attention"] * 2}, {}, "layer_types for 2 layers, and params a layer_2"),
    ],
)  # fmt: skip
def test_what_a_class_cannot_express_is_refused_with_what_is_nearest(config, changes, message, tmp_path):
    params = changed(make({**LLAMA, "model_type": "qwen2" if config is QWEN2 else "llama"}), changes)
    with pytest.raises(ValueError, match=message):
        export.write_hugging_face(tmp_path / "m", params, config)
    assert list(tmp_path.iterdir()) == []


def test_leaves_are_floating_point_and_known(tmp_path):
    params = make(LLAMA)
    with pytest.raises(ValueError, match=r"params\['norm'\]\['scale'\] is int32, not real and floating-point"):
        export.write_hugging_face(tmp_path / "m", params | {"norm": {"scale": jnp.ones(16, jnp.int32)}}, LLAMA)
    with pytest.raises(ValueError, match="is traced; write outside jit"):
        jax.jit(lambda params: export.write_hugging_face(tmp_path / "m", params, LLAMA))(params)
    with pytest.raises(TypeError, match="config is str"):
        export.write_hugging_face(tmp_path / "m", params, "config.json")


# Folders


def edit(folder, **changes) -> None:
    """Change the configuration on disk."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: (m / "config.json").unlink(), "m is no folder of a model: it has no config.json"),
        (lambda m: (m / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda m: (m / "config.json").write_text("[]"), "config.json is not a JSON object"),
        (lambda m: edit(m, model_type="bert"), "config.json: model_type is 'bert'; known are"),
        (lambda m: edit(m, hidden_size="16"), "config.json: hidden_size is '16', not a whole number"),
        (lambda m: edit(m, head_dim=3), "config.json: head_dim is 3, not an even number"),
        (lambda m: edit(m, quantization_config={}), "quantised"),
        (lambda m: edit(m, num_hidden_layers=4), "no tensor model.layers.3.input_layernorm.weight, .* and 5 more, which a Llama"),
        (lambda m: edit(m, num_hidden_layers=10**12), "has 30 tensors, and its config.json says 1000000000000 layers"),
        (lambda m: edit(m, num_hidden_layers=2), "has model.layers.2.input_layernorm.weight, .* which a LlamaForCausalLM of its config.json has not"),
        (lambda m: edit(m, intermediate_size=21), r"tensor 'model.layers.0.mlp.gate_proj.weight' has shape \[20, 16\]; by config.json it should be \[21, 16\]"),
        (lambda m: edit(m, model_type="qwen3"), "no tensor model.layers.0.self_attn.k_norm.weight"),
        (lambda m: next(m.glob("*-00002-*")).unlink(), "names 'model-00002-of-.*which is not in the folder"),
        (lambda m: [path.unlink() for path in m.glob("model*")], "a folder without .*safetensors files"),
        (lambda m: next(m.glob("*-00002-*")).write_bytes(b"cut off"), "no whole safetensors file"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_in_one_line(damage, message, tmp_path):
    export.write_hugging_face(tmp_path / "m", make(LLAMA), LLAMA, max_shard_bytes=6_000)
    damage(tmp_path / "m")
    with pytest.raises(storage.StorageError, match=message) as caught:
        export.read_hugging_face(tmp_path / "m")
    assert "\n" not in str(caught.value)


def test_what_is_no_folder_is_refused(tmp_path):
    with pytest.raises(storage.StorageError, match="missing is no folder of a model"):
        export.read_hugging_face(tmp_path / "missing")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="force=True replaces it"):
        export.write_hugging_face(tmp_path / "file", make(LLAMA), LLAMA)
    with pytest.raises(ValueError, match="file is a file, which is not replaced by a folder"):
        export.write_hugging_face(tmp_path / "file", make(LLAMA), LLAMA, force=True)
    with pytest.raises(ValueError, match="max_shard_bytes is 0"):
        export.write_hugging_face(tmp_path / "m", make(LLAMA), LLAMA, max_shard_bytes=0)


def test_tensors_that_are_no_numbers_are_refused(tmp_path):
    export.write_hugging_face(tmp_path, make(LLAMA), LLAMA)
    held = tensors(tmp_path)
    safetensors.numpy.save_file(held | {"model.norm.weight": np.ones(16, np.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(storage.StorageError, match="'model.norm.weight' is int8, not floating-point"):
        export.read_hugging_face(tmp_path)


def test_a_tokenizer_is_copied_untouched_or_missed_in_one_line(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "model.safetensors").write_bytes(b"not copied")
    (source / "tokenizer_config.json").write_text("{}")
    with pytest.raises(storage.StorageError, match="source has no tokenizer: there is none of tokenizer.json,"):
        export.write_hugging_face(target, make(LLAMA), LLAMA, tokenizer=source)
    assert not target.exists()
    (source / "tokenizer.json").write_bytes(b'{"model": "\xc3\xa4"}')
    export.write_hugging_face(target, make(LLAMA), LLAMA, tokenizer=source)
    assert (target / "tokenizer.json").read_bytes() == b'{"model": "\xc3\xa4"}'
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in target.iterdir()} == names
    # The folder itself can be the source.
    export.write_hugging_face(target, make(LLAMA, seed=1), LLAMA, tokenizer=target, force=True)
    assert {path.name for path in target.iterdir()} == names


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    params, target = make(LLAMA), tmp_path / "new" / "m"
    broken = params | {"head": {"kernel": jnp.ones((16, 24), jnp.float32)}}
    broken["head"]["kernel"].delete()
    with pytest.raises(RuntimeError, match="deleted"):
        export.write_hugging_face(target, broken, LLAMA)
    assert list((tmp_path / "new").iterdir()) == []
    export.write_hugging_face(target, params, LLAMA)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(FileExistsError, match="m is there already; force=True replaces it"):
        export.write_hugging_face(target, params, LLAMA)
    with pytest.raises(RuntimeError, match="deleted"):
        export.write_hugging_face(target, broken, LLAMA, force=True)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    (target / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match=r"m holds notes.md beside a model, which would go with it"):
        export.write_hugging_face(target, params, LLAMA, force=True)
    (target / "notes.md").unlink()
    export.write_hugging_face(target, params, LLAMA, max_shard_bytes=6_000, force=True)
    assert not (target / "model.safetensors").exists()  # of the model that was there nothing is left
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["m"]
    assert_same(tensors(target), oracle(params))


def rounded(params, prefix: str) -> dict[str, oneshot.Codes]:
    """Codes of 4 bits of the perceptrons' kernels, with a scale for each output, and what they stand for."""
    rng = np.random.default_rng(0)
    codes = {}
    for name, layer in params.items():
        for module in ("gate_proj", "down_proj") if name.startswith(prefix) else ():
            shape = layer[module]["kernel"].shape
            scale = jnp.full((*shape[:-2], 1, shape[-1]), 0.125)
            values = jnp.asarray(rng.integers(-8, 8, shape, np.int8))
            codes[f"{name}/{module}/kernel"] = oneshot.Codes(values, scale, jnp.zeros(scale.shape, jnp.int8), 4)
            layer[module]["kernel"] = codes[f"{name}/{module}/kernel"].values()
    return codes


@pytest.mark.parametrize("stacked", [False, True])
def test_integers_are_packed_and_the_configuration_says_so(stacked, tmp_path):
    params = make(LLAMA)
    if stacked:
        params = stack(params)
    else:
        del params["layer_1"]  # those behind it are counted anew, their codes as well
    codes = rounded(params, "layers" if stacked else "layer_")
    config = export.write_hugging_face(tmp_path / "m", params, LLAMA, codes=codes)
    held = tensors(tmp_path / "m")
    for layer, path in ((1, "layers" if stacked else "layer_2"), (0, "layers" if stacked else "layer_0")):
        expected = np.asarray(codes[f"{path}/down_proj/kernel"].codes)
        expected = (expected[layer] if stacked else expected).T
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        assert name not in held
        np.testing.assert_array_equal(unpack_words(held[f"{name}_packed"], 20, 4), expected)
        assert held[f"{name}_scale"].shape == (16, 1)
        assert f"model.layers.{layer}.mlp.up_proj.weight" in held
    (group,) = config["quantization_config"]["config_groups"].values()
    assert (group["weights"]["num_bits"], group["weights"]["strategy"]) == (4, "channel")
    layers = range(3 if stacked else 2)
    expected = {f"model.layers.{i}.mlp.{name}" for i in layers for name in ("gate_proj", "down_proj")}
    assert set(group["targets"]) == expected
    with pytest.raises(storage.StorageError, match="the model is quantised"):
        export.read_hugging_face(tmp_path / "m")


def test_codes_of_what_is_no_kernel_are_refused(tmp_path):
    params = make(LLAMA)
    codes = rounded(params, "layer_")
    for path in ("layer_0/attention_norm/scale", "layer_7/up_proj/kernel"):
        with pytest.raises(ValueError, match=f"codes has an entry for '{path}', which is no kernel of a layer"):
            export.write_hugging_face(tmp_path / "m", params, LLAMA, codes={path: next(iter(codes.values()))})
    with pytest.raises(
        ValueError, match=r"params\['layer_0'\]\['gate_proj'\]\['kernel'\] integers of shape \(20, 16\)"
    ):
        export.write_hugging_face(
            tmp_path / "m", params, LLAMA, codes={"layer_0/gate_proj/kernel": codes["layer_0/down_proj/kernel"]}
        )
    assert not (tmp_path / "m").exists()
