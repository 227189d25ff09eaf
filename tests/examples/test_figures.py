"""The examples' figures: the data that they show, the panels, the finding in the title, a PNG on disk."""

from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
from _support import curves, figures, report

PNG = b"\x89PNG\r\n\x1a\n"

WEIGHTS = {
    "conv": np.array([[-1.0, -0.5, 0.0], [0.2, 0.5, 0.9]]),
    "dense": np.array([-0.3, -0.1, 0.1, 0.1]),
}
THRESHOLDS = {"conv": 0.5, "dense": 0.2, "not drawn": 1.0}

SPARSITY = np.array([[0.9, 0.5, 0.75], [0.9, 0.5, 0.75]])
BEFORE = np.array([[0.2, 0.8, 0.4], [0.4, 0.8, 0.6]])
AFTER = np.array([[0.7, 0.9, 0.894], [0.8, 0.9, 0.898]])
DENSE = np.array([0.9, 0.9])


def curve(axes: object, index: int) -> np.ndarray:
    return np.array(axes.containers[index].lines[0].get_xydata())


def saved(figure: matplotlib.figure.Figure, path: Path) -> bytes:
    figure.savefig(path)
    return path.read_bytes()


# Histograms


def test_histograms_count_every_weight_on_its_side_of_the_threshold() -> None:
    figure = figures.histograms(WEIGHTS, THRESHOLDS)
    counts = [[patch.get_data().values.sum() for patch in axes.patches] for axes in figure.axes]
    assert counts == [[2, 4], [3, 1]]
    for axes, threshold in zip(figure.axes, (0.5, 0.2), strict=True):
        removed, kept = (patch.get_data() for patch in axes.patches)
        inside = np.abs((removed.edges[1:] + removed.edges[:-1]) / 2) < threshold
        assert not removed.values[~inside].any()
        # A weight at the upper threshold is kept, and one at the lower falls into the bin that begins there.
        assert kept.values[inside].sum() <= 1
        assert [line.get_xdata()[0] for line in axes.lines] == [-threshold, threshold]


def test_histograms_name_the_layers_and_the_finding() -> None:
    figure = figures.histograms(WEIGHTS, THRESHOLDS)
    assert [axes.get_title() for axes in figure.axes] == ["conv  (6)", "dense  (4)"]
    assert figure.get_suptitle().startswith("Pruning removes 50.0 % of 10 weights")
    assert "33.3 % removed" in [text.get_text() for text in figure.axes[0].texts]
    assert "±0.5" in [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.slow
@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 7])
def test_histograms_have_one_panel_per_layer_and_are_written(layers: int, tmp_path: Path) -> None:
    weights = {f"layer_{index}": np.linspace(-1, 1, 50) for index in range(layers)}
    figure = figures.histograms(weights, dict.fromkeys(weights, 0.25))
    assert len(figure.axes) == layers
    assert saved(figure, tmp_path / "histograms.png").startswith(PNG)


