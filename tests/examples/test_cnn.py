"""The examples' runs: what they write, resuming after SIGKILL bit for bit, one compilation, bad usage, other data."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chex
import cnn
import cnn_nnx
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import sparsity_table
import tensorflow_datasets as tfds
from _support import options, report
from _support.checkpoints import Checkpoints
from _support.experiment import Experiment
from flax import nnx
from flax.training.train_state import TrainState

import jaxprune

ROOT = Path(cnn.__file__).parents[1]
# Long enough in each phase to be killed in the middle of it.
LONG = (
    "--small", "--epochs", "12", "--fine-tune-epochs", "6", "--ks", "1.5", "2", "--save-every", "1",
    "--learning-rate", "0.05",
)  # fmt: skip
PHASES = ("dense", "fine-tuned", "k=1.5", "k=2")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def start(script: str, arguments: Sequence[str], cache: Path) -> subprocess.Popen[str]:
    """Start an example as a user would, with nothing installed and on one device."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1",
        "JAXPRUNE_CACHE": str(cache / "data"),
    }
    return subprocess.Popen(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=cache,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def newest(folder: Path) -> int:
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def kill_in(process: subprocess.Popen[str], phase: Path, epoch: int) -> None:
    """Kill the process as soon as it has saved this epoch of this phase, or a later one."""
    while newest(phase) < epoch:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def saved(out: Path, phase: str) -> dict[str, Any]:
    """Return the newest checkpoint of a phase as nested dicts, and the number of its epoch."""
    folder = out / "checkpoint" / phase
    epoch = newest(folder)
    with ocp.CheckpointManager(folder, item_names=("params", "masks", "opt_state", "progress")) as manager:
        items = dict.fromkeys(("params", "masks", "opt_state"), ocp.args.StandardRestore())
        restored = manager.restore(epoch, args=ocp.args.Composite(**items, progress=ocp.args.JsonRestore()))
    return {"epoch": epoch, **{name: restored[name] for name in (*items, "progress")}}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in ("cnn.py", "cnn_nnx.py")]
)
def whole(request: pytest.FixtureRequest, cache: Path) -> tuple[str, Path, str]:
    """Run an example without interruption; returns the script, its folder and what it printed."""
    out = cache / request.param.removesuffix(".py")
    return request.param, out, finish(start(request.param, [*LONG, "--out", str(out)], cache))


# What a run writes


