"""Every benchmark runs at a tiny size and reports what it should; how fast anything is, is not tested."""

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import jaxprune
from benchmarks import (
    accelerator,
    exports,
    imports,
    masks,
    n_m,
    one_shot,
    pruned_and_rounded,
    scale,
    selection,
    sparsegpt,
    timing,
    training_step,
)

pytestmark = pytest.mark.slow


def results(main: Any, folder: Path, *arguments: str) -> Any:
    main([*arguments, "--json", str(folder / "results.json")])
    return json.loads((folder / "results.json").read_text())


def check_rows(rows: list[dict[str, Any]], variants: list[str]) -> None:
    """Rows of `timing.compare`: the variants in order, then the control, all with positive finite times."""
    assert [row["variant"] for row in rows] == [*variants, variants[0] + timing.CONTROL]
    for row in rows:
        assert all(0 <= row[key] < math.inf for key in ("wall", "cpu", "wall_ratio", "cpu_ratio"))
        assert row["wall"] > 0
    assert rows[0]["wall_ratio"] == rows[0]["cpu_ratio"] == 1.0


def test_compare_runs_every_variant_once_a_round_and_the_baseline_twice():
    calls = {"slow": 0, "fast": 0}

    def work(name: str, size: int) -> None:
        calls[name] += 1
        sum(range(size))

    rows = timing.compare({"slow": lambda: work("slow", 100_000), "fast": lambda: work("fast", 10)}, 5, baseline="fast")
    assert calls == {"slow": 1 + 5, "fast": 1 + 5 + 5}  # the first one compiles
    assert [row.variant for row in rows] == ["slow", "fast", "fast" + timing.CONTROL]
    assert (rows[1].wall_ratio, rows[1].cpu_ratio) == (1.0, 1.0)


def test_the_order_is_shuffled_alike_for_the_same_seed():
    def order(seed: int) -> str:
        seen: list[str] = []
        timing.compare({name: lambda name=name: seen.append(name) for name in "abcd"}, 8, seed=seed)
        return "".join(seen)

    assert order(0) == order(0)
    rounds = [order(0)[4 + 5 * i : 9 + 5 * i] for i in range(8)]
    assert all(sorted(taken) == list("aabcd") for taken in rounds)
    assert len(set(rounds)) > 1


def test_masks_keep_as_many_weights_in_every_way(tmp_path):
    (result,) = results(masks.main, tmp_path, "--sizes", "50_000", "--repeats", "2")
    assert result["weights"] == 50_000
    kept = result["kept"]
    check_rows(result["rows"], list(kept))
    assert list(kept)[:4] == ["one-liner, jit", "make_masks, jit", "make_masks, no jit", "one-liner, NumPy"]
    # A Gaussian keeps 31.7 % at k = 1; a weight at its threshold may fall to either side.
    assert all(
        abs(count / 50_000 - 0.317) < 0.02 and abs(count - kept["one-liner, jit"]) <= 5 for count in kept.values()
    )
    assert 1.0 <= result["memory"]["jit, masks"] < 1.1
    assert result["memory"]["jit, temporaries"] >= 0


def test_what_is_rounded_takes_fewer_bytes_and_what_is_found_in_one_pass_is_no_worse_than_nothing(tmp_path):
    chosen = ("--subjects", "digits", "--ways", "one pass", "round, prune", "--sparsities", "0.5", "--bits", "16", "4")
    found = results(pruned_and_rounded.main, tmp_path, *chosen, "--epochs", "5")
    ((run,),) = found.values()
    sixteen, four, sixteen_masked, four_masked = run["rows"]
    assert [(row["way"], row["bits"]) for row in run["rows"][1:3]] == [("one pass", 4), ("round, prune", 16)]
    # Half the weights of 4 bits and a bit for each weight, beside half of 16 bits and as many more: 3 to 9.
    assert 1 / 3 < four["bytes"] / sixteen["bytes"] < 0.6
    assert four_masked["bytes"] < sixteen_masked["bytes"]
    assert run["dense"] > 85
    assert min(row["quality"] for row in run["rows"]) > run["dense"] - 10


def test_what_goes_out_of_the_door_comes_back(tmp_path):
    plain, sparse, integers, packed = results(exports.main, tmp_path, "--models", "CNN")
    assert [found["format"] for found in (plain, packed)] == ["bundle", "compressed-tensors, 4 bits"]
    assert plain["error"] == sparse["error"] == 0  # the same program on the same weights
    assert 0 < integers["error"] < 0.05
    assert integers["bytes"] < sparse["bytes"] < packed["bytes"] < plain["bytes"]


def test_training_steps_hold_the_zeros_they_are_asked_to_hold(tmp_path):
    arguments = ("--batch-size", "2", "--width", "16", "--steps", "1", "--repeats", "1")
    cnn, mlp = results(training_step.main, tmp_path, *arguments)
    for result in (cnn, mlp):
        check_rows(result["rows"], ["adam", "adam, keep_pruned", "adam, keep_zeros"])
        zeros = result["zeros"]
        # Adam moves every pruned weight that has a gradient; not those of units that are off for the whole batch.
        assert zeros["adam"] < zeros["adam, keep_pruned"] <= zeros["adam, keep_zeros"]
        assert 0.5 < zeros["adam, keep_pruned"] < 0.9
    # Kernels of the convolutions, of the dense layers, and their biases.
    assert cnn["parameters"] == 27 * 32 + 288 * 64 + 4096 * 100 + 100 * 10 + 32 + 64 + 100 + 10
    assert mlp["parameters"] == 5 * (16 * 16 + 16)


