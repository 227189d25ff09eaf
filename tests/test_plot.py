"""Every figure shows the numbers it was given; what it looks like has to be looked at."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import jaxprune
from jaxprune import plot
from jaxprune.plot._figures import MAX_CELLS, MAX_CURVES
from tests.support.curves import CURVES


@pytest.fixture
def axes():
    return Figure(figsize=(6, 4), layout="constrained").subplots()


def test_weights_are_counted_on_their_side_of_the_threshold(axes):
    values = np.array([[-3.0, -1.0, -0.5], [0.0, 1.0, 2.0]])
    assert plot.weights(values, 1.0, axes) is axes
    removed, kept = axes.patches[:2]
    assert removed.get_data().values.sum() == 2  # a weight at the threshold stays
    assert kept.get_data().values.sum() == 4
    assert [line.get_xdata()[0] for line in axes.lines] == [-1.0, 1.0]


def test_weights_that_are_not_finite_are_left_out_and_one_at_minus_the_threshold_stands_outside(axes):
    plot.weights(np.array([np.nan, np.inf, -0.5, 0.25, 1.0]), 0.5, axes)
    removed, kept = (patch.get_data() for patch in axes.patches[:2])
    assert (removed.values.sum(), kept.values.sum()) == (1, 2)
    inside = np.abs((kept.edges[1:] + kept.edges[:-1]) / 2) < 0.5
    assert kept.values[inside].sum() == 0


def test_bars_show_what_is_kept(axes):
    params = {name: {"kernel": jnp.ones((2, 4)), "bias": jnp.ones(4)} for name in "ab"}
    masks = {
        name: {"kernel": jnp.arange(8).reshape(2, 4) < n, "bias": jnp.ones(4, bool)} for name, n in (("a", 2), ("b", 6))
    }
    assert plot.sparsity_by_layer(jaxprune.summarize(params, masks), axes) is axes
    assert [bar.get_width() for bar in axes.containers[0]] == [0.25, 0.75]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a/kernel", "b/kernel"]
    assert "50.0% of 16" in axes.get_title()


def test_sensitivity_curves(axes):
    assert plot.sensitivity_curves(CURVES, axes) is axes
    *groups, together, dense = axes.lines
    for line, share, metric in zip(groups, CURVES.sparsity, CURVES.metric, strict=True):
        np.testing.assert_array_equal(line.get_xydata(), np.stack([share, metric], 1))
    np.testing.assert_array_equal(together.get_ydata(), CURVES.together)
    assert dense.get_ydata()[0] == CURVES.dense
    assert [text.get_text() for text in axes.texts][-3:] == ["all together", "a/kernel", "b/kernel"]  # from below


def test_accuracy_against_sparsity(axes):
    sparsity = [0.5, 0.9]
    curves = {"one": [0.9, 0.8], "seeds": [[0.9, 0.7], [0.7, 0.5]]}
    assert plot.accuracy(sparsity, curves, axes, dense=0.95) is axes
    one, seeds = (container.lines[0] for container in axes.containers)
    np.testing.assert_allclose(one.get_xydata(), [[2, 0.9], [10, 0.8]])
    np.testing.assert_allclose(seeds.get_ydata(), [0.8, 0.6])
    assert axes.get_xscale() == "log"
    assert [label.get_text().split()[0] for label in axes.get_xticklabels()][:2] == ["50", "75"]


def test_a_mask_as_an_image(axes):
    mask = jnp.array([[[True, False], [True, True]]])
    assert plot.mask(mask, axes) is axes
    np.testing.assert_array_equal(axes.images[0].get_array(), [[1, 0], [1, 1]])
    assert axes.get_title() == "75.0% of 4 weights kept"


def test_the_outputs_of_a_mask_run_to_the_right(axes):
    mask = np.zeros((2, 3, 5), bool)  # [outputs, inputs, taps], as PyTorch keeps a convolution
    mask[1] = True
    plot.mask(mask, axes, outputs=(0,))
    np.testing.assert_array_equal(axes.images[0].get_array(), np.tile([0, 1], (15, 1)))
    assert axes.get_xlabel() == "outputs (axis 0)"
    assert axes.get_ylabel() == "inputs (all other axes)"
    plot.mask(mask, axes, outputs=(1, 2))  # heads and their dimensions
    np.testing.assert_array_equal(axes.images[-1].get_array(), np.repeat([[0], [1]], 15, 1))
    assert axes.get_xlabel() == "outputs (axis 1, 2)"
    plot.mask(mask, axes, outputs=None)
    assert axes.images[-1].get_array().shape == (6, 5)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("last axis", "all other axes")
    plot.mask(mask, axes)
    assert axes.get_xlabel() == "outputs (last axis)"
    for small in (np.array(True), np.array([True, False])):
        plot.mask(small, axes)
        assert axes.images[-1].get_array().shape == (1, small.size)


def test_a_large_mask_shows_shares_of_blocks(axes):
    mask = np.zeros((2 * MAX_CELLS, 3), bool)
    mask[::2, 0] = True
    plot.mask(mask, axes)
    shares = axes.images[0].get_array()
    assert shares.shape == (MAX_CELLS, 3)
    np.testing.assert_array_equal(shares, np.tile([0.5, 0, 0], (MAX_CELLS, 1)))


def test_a_removed_weight_shows_what_lies_behind(axes):
    plot.mask(np.array([[True, False]]), axes)
    image = axes.images[0]
    kept, removed = image.to_rgba(image.get_array())[0]
    np.testing.assert_allclose(kept, [0, 0x72 / 255, 0xB2 / 255, 1], atol=1e-6)
    assert removed[3] == 0


def luminance(color):
    channels = np.array(to_rgb(color))
    linear = np.where(channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("behind", ["#ffffff", "#0d1117", "#000000"])
def test_colours_can_be_read_on_white_and_on_dark(behind):
    def contrast(color):
        low, high = sorted([luminance(color), luminance(behind)])
        return (high + 0.05) / (low + 0.05)

    assert contrast(plot.style.INK) > 4.2
    assert min(map(contrast, plot.style.LINES)) > 3


DRAWN = {
    "weights": lambda ax: plot.weights(np.arange(-9.0, 9.0), 4.0, ax),
    "sparsity_by_layer": lambda ax: plot.sparsity_by_layer(summary_of(3), ax),
    "sensitivity_curves": lambda ax: plot.sensitivity_curves(CURVES, ax),
    "accuracy": lambda ax: plot.accuracy([0.0, 0.9], {"one": [0.9, 0.8]}, ax, dense=0.95),
    "mask": lambda ax: plot.mask(np.eye(4, dtype=bool), ax),
    "churn": lambda ax: plot.churn([{"step": 0, "sparsity": 0.5, "churn": 0.1}], ax),
}


def summary_of(layers):
    params = {f"layer_{i}": {"kernel": jnp.arange(8.0).reshape(2, 4)} for i in range(layers)}
    return jaxprune.summarize(params, jaxprune.make_masks(params, 0.5, rule=jaxprune.rules.layer_sparsity))


@pytest.mark.parametrize("name", DRAWN)
def test_no_word_and_no_line_is_black(axes, name):
    """On a dark page a figure without a background of its own would lose them."""
    DRAWN[name](axes)
    axes.figure.draw_without_rendering()
    ticks = [*axes.get_xticklabels(which="both"), *axes.get_yticklabels(which="both")]
    texts = [*axes.texts, *ticks, axes.xaxis.label, axes.yaxis.label, axes.title]
    colours = [text.get_color() for text in texts if text.get_text()]
    colours += [line.get_color() for line in axes.lines]
    colours += [spine.get_edgecolor() for spine in axes.spines.values() if spine.get_visible()]
    assert min(map(luminance, colours)) > 0.1


@pytest.mark.parametrize("name", DRAWN)
def test_without_axes_there_is_a_new_figure_of_pyplot(name):
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    before = plt.get_fignums()
    try:
        axes = DRAWN[name](None)
        other = DRAWN[name](None)
        assert axes.figure is not other.figure
        assert len(plt.get_fignums()) == len(before) + 2
        assert plt.gcf() is other.figure
    finally:
        plt.close("all")


def test_a_new_figure_of_many_layers_is_as_high_as_they_need():
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    try:
        heights = [plot.sparsity_by_layer(summary_of(n)).figure.get_figheight() for n in (1, 40, 100)]
        assert np.allclose(heights, [1.5, 13.2, 19.2])
    finally:
        plt.close("all")


def test_labels_of_layers_are_short_and_keep_their_numbers(axes):
    paths = [
        f"model/decoder/layers_{i}/self_attention/{name}/kernel" for i in (0, 12, 117) for name in ("out", "query")
    ]
    params = {path: jnp.arange(8.0).reshape(2, 4) for path in paths}
    masks = jaxprune.make_masks(params, 0.5, rule=jaxprune.rules.layer_sparsity)
    plot.sparsity_by_layer(jaxprune.summarize(params, masks), axes)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [f"…/layers_{i}/…/{name}/kernel" for i in (0, 12, 117) for name in ("out", "query")]
    axes.figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axes.texts]
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def test_of_many_curves_those_that_cost_most_stand_out(axes):
    count = 40
    cost = np.linspace(0, 0.5, count)[:, None]
    names = tuple(f"layers/{i}/kernel" for i in range(count))
    curves = jaxprune.choose.Sensitivity(
        (0.5, 0.9), names, tuple((name,) for name in names), (8,) * count, 1.0, 1 - cost * [[0.1, 1.0]],
        np.tile([[0.5, 0.9]], (count, 1)), np.array([0.9, 0.4]), np.array([0.5, 0.9]),
    )  # fmt: skip
    plot.sensitivity_curves(curves, axes)
    grey = [line for line in axes.lines if line.get_color() == plot.style.GREY]
    assert len(grey) == count - MAX_CURVES
    assert max(line.get_ydata()[-1] for line in axes.lines[count - MAX_CURVES : count]) < min(
        line.get_ydata()[-1] for line in grey
    )
    low, high = axes.get_ylim()
    heights = np.sort([text.xyann[1] for text in axes.texts if text.get_text() in (*names, "all together")])
    assert len(heights) == MAX_CURVES + 1
    assert low < heights[0] < heights[-1] <= high + 1e-9
    assert np.diff(heights).min() > 0.05 * (high - low)
    assert axes.get_xlim()[1] < 1  # no room for what was not tried


def test_churn(axes):
    history = [{"step": 0, "sparsity": 0.0, "churn": 0.0}, {"step": 10, "sparsity": 0.5, "churn": 0.25}]
    assert plot.churn(history, axes) is axes
    sparsity, churn = axes.lines
    np.testing.assert_array_equal(sparsity.get_xydata(), [[0, 0], [10, 0.5]])
    np.testing.assert_array_equal(churn.get_ydata(), [0, 0.25])


def test_names_at_the_ends_of_curves_do_not_touch(axes):
    plot.accuracy([0.5, 0.9], {name: [0.9, 0.8] for name in "abc"}, axes)
    low, high = axes.get_ylim()
    heights = sorted(text.xyann[1] for text in axes.texts)
    assert np.diff(heights).min() > 0.05 * (high - low)