def test_a_run_writes_its_files_and_says_so(whole: tuple[str, Path, str]) -> None:
    _, out, printed = whole
    assert sorted(path.name for path in out.iterdir()) == [
        "accuracy.png", "checkpoint", "histograms.png", "results.json",
    ]  # fmt: skip
    for name in ("accuracy.png", "histograms.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert "digits: 256 images to train on, 128 to test on, 8 x 8 x 1" in printed
    assert f"device  cpu (cpu), jax {jax.__version__}" in printed


def test_results_agree_with_the_checkpoints(whole: tuple[str, Path, str]) -> None:
    _, out, _ = whole
    results = json.loads((out / "results.json").read_text())
    sparsities = {
        "dense": 0.0,
        "fine-tuned": results["validation"]["fine-tuned"]["sparsity"],
        **{f"k={k}": row["after"]["sparsity"] for k, row in results["sweep"].items()},
    }
    assert tuple(sparsities) == PHASES
    for phase, sparsity in sparsities.items():
        checkpoint = saved(out, phase)
        masks = flax.traverse_util.flatten_dict(checkpoint["masks"], sep="/")
        params = flax.traverse_util.flatten_dict(checkpoint["params"], sep="/")
        kernels = {path for path in masks if path.endswith("kernel")}
        assert len(kernels) == 4
        assert all(masks[path].all() for path in masks.keys() - kernels)
        size = sum(masks[path].size for path in kernels)
        kept = sum(int(np.sum(masks[path])) for path in kernels)
        np.testing.assert_allclose(1 - kept / size, sparsity, rtol=0, atol=1e-6)
        for path in kernels:
            pruned = np.asarray(params[path])[~np.asarray(masks[path])]
            assert not pruned.view(np.uint32).any(), path  # +0.0, not -0.0
        assert checkpoint["progress"]["history"] == results["training"][phase]
        assert {len(values) for values in results["training"][phase].values()} == {checkpoint["epoch"]}
    assert results["layers"]["prunable"]["size"] == size
    np.testing.assert_allclose(results["layers"]["prunable"]["sparsity"], sparsities["fine-tuned"], atol=1e-6)


def test_training_and_pruning_take_place(whole: tuple[str, Path, str]) -> None:
    _, out, _ = whole
    results = json.loads((out / "results.json").read_text())
    losses = results["training"]["dense"]["loss"]
    assert losses[-1] < losses[0] / 2
    assert set(results["training"]["dense"]) == {"loss", "accuracy", "gradient_norm"}
    assert results["validation"]["dense"]["accuracy"] > 0.6
    assert 0.6 < results["validation"]["pruned"]["sparsity"] < 0.75
    assert results["validation"]["fine-tuned"]["loss"] < results["validation"]["pruned"]["loss"]
    sparsities = [row["after"]["sparsity"] for row in results["sweep"].values()]
    assert sparsities == sorted(sparsities) == [row["before"]["sparsity"] for row in results["sweep"].values()]


# Resuming


def test_killed_runs_resume_bit_for_bit(whole: tuple[str, Path, str], cache: Path, tmp_path: Path) -> None:
    script, expected, _ = whole
    out = tmp_path / "run"
    arguments = [*LONG, "--out", str(out)]
    kill_in(start(script, arguments, cache), out / "checkpoint" / "dense", 3)
    assert "dense" not in json.loads((out / "results.json").read_text()).get("training", {})
    kill_in(start(script, [*arguments, "--resume"], cache), out / "checkpoint" / "k=1.5", 2)
    partial = json.loads((out / "results.json").read_text())
    assert set(partial["training"]) == {"dense", "fine-tuned"}
    finish(start(script, [*arguments, "--resume"], cache))

    assert json.loads((out / "results.json").read_text()) == json.loads((expected / "results.json").read_text())
    for phase in PHASES:
        left, right = saved(out, phase), saved(expected, phase)
        chex.assert_trees_all_equal_shapes_and_dtypes(left["params"], right["params"])
        assert jax.tree.all(jax.tree.map(same_bits, left, right)), phase


def same_bits(left: Any, right: Any) -> bool:
    return np.asarray(left).tobytes() == np.asarray(right).tobytes()


# The functions of the two networks

IMAGES, LABELS = jax.random.uniform(jax.random.key(1), (16, 8, 8, 1)), jnp.arange(16) % 10
BATCHES = jnp.arange(16).reshape(4, 4)
TRACES: list[int] = []


def count_trace(updates: Any, state: Any, params: Any = None) -> Any:
    TRACES.append(1)
    return updates, state


# Its update is Python code, which runs when a training step is traced and not when a compiled one is called.
SGD = optax.chain(optax.sgd(0.01, 0.9), optax.GradientTransformation(lambda params: optax.EmptyState(), count_trace))


@pytest.fixture(scope="module")
def dense() -> dict[Any, Any]:
    """Both networks, trained by one call of four steps each."""
    states = {}
    for network in (cnn, cnn_nnx):
        state = network.create_state(10, IMAGES[:1], 0, SGD)
        states[network], metrics = network.train_steps(state, IMAGES, LABELS, BATCHES)
        shapes = {name: value.shape for name, value in metrics.items()}
        assert shapes == dict.fromkeys(("loss", "accuracy", "gradient_norm"), (4,))
    return states


def masks_of(state: Any) -> Any:
    return jaxprune.masks_in(state.opt_state)


@pytest.mark.slow
@pytest.mark.parametrize("network", [cnn, cnn_nnx])
def test_dense_training_and_every_k_share_one_compilation(network: Any, dense: dict[Any, Any]) -> None:
    before = len(TRACES)
    assert before > 0
    for k in (0.5, 1.0, 2.0):
        state = network.prune(dense[network], k, SGD)
        for _ in range(2):
            state, _ = network.train_steps(state, IMAGES, LABELS, BATCHES)
        expected = jaxprune.sparsity(jaxprune.make_masks(dense[network].params, k))
        assert jaxprune.sparsity(masks_of(state)) == expected > 0.3
        zeros = jax.tree.map(lambda param, mask: not param[~mask].any(), state.params, masks_of(state))
        assert jax.tree.all(zeros)
    assert len(TRACES) == before
    assert not jax.tree.all(jax.tree.map(lambda param: param.all(), state.params))
    assert jax.tree.all(jax.tree.map(lambda mask: mask.all(), masks_of(dense[network])))  # untouched by pruning


@pytest.mark.slow
def test_linen_and_nnx_agree_for_the_same_weights(dense: dict[Any, Any]) -> None:
    linen, twin = dense[cnn], cnn_nnx.prune(dense[cnn_nnx], 0.0, SGD)  # a copy, to be overwritten
    names = {"conv_1": "Conv_0", "conv_2": "Conv_1", "dense_1": "Dense_0", "dense_2": "Dense_1"}
    nnx.update(twin.model, {theirs: linen.params[ours] for theirs, ours in names.items()})

    linen, twin = cnn.prune(linen, 1.0, SGD), cnn_nnx.prune(twin, 1.0, SGD)
    for theirs, ours in names.items():
        for leaf in ("kernel", "bias"):
            np.testing.assert_array_equal(masks_of(twin)[theirs][leaf], masks_of(linen)[ours][leaf])
    for _ in range(3):
        linen, expected = cnn.train_steps(linen, IMAGES, LABELS, BATCHES)
        twin, metrics = cnn_nnx.train_steps(twin, IMAGES, LABELS, BATCHES)
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4)
    for theirs, ours in names.items():
        left, right = twin.params[theirs]["kernel"], linen.params[ours]["kernel"]
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.optimised
@pytest.mark.parametrize("network", [cnn, cnn_nnx])
def test_a_restored_state_trains_on_bit_for_bit(network: Any, dense: dict[Any, Any], tmp_path: Path) -> None:
    state, _ = network.train_steps(network.prune(dense[network], 1.0, SGD), IMAGES, LABELS, BATCHES)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    with Checkpoints(tmp_path) as checkpoints:
        _, restored, _ = checkpoints.restore(network.prune(dense[network], 0.0, SGD))
    assert int(restored.step) == int(state.step) > 0
    state, _ = network.train_steps(state, IMAGES, LABELS, BATCHES)
    restored, _ = network.train_steps(restored, IMAGES, LABELS, BATCHES)
    assert jax.tree.all(jax.tree.map(same_bits, restored.params, state.params))
    assert jax.tree.all(jax.tree.map(same_bits, restored.opt_state, state.opt_state))
    assert int(restored.step) == int(state.step)


