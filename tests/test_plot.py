"""Every figure shows the numbers it was given; what it looks like has to be looked at."""

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import jaxprune
from jaxprune import plot
from jaxprune.plot._figures import MAX_CELLS
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
