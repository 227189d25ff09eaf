"""Scores of channels against NumPy, and in the channel rule."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune import rules, scores
from tests.support.score_checks import close, exact


@pytest.mark.parametrize("axes", [(0, 1, 2), (-1, 2, 1), 3, (0, 3), ()])
def test_channel_scores_against_numpy(axes):
    kernel = np.random.default_rng(0).normal(size=(3, 2, 4, 5)).astype(np.float32)
    reduced = (axes,) if isinstance(axes, int) else axes
    kept = [a for a in range(4) if a not in [b % 4 for b in reduced]]
    channels = np.transpose(exact(kernel), [*kept, *[b % 4 for b in reduced]])
    channels = channels.reshape(*[kernel.shape[a] for a in kept], -1)
    close(scores.channel_norm(kernel, axes, ord=1), abs(channels).sum(-1), rtol=1e-5)
    close(scores.channel_norm(kernel, axes), np.sqrt((channels**2).sum(-1)), rtol=1e-5)
    filters = channels.reshape(-1, channels.shape[-1])
    distances = np.sqrt(((filters[:, None] - filters[None]) ** 2).sum(-1)).sum(1)
    close(scores.fpgm(kernel, axes), distances.reshape(channels.shape[:-1]), rtol=1e-5)


def test_fpgm_finds_the_replaceable_filter_whatever_its_norm():
    filters = jnp.array([[10.0, 0.0], [0.0, 10.0], [10.0, 10.0], [7.0, 7.0], [0.1, 0.0], [7.0, 7.0]])
    found = scores.fpgm(filters, 1)
    assert found[3] == found[5] == found.min()
    assert scores.channel_norm(filters, 1).argmin() == 4


def test_channels_with_nan_rank_lowest():
    kernel = jnp.array([[jnp.nan, 0.0, 1.0, 5.0], [2.0, 0.0, 0.0, 0.0]])
    assert scores.channel_norm(kernel, 0).tolist() == [-jnp.inf, 0.0, 1.0, 5.0]
    assert scores.fpgm(kernel, 0).tolist() == [-jnp.inf, 6.0, 5.0, 9.0]
    assert scores.batch_norm_scale(jnp.array([jnp.nan, -1.0])).tolist() == [-jnp.inf, 1.0]


def test_a_channel_score_serves_the_channel_rule():
    params = {"kernel": jnp.array([[4.0, 7.0, 0.0], [4.0, 0.0, 0.0]])}
    l1, l2 = (functools.partial(scores.channel_norm, ord=ord) for ord in (1, 2))
    for norm, kept in ((l1, 0), (l2, 1), (scores.fpgm, 2)):
        masks = jaxprune.make_masks(params, 2 / 3, rule=rules.channels(rules.layer_sparsity, norm=norm))
        assert masks["kernel"].tolist() == [[channel == kept for channel in range(3)]] * 2


def test_channel_scores_refuse():
    with pytest.raises(ValueError, match=r"fpgm got axes \(2,\) for a kernel of shape \(2, 3\)"):
        scores.fpgm(jnp.ones((2, 3)), 2)
    with pytest.raises(ValueError, match=r"channel_norm got axes \(0, -2\)"):
        scores.channel_norm(jnp.ones((2, 3)), (0, -2))
    with pytest.raises(ValueError, match="ord=1 or ord=2; got 3"):
        scores.channel_norm(jnp.ones((2, 3)), 0, ord=3)
    for score in (scores.channel_norm, scores.fpgm):
        with pytest.raises(TypeError, match=r"floating-point numbers; got int32"):
            score(jnp.ones((2, 3), int), 0)
    with pytest.raises(TypeError, match="batch_norm_scale takes an array of floating-point numbers; got int32"):
        scores.batch_norm_scale(jnp.ones(3, int))