# Other data


@pytest.mark.slow
def test_downloaded_data_sets_take_the_same_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--dataset", "cifar10", "--small", "--epochs", "1", "--ks", "1", "--out", str(tmp_path)]
    with tfds.testing.mock_data(num_examples=128):
        assert cnn.main(arguments) == 0
    assert "cifar10: 128 images to train on, 128 to test on, 32 x 32 x 3" in capsys.readouterr().out
    shapes = [row["shape"] for row in json.loads((tmp_path / "results.json").read_text())["layers"]["rows"]]
    assert [3, 3, 3, 32] in shapes
    assert [8 * 8 * 64, 100] in shapes


# The table


@pytest.mark.slow
def test_the_table_is_the_mean_of_the_seeds(cache: Path, tmp_path: Path) -> None:
    options = ["--small", "--epochs", "1", "--ks", "1", "--learning-rate", "0.05"]
    printed = finish(start("sparsity_table.py", [*options, "--seeds", "3", "4", "--out", str(tmp_path)], cache))
    runs = [json.loads((tmp_path / f"seed-{seed}" / "results.json").read_text()) for seed in (3, 4)]
    assert [run["settings"]["seed"] for run in runs] == [3, 4]
    assert runs[0]["sweep"] != runs[1]["sweep"]
    after = np.mean([run["sweep"]["1"]["after"]["accuracy"] for run in runs])
    dense = np.mean([run["validation"]["dense"]["accuracy"] for run in runs])
    cells = [line.split("|") for line in printed.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in cells[-1][5:7]] == [f"{after:.2%}", f"{100 * (after - dense):+.2f} points"]
    assert (tmp_path / "accuracy.png").exists()