EDGE_CASES = [
    ("threshold 0", np.array([-1.0, 0.0, 2.0]), 0.0, [0, 3]),
    ("all zero", np.zeros(5), 0.0, [0, 5]),
    ("threshold at the largest", np.array([0.1, -0.3, 0.3]), 0.3, [1, 2]),
    ("one weight", np.array([0.7]), 0.7, [0, 1]),
    ("tiny threshold", np.array([1e-9, 1.0, -1.0]), 1e-6, [1, 2]),
    ("bfloat16-like steps", np.array([0.5, 0.5, 0.25], np.float16), 0.3, [1, 2]),
    ("no weight", np.zeros(0), 0.0, [0, 0]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("values", "threshold", "counts"), [case[1:] for case in EDGE_CASES])
def test_histograms_lose_no_weight_at_the_edges(
    values: np.ndarray, threshold: float, counts: list[int], tmp_path: Path
) -> None:
    figure = figures.histograms({"layer": values, "other": np.ones(1)}, {"layer": threshold, "other": 1.0})
    assert [patch.get_data().values.sum() for patch in figure.axes[0].patches] == counts
    assert saved(figure, tmp_path / "histograms.png").startswith(PNG)


@pytest.mark.parametrize(("weights", "thresholds"), [({}, {}), ({"a": np.ones(2)}, {"b": 1.0})])
def test_histograms_need_layers_and_their_thresholds(
    weights: dict[str, np.ndarray], thresholds: dict[str, float]
) -> None:
    with pytest.raises(ValueError, match=r"every layer needs a threshold: got the layers \["):
        figures.histograms(weights, thresholds)


# Accuracy against sparsity


def test_curves_hold_the_means_in_order_of_sparsity() -> None:
    figure = figures.accuracy_against_sparsity(SPARSITY, BEFORE, AFTER, DENSE)
    top, bottom = figure.axes
    np.testing.assert_allclose(curve(top, 0), [[2, 80], [4, 50], [10, 30]])
    np.testing.assert_allclose(curve(top, 1), [[2, 90], [4, 89.6], [10, 75]])
    np.testing.assert_allclose(curve(bottom, 0), [[2, 0], [4, -0.4], [10, -15]], atol=1e-9)
    assert {90.0} == {line.get_ydata()[0] for line in top.lines if line.get_linestyle() == ":"}


def test_bars_are_one_standard_deviation_over_seeds() -> None:
    top = figures.accuracy_against_sparsity(SPARSITY, BEFORE, AFTER, DENSE).axes[0]
    bars = top.containers[0].lines[2][0].get_segments()
    np.testing.assert_allclose([bar[:, 1] for bar in bars], [[80, 80], [40, 60], [20, 40]])


def test_one_seed_has_no_bars() -> None:
    top, bottom = figures.accuracy_against_sparsity(SPARSITY[:1], BEFORE[:1], AFTER[:1], DENSE[:1]).axes
    assert [container.has_yerr for container in (*top.containers, *bottom.containers)] == [False] * 3


def test_points_below_the_axis_are_marked_at_its_foot() -> None:
    bottom = figures.accuracy_against_sparsity(SPARSITY, BEFORE, AFTER, DENSE).axes[1]
    marks = [line.get_xydata().tolist() for line in bottom.lines if line.get_marker() == "v"]
    np.testing.assert_allclose(marks, [[[10, -5]]])


FINDINGS = [
    (0.005, "Fine-tuned, 75.0 % fewer weights cost at most 0.5 points of accuracy"),
    (0.001, "Fine-tuned, 50.0 % fewer weights cost at most 0.1 points of accuracy"),
    (0.2, "Fine-tuned, 90.0 % fewer weights cost at most 20 points of accuracy"),
]


@pytest.mark.parametrize(("max_drop", "title"), FINDINGS)
def test_the_title_says_what_the_accepted_loss_buys(max_drop: float, title: str) -> None:
    figure = figures.accuracy_against_sparsity(SPARSITY, BEFORE, AFTER, DENSE, max_drop=max_drop)
    assert figure.get_suptitle() == title


def test_the_title_says_when_nothing_holds() -> None:
    figure = figures.accuracy_against_sparsity(SPARSITY, BEFORE, AFTER - 0.1, DENSE, max_drop=0.01)
    assert figure.get_suptitle() == "No sparsity tried costs at most 1 point of accuracy"


def test_strengths_stand_above_their_points() -> None:
    figure = figures.accuracy_against_sparsity(SPARSITY, BEFORE, AFTER, DENSE, ks=[2, 0.5, 1.25])
    strengths = figure.axes[0].child_axes[0]
    np.testing.assert_allclose(strengths.get_xticks(), [2, 4, 10])
    assert [label.get_text() for label in strengths.get_xticklabels()] == ["0.5", "1.25", "2"]


@pytest.mark.parametrize("strengths", [1, 2, 12])
def test_no_two_labels_overlap(strengths: int, tmp_path: Path) -> None:
    sparsity = 1 - np.geomspace(0.9, 0.01, strengths)[None]
    after = np.linspace(0.97, 0.15, strengths)[None]
    before = np.linspace(0.9, 0.1, strengths)[None]
    ks = np.linspace(0.25, 3, strengths).tolist()
    figure = figures.accuracy_against_sparsity(sparsity, before, after, np.array([0.97]), ks=ks)
    assert saved(figure, tmp_path / "accuracy.png").startswith(PNG)
    top, bottom = figure.axes
    for texts in (top.texts, bottom.get_xticklabels(), top.child_axes[0].get_xticklabels()):
        boxes = [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]
        overlaps = [a.overlaps(b) for index, a in enumerate(boxes) for b in boxes[:index]]
        assert not any(overlaps)


@pytest.mark.parametrize(
    ("shapes", "ks"),
    [
        (((2, 3), (2, 3), (2, 4), (2,)), None),
        (((2, 3), (2, 3), (2, 3), (3,)), None),
        (((3,), (3,), (3,), ()), None),
        (((2, 3), (2, 3), (2, 3), (2,)), [1.0]),
    ],
)
def test_shapes_that_disagree_are_named(shapes: tuple[tuple[int, ...], ...], ks: list[float] | None) -> None:
    with pytest.raises(ValueError, match=r"must be \[seeds, strengths\].* got the shapes"):
        figures.accuracy_against_sparsity(*map(np.zeros, shapes), ks=ks)


def test_drawing_touches_no_pyplot_state(tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    saved(figures.histograms(WEIGHTS, THRESHOLDS), tmp_path / "h.png")
    saved(figures.accuracy_against_sparsity(SPARSITY, BEFORE, AFTER, DENSE), tmp_path / "a.png")
    assert dict(mpl.rcParams) == before


# Curves in panels, and the README's figure


def test_ticks_of_a_logarithmic_panel_are_round_numbers_and_counts_are_whole() -> None:
    x = [0, 10, 20]
    panels = [
        curves.Panel("changed (%)", {"a": (x, [0.71, 0.8, 1.04])}, log=True),
        curves.Panel("changed (%)", {"a": (x, [0.002, 0.3, 90.0])}, log=True),
        curves.Panel("units", {"": (x, [0, 0, 0])}, stairs=True),
    ]
    figure = curves.draw("title", "updates", panels)
    figure.draw_without_rendering()
    narrow, wide, counts = (
        [
            label.get_text()
            for label in axes.get_yticklabels()
            if np.prod(np.subtract(axes.get_ylim(), label.get_position()[1])) <= 0
        ]
        for axes in figure.axes
    )
    assert narrow == ["0.7", "0.8", "0.9", "1"]
    assert wide == ["0.001", "0.01", "0.1", "1", "10", "100"]
    assert counts == ["0"]


def test_the_small_figure_draws_the_accuracy_after_fine_tuning_and_is_the_same_each_time(tmp_path: Path) -> None:
    sweep = report.Sweep(["0.5", "1", "2"], SPARSITY, BEFORE, AFTER, DENSE)
    for name in ("a.svg", "b.svg"):
        report.save_small_curve(sweep, tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text()
    assert "dense 90" in text
    assert "fine-tuned" in text
    assert "only pruned" not in text
    assert "fill: #ffffff" not in text  # no background
    assert "#000000" not in text