def test_selection_is_measured_in_three_tasks(tmp_path):
    *tasks, memory = results(selection.main, tmp_path, "--sizes", "160_000", "--repeats", "1", "--sort-up-to", "0")
    assert [task["task"] for task in tasks] == ["one array", "each of 50 leaves", "50 leaves jointly"]
    for task in tasks:
        check_rows(task["rows"], [row["variant"] for row in task["rows"][:-1]])
    # With several CPU devices, as here, an array is counted in as many parts as it may have shards; small ones are all parts.
    assert memory["ratios"]["one array"] < 0.05
    assert memory["ratios"]["50 leaves jointly"] < 0.05
    assert memory["ratios"]["jnp.sort"] >= 1


def test_two_of_four_agrees_with_numpy_and_is_measured(tmp_path):
    weights = np.random.default_rng(0).normal(size=(8, 40)).astype(np.float32)
    ours = jaxprune.make_masks({"kernel": weights.T}, 2, rule=jaxprune.rules.n_m(4))["kernel"].T
    np.testing.assert_array_equal(ours, n_m.by_partitioning(weights))
    (result,) = results(n_m.main, tmp_path, "--sizes", "10_000", "--repeats", "1")
    assert result["size"] == 12_800
    check_rows(result["rows"], [row["variant"] for row in result["rows"][:-1]])
    assert 0 <= result["memory"] < 0.1


def test_imports_are_measured_in_fresh_processes(tmp_path):
    rows = results(imports.main, tmp_path, "--repeats", "1")
    check_rows(rows, list(imports.STATEMENTS))
    assert all(row["cpu"] > 0.01 for row in rows)  # that of the child processes


def test_one_shot_removes_the_same_number_by_every_method_and_holds_it(tmp_path):
    methods = ["magnitude, global", "random, layer"]  # each method more compiles for seconds
    arguments = ("--seeds", "1", "--epochs", "2", "--fine-tune-epochs", "1", "--sparsities", "0.5")
    markdown = tmp_path / "table.md"
    (run,) = results(one_shot.main, tmp_path, *arguments, "--methods", *methods, "--markdown", str(markdown))
    assert 0.5 < run["dense"] <= 1
    assert [(row["method"], row["sparsity"]) for row in run["rows"]] == [(method, 0.5) for method in methods]
    for row in run["rows"]:
        assert row["removed"] == pytest.approx(row["sparsity"], abs=1e-4)
        assert row["removed"] <= row["zeros"] < row["removed"] + 0.01
        assert 0 <= row["one_shot"] <= 1
        assert 0 <= row["fine_tuned"] <= 1
    accuracies = {row["method"]: row["one_shot"] for row in run["rows"]}
    assert accuracies["magnitude, global"] > accuracies["random, layer"]
    lines = markdown.read_text().splitlines()
    assert len(lines) == 2 + 2 * len(methods)
    assert {line.count("|") for line in lines} == {4}


def test_the_command_line_refuses_fewer_weights_than_leaves(capsys):
    with pytest.raises(SystemExit, match="2"):
        masks.main(["--sizes", "10"])
    assert "at least 50" in capsys.readouterr().err


def test_the_accelerator_benchmark_runs_every_case_beside_plain_jax():
    sizes = accelerator.Sizes(weights=16, width=16, batch=8, solved=16, model_width=64, length=8)
    for part, cases in accelerator.PARTS.items():
        for case in cases(sizes):
            result = accelerator.measure(case, 0.0, Console(file=io.StringIO()))
            names = [row["variant"] for row in result["rows"]]
            check_rows(result["rows"], names[:-1])
            assert names[0].startswith("plain JAX"), part
            assert any(name.startswith("jaxprune") for name in names)
            assert result["first_call"].keys() == set(names[:-1])


def test_the_accelerator_benchmark_names_what_it_had_no_time_for(capsys):
    accelerator.main(["--small", "--minutes", "0"])
    found = json.loads(capsys.readouterr().out)
    assert found["cases"] == []
    assert {line.partition(":")[0] for line in found["left_out"]} == {
        "masks",
        "steps",
        "solvers",
        "calibration",
        "cut networks",
    }


def test_the_solvers_that_are_timed_lose_little(tmp_path):
    (result,) = results(sparsegpt.main, tmp_path, "--sizes", "32", "--repeats", "1", "--patterns", "2:4")
    assert result["rows"][0]["variant"] == "jaxprune sparsegpt"
    assert all(0 < loss < 0.5 for loss in result["losses"].values())


def test_scale_tells_memory_a_device_and_the_stages_of_a_first_call(tmp_path):
    rows = results(
        scale.main, tmp_path, "memory", "--devices", "0", "--width", "512", "--depth", "2", "--rules", "std", "global"
    )
    assert [row["case"] for row in rows] == ["std", "global", "adam", "adam, keep_pruned"]
    # Two layers: queries and outputs, keys and values an eighth, three matrices of 3.5 times the width; a table of 4 widths.
    size = 2 * 512 * 512 * (2 + 2 / 8 + 3 * 3.5) + 4 * 512 * 512
    assert all(row["parameters_bytes"] == 2 * size / 8 for row in rows)
    assert all(row["share"] == row["temporary_bytes"] / row["parameters_bytes"] for row in rows)
    rows = results(scale.main, tmp_path, "first", "--layers", "9", "--shapes", "2", "--rules", "layer")
    assert [row["rule"] for row in rows] == ["layer"]
    assert all(rows[0][stage] >= 0 for stage in ("trace", "lower", "compile", "jit", "eager_first", "eager_second"))