def test_the_best_point_is_the_sparsest_within_half_a_point() -> None:
    sweep = report.Sweep(
        ks=["1", "2", "3"],
        sparsity=np.array([[0.6, 0.9, 0.95]]),
        before=np.array([[0.5, 0.5, 0.5]]),
        after=np.array([[0.99, 0.975, 0.97]]),
        dense=np.array([0.98]),
    )
    assert report.best_point(sweep) == {"k": 2.0, "sparsity": 0.9, "accuracy": 0.975}
    assert "90.0% of the weights removed, 10.0 times fewer (k = 2: 97.50%)" in report.best_sentence(sweep)
    worse = sweep._replace(dense=np.array([0.999]))
    assert report.best_point(worse) is None
    assert "more than 0.5 points" in report.best_sentence(worse)


# Bad usage


def refused(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run; expect exit code 2 and one line, before any training."""
    assert cnn.main(list(arguments)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "dense" not in captured.out
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "digitz"], "unknown data set 'digitz'"),
        (["--dataset", "mnist"], "mnist"),
        (["--resume"], "holds no run to resume"),
        (["--ks", "2", "1"], "--ks must rise"),
        (["--small", "--batch-size", "65"], "--batch-size 65 is too large"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*arguments, "--out", str(tmp_path / "out"), "--data-dir", str(tmp_path / "data")]
    assert message in refused(command, capsys)


def test_a_folder_that_cannot_be_written_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(["--out", str(tmp_path / "file" / "out")], capsys)


def test_resuming_with_other_settings_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--small", "--out", str(tmp_path)]
    Experiment(options.parse("", "", command))
    assert "has seed 0, not 1" in refused([*command, "--resume", "--seed", "1"], capsys)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    params = {"kernel": jnp.ones((64, 64))}
    tx = optax.chain(optax.sgd(0.1, 0.9), jaxprune.keep_pruned(jaxprune.make_masks(params, 0.5)))
    state = TrainState.create(apply_fn=None, params=params, tx=tx).replace(step=jnp.int32(7))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, {"loss": [0.5]})
    with Checkpoints(tmp_path) as checkpoints:
        epoch, restored, history = checkpoints.restore(state.replace(step=jnp.int32(0)))
    assert (epoch, int(restored.step), history) == (3, 7, {"loss": [0.5]})
    chex.assert_trees_all_equal(restored.params, params)
    for file in (tmp_path / "3" / "params").rglob("*"):
        if file.is_file() and "d" in file.relative_to(tmp_path).parts:
            file.write_bytes(file.read_bytes()[:10])
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(options.UsageError, match="3 cannot be read"):
        checkpoints.restore(state)


@pytest.mark.parametrize(
    "arguments",
    [["--k", "-1"], ["--k", "nan"], ["--k", "inf"], ["--epochs", "0"], ["--seed", "x"], ["--momentum", "2"]],
)
def test_numbers_out_of_range_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cnn.main(arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_help_says_what_each_option_does(capsys: pytest.CaptureFixture[str]) -> None:
    for program in (cnn.main, sparsity_table.tabulate):
        with pytest.raises(SystemExit) as stopped:
            program(["--help"])
        assert stopped.value.code == 0
    assert "standard deviations" in capsys.readouterr().out
