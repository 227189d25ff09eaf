"""GGUF files that we write are run by llama.cpp: the probabilities of the next token are those of the model in JAX."""

import functools

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xllamacpp

import jaxprune
from jaxprune import export, oneshot
from tests.support.llama_models import CONFIGS, cut, logits, make

# llama.cpp rounds what it multiplies with a matrix of float16 to float16, too: hence the tolerance. Pairs for halves, or the heads of
# another layer, would be wrong by more than 1.
PROMPT = [3, 17, 9, 5, 11, 20, 4]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A file with a tokenizer of 24 tokens, each letter one of them."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("letters")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(ord("a") + i) for i in range(24)])
    writer.add_token_types([gguf.TokenType.NORMAL] * 24)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def theirs(path) -> dict[int, float]:
    """The logarithm of the probability of each token behind the prompt."""
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.warmup, params.cpuparams.n_threads = str(path), 64, False, 2
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    found = server.handle_completions({"prompt": PROMPT, "n_predict": 1, "temperature": 0.0, "n_probs": 24})
    return {entry["id"]: entry["logprob"] for entry in found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]}


def ours(params, config) -> np.ndarray:
    found = jax.jit(functools.partial(logits, config=config))(params, tokens=jnp.array([PROMPT], jnp.int32))
    return np.asarray(jax.nn.log_softmax(found[0, -1]))


@pytest.mark.parametrize("name", CONFIGS)
def test_llama_cpp_computes_the_same(name, tokenizer, tmp_path):
    config = CONFIGS[name]
    smaller = cut(make(config, dtype=jnp.float16), config, drop=1, inner=12, groups=1)
    export.write_gguf(tmp_path / "m.gguf", smaller, config, kind="F16", source=tokenizer)
    found, expected = theirs(tmp_path / "m.gguf"), ours(smaller, config)
    assert len(found) == 24
    np.testing.assert_allclose([found[token] for token in range(24)], expected, atol=0.03)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "qwen3"])
def test_layers_have_sizes_of_their_own(name, tokenizer, tmp_path):
    config = CONFIGS[name]
    params = make(config, dtype=jnp.float16)
    smaller = cut(params, config, drop=1, inner=12, groups=1) | {"layer_2": params["layer_2"]}
    export.write_gguf(tmp_path / "m.gguf", smaller, config, kind="F16", source=tokenizer)
    found = theirs(tmp_path / "m.gguf")
    np.testing.assert_allclose([found[token] for token in range(24)], ours(smaller, config), atol=0.03)


@pytest.mark.parametrize("bits", [4, 8])
def test_it_computes_with_the_integers_that_were_found(bits, tokenizer, tmp_path):
    config = CONFIGS["llama"] | {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    params = jax.tree.map(lambda leaf: leaf / 4 if leaf.ndim == 2 else leaf, make(config))
    grams = jaxprune.calibrate_grams(
        lambda params, tokens: logits(params, config, tokens),
        params,
        [np.random.default_rng(0).integers(0, 24, (8, 32))],
    )
    found = oneshot.prune_and_quantize(params, grams, 0.5, bits=bits, group_size=32, prunable="layer_*/*_proj/kernel")
    kinds = export.write_gguf(
        tmp_path / "m.gguf", found.params, config, kind="F16", codes=found.codes, source=tokenizer
    )
    assert kinds["blk.0.ffn_down.weight"] == {4: "Q4_0", 8: "Q8_0"}[bits]
    # With integers llama.cpp rounds the data to 8 bits, too.
    logprobs = theirs(tmp_path / "m.gguf")
    np.testing.assert_allclose([logprobs[token] for token in range(24)], ours(found.params, config), atol=0.05)
