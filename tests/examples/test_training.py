"""The examples that prune while training, each run small: what their JSON says, their files, resuming, bad usage."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import gradual
import jax
import jax.numpy as jnp
import lottery_ticket
import nm_sparse
import numpy as np
import pytest
import rigl
from _support import curves, options
from _support.mask_log import MaskLog

PROGRAMS = [gradual, lottery_ticket, nm_sparse, rigl]
PNG = b"\x89PNG"
# Of the digits CNN: kernels of two convolutions and two dense layers.
SIZES = 3 * 3 * 32, 3 * 3 * 32 * 64, 256 * 100, 100 * 10
WEIGHTS = sum(SIZES)
STEPS = 8  # an epoch of 256 images in batches of 32


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def results(program: ModuleType, out: Path, data_dir: Path, *arguments: str) -> dict[str, Any]:
    assert program.main(["--small", "--out", str(out), "--data-dir", str(data_dir), *arguments]) == 0
    return json.loads((out / "results.json").read_text())


# What the runs find. Each compiles several training steps.


@pytest.mark.slow
def test_gradual_follows_the_cubic_schedule_and_goes_on_where_it_was(tmp_path: Path, data_dir: Path) -> None:
    found = results(gradual, tmp_path, data_dir)
    changes = found["masks"]["gradual"]
    begin, end = round(0.1 * 6 * STEPS), round(0.7 * 6 * STEPS)
    assert [change["step"] for change in changes] == [*range(0, end, 4), end]
    progress = np.clip([(change["step"] - begin) / (end - begin) for change in changes], 0, 1)
    np.testing.assert_allclose([change["k"] for change in changes], 0.95 * (1 - (1 - progress) ** 3), atol=1e-6)
    # The log leaves out kernels that have not lost a weight yet; the smallest one is the last to.
    every = [change for change in changes if len([name for name in change if "threshold" in name]) == 4]
    assert len(every) > 3
    np.testing.assert_allclose([change["sparsity"] for change in every], [change["k"] for change in every], atol=2e-5)
    # What is pruned stays pruned, so that the churn is what is removed more.
    risen = np.diff([change["sparsity"] for change in every])
    np.testing.assert_allclose([change["churn"] for change in every[1:]], risen, atol=1e-6)
    assert all(change["escaped"] == 0 for change in changes)
    assert changes[-1]["threshold/Dense_0/kernel"] > changes[5]["threshold/Dense_0/kernel"] > 0
    assert found["validation"]["gradual"]["sparsity"] == pytest.approx(0.95, abs=1e-4)
    assert found["validation"]["dense"]["sparsity"] == 0
    assert len(found["training"]["gradual"]["accuracy"]) == 6
    assert (tmp_path / "gradual.png").read_bytes().startswith(PNG)
    # A finished run that is resumed finds the same, the changes of masks among it.
    assert results(gradual, tmp_path, data_dir, "--resume") == found


@pytest.mark.slow
def test_rigl_replaces_the_share_it_is_asked_to(tmp_path: Path, data_dir: Path) -> None:
    found = results(rigl, tmp_path, data_dir, "--sparsity", "0.9")
    until = round(0.75 * 4 * STEPS)
    for name in ("SET", "RigL"):
        changes = found["masks"][name]
        assert [change["step"] for change in changes] == list(range(0, until + 1, 4))
        fractions = [0.15 * (1 + np.cos(np.pi * change["step"] / until)) for change in changes]
        np.testing.assert_allclose([change["drop_fraction"] for change in changes], fractions, atol=1e-6)
        for change, fraction in zip(changes, fractions, strict=True):
            # Leaves that are whole do not count in the log; as many weights come as go, each at most once.
            assert 0.88 < change["sparsity"] < 0.93
            assert change["churn"] <= 2 * fraction * (1 - change["sparsity"]) + 1e-6
        assert changes[0]["churn"] > 0.02
        assert changes[-1]["churn"] == 0
    sparsities = {name: row["sparsity"] for name, row in found["validation"].items()}
    assert sparsities.pop("dense") == 0
    assert len(sparsities) == 3
    np.testing.assert_allclose(list(sparsities.values()), 0.9, atol=1e-4)
    assert (tmp_path / "rigl.png").read_bytes().startswith(PNG)


@pytest.mark.slow
def test_tickets_and_their_controls_have_as_many_weights(tmp_path: Path, data_dir: Path) -> None:
    found = results(lottery_ticket, tmp_path, data_dir)
    assert list(found["tickets"]) == ["ticket", "other weights", "random masks"]
    for rounds in found["tickets"].values():
        assert list(rounds) == ["0.500", "0.900"]
        np.testing.assert_allclose([row["sparsity"] for row in rounds.values()], [0.5, 0.9], atol=1e-4)
    epochs = {phase: len(history["loss"]) for phase, history in found["training"].items()}
    assert epochs["early"] + epochs["dense"] == epochs["other weights 0.900"] == 3
    # The epoch rewound to is part of the budget of what goes on from it.
    assert epochs["ticket 0.900"] == epochs["random masks 0.900"] == 2
    accuracy = {kind: rounds["0.900"]["accuracy"] for kind, rounds in found["tickets"].items()}
    assert accuracy["ticket"] > max(accuracy["other weights"], accuracy["random masks"])
    assert (tmp_path / "tickets.png").read_bytes().startswith(PNG)


@pytest.mark.slow
def test_nm_sparse_keeps_two_of_four_where_groups_are_whole(tmp_path: Path, data_dir: Path) -> None:
    found = results(nm_sparse, tmp_path, data_dir)
    sparsities = {name: row["sparsity"] for name, row in found["validation"].items()}
    assert sparsities.pop("dense") == 0
    assert set(sparsities) == {"pruned", "fine-tuned", "STE", "SR-STE"}
    np.testing.assert_allclose(list(sparsities.values()), sum(SIZES[1:]) / 2 / WEIGHTS, atol=1e-6)
    training = found["training"]
    assert len(training["dense"]["loss"]) + len(training["fine-tuned"]["loss"]) == len(training["SR-STE"]["loss"]) == 3
    assert all(0 < share < 1 for share in training["STE"]["masks_changed"])
    assert training["fine-tuned"]["masks_changed"] == [0.0]
    assert (tmp_path / "nm_sparse.png").read_bytes().startswith(PNG)


# Their parts.


def test_random_masks_keep_as_many_of_every_layer() -> None:
    masks = {"a": jnp.arange(20).reshape(4, 5) % 3 == 0, "b": jnp.ones(3, bool)}
    found, other = (lottery_ticket.shuffled(masks, jax.random.key(seed)) for seed in range(2))
    assert found["a"].shape == (4, 5)
    assert int(found["a"].sum()) == int(other["a"].sum()) == 7
    assert (found["a"] != masks["a"]).any()
    assert (found["a"] != other["a"]).any()
    assert found["b"].all()


def test_kernels_with_broken_groups_stay_dense() -> None:
    params = {"a": {"kernel": jnp.arange(24.0).reshape(8, 3)}, "b": {"kernel": jnp.ones((6, 2))}}
    masks = nm_sparse.keep_of(4)(params, 1)
    assert masks["a"]["kernel"].sum(0).tolist() == [2, 2, 2]
    assert masks["a"]["kernel"][3].all()
    assert masks["b"]["kernel"].all()


def settings(out: Path, *arguments: str) -> gradual.Settings:
    return gradual.parse(["--out", str(out), *arguments])


def test_a_mask_log_survives_a_killed_process(tmp_path: Path) -> None:
    log = MaskLog(settings(tmp_path), "phase")
    assert log.read() == []
    log({"step": 0, "sparsity": 0.5})
    log({"step": 10, "sparsity": 0.75, "threshold/kernel": float("inf")})
    with log.path.open("a") as file:
        file.write('\n{"step": 20, "spar')  # what was being written when the process died
    log = MaskLog(settings(tmp_path, "--resume"), "phase")
    log({"step": 20, "sparsity": 0.875})
    log({"step": 10, "sparsity": 0.75, "threshold/kernel": 0.25})  # taken again from the last checkpoint on
    assert log.read() == [
        {"step": 0, "sparsity": 0.5},
        {"step": 10, "sparsity": 0.75, "threshold/kernel": 0.25},
        {"step": 20, "sparsity": 0.875},
    ]
    assert MaskLog(settings(tmp_path), "phase").read() == []


def test_a_mask_log_writes_for_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    from tensorboardX.proto.event_pb2 import Event

    log = MaskLog(settings(tmp_path), "phase")
    log({"step": 4, "sparsity": 0.5})
    log.read()
    (path,) = (tmp_path / "tensorboard" / "phase").iterdir()
    found, rest = [], path.read_bytes()
    while rest:  # each record: its length, a checksum, the event, a checksum
        (length,) = struct.unpack("<Q", rest[:8])
        event = Event.FromString(rest[12 : 12 + length])
        found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
        rest = rest[16 + length :]
    assert found == [(4, "masks/sparsity", 0.5)]


def test_curves_are_drawn_and_named_once_in_one_colour(tmp_path: Path) -> None:
    x = np.array([1.0, 2.0, 4.0])
    panels = [
        curves.Panel("accuracy", {"dense": (x, x), "a": (x, x + 1), "b": (x, x + 1)}),
        curves.Panel("changed", {"b": (x, 10**x)}, log=True),
        curves.Panel("removed", {"": (x, x)}, stairs=True),
    ]
    figure = curves.draw("title", "updates", panels)
    figure.savefig(tmp_path / "figure.png")
    top, middle, bottom = figure.axes
    np.testing.assert_array_equal(top.lines[1].get_xydata(), np.stack([x, x + 1], 1))
    assert [text.get_text() for text in (*top.texts, *middle.texts, *bottom.texts)] == ["dense", "a", "b", "b"]
    assert top.lines[2].get_color() == middle.lines[0].get_color() != top.lines[1].get_color()
    boxes = [text.get_window_extent() for text in top.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_curves_by_sparsity_are_logarithmic_in_the_weights_left(tmp_path: Path) -> None:
    figure = curves.draw("title", "", [curves.Panel("accuracy", {"a": ([0.5, 0.9], [1.0, 2.0])})], by_sparsity=True)
    figure.savefig(tmp_path / "figure.png")
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xdata(), [2, 10])
    assert figure.axes[0].get_xscale() == "log"


# Bad usage.


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        (gradual, ["--dataset", "digitz"], "unknown data set 'digitz'"),
        (rigl, ["--resume"], "holds no run to resume"),
        (lottery_ticket, ["--sparsities", "0.9", "0.5"], "--sparsities must rise"),
        (lottery_ticket, ["--rewind-epochs", "3"], "--rewind-epochs must be fewer than the 3 of --epochs"),
        (nm_sparse, ["--n", "5"], "--n 5 cannot be kept of --m 4"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    program: ModuleType, arguments: Sequence[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main(["--small", "--out", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_and_numbers_out_of_range(program: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        program.main(["--help"])
    assert stopped.value.code == 0
    assert "The output folder receives" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        program.main(["--learning-rate", "-1"])
    assert stopped.value.code == 2


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_was_given_wins_over_the_presets(program: ModuleType) -> None:
    assert program.parse([]).epochs == program.PRESETS.full["epochs"]
    assert program.parse(["--small"]).epochs == program.PRESETS.small["epochs"]
    assert program.parse(["--small", "--epochs", "7"]).epochs == 7
    assert isinstance(program.parse([]), options.Settings)
