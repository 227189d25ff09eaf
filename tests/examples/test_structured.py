"""The examples and the benchmark of smaller models, each run small: what their JSON says and their files."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import pytest
import shrink_cnn
import shrink_transformer

from benchmarks import shrink as benchmark
from jaxprune import structured

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def results(program: ModuleType, out: Path, data_dir: Path, *arguments: str) -> dict[str, Any]:
    assert program.main(["--small", "--out", str(out), "--data-dir", str(data_dir), *arguments]) == 0
    return json.loads((out / "results.json").read_text())


def test_shrink_cnn_meets_its_budget(tmp_path: Path, data_dir: Path) -> None:
    found = results(shrink_cnn, tmp_path, data_dir, "--measures", "l2", "scratch")
    before, after = found["cost"]["macs"]
    # An image of 8 x 8: 64 places of 9 x 32, 16 of 9 x 32 x 64, then 256 x 100 and 100 x 10.
    assert before == 64 * 9 * 32 + 16 * 9 * 32 * 64 + 25_600 + 1_000
    assert 0.4 * before < after <= 0.5 * before
    assert set(found["validation"]) == {"dense", "l2", "scratch"}
    assert len(found["training"]["scratch"]["accuracy"]) == 3
    assert all(time > 0 for time in found["cost"]["milliseconds"].values())
    plan = structured.Plan.from_json((tmp_path / "plan.json").read_text())
    assert set(plan.kept) == {
        "Conv_0/kernel", "Conv_0/bias", "Conv_1/kernel", "Conv_1/bias", "Dense_0/kernel", "Dense_0/bias",
        "Dense_1/kernel",
    }  # fmt: skip
    assert (tmp_path / "shrink.png").read_bytes().startswith(b"\x89PNG")
    exported = jax.export.deserialize(bytearray((tmp_path / "model.jax").read_bytes()))
    assert [str(size) for size in exported.out_avals[0].shape] == ["batch", "10"]


def test_shrink_transformer_cuts_heads_and_hidden_units(tmp_path: Path, data_dir: Path) -> None:
    found = results(shrink_transformer, tmp_path, data_dir)
    assert found["cost"]["error"] < 1e-5
    assert [len(heads) for heads in found["cost"]["heads"].values()] == [2, 2]
    plan = structured.Plan.from_json((tmp_path / "plan.json").read_text())
    assert plan.shrunk_shape("MultiHeadDotProductAttention_0/query/kernel") == (64, 2, 16)
    assert plan.shrunk_shape("Dense_1/kernel") == (64, 128)
    assert "position" not in plan.kept


def test_the_benchmark_compares_with_the_native_function(tmp_path: Path) -> None:
    small = {"--batch-size": 2, "--size": 8, "--width": 4, "--layers": 1, "--model-width": 32, "--length": 4}
    arguments = [str(word) for pair in small.items() for word in pair]
    benchmark.main([*arguments, "--repeats", "2", "--no-torch", "--json", str(tmp_path / "results.json")])
    found = json.loads((tmp_path / "results.json").read_text())
    assert [(result["network"], result["framework"]) for result in found] == [
        ("cnn", "jax"), ("resnet18", "jax"), ("transformer", "jax"),
    ]  # fmt: skip
    for result in found:
        assert result["error"] < 1e-5
        assert [row["variant"] for row in result["rows"]][:3] == ["dense", "smaller", "native"]
        assert 1.5 < result["macs"] < 4.1
        assert result["native_over_smaller"] > 0
