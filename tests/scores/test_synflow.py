"""Synaptic flow against the sum over paths, and its data-free loop against the algorithm."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxprune import oneshot, scores
from tests.support.score_checks import close, exact, relu_net


def random_net(widths, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in itertools.pairwise(widths)]


def flow_oracle(kernels):
    """R and the scores |theta dR/dtheta| of a ReLU net without biases, by the layers before and behind."""
    kernels = [abs(exact(kernel)) for kernel in kernels]
    before = [np.ones(len(kernels[0]))]
    for kernel in kernels:
        before.append(before[-1] @ kernel)
    behind = [np.ones(kernels[-1].shape[1])]
    for kernel in kernels[::-1]:
        behind.append(kernel @ behind[-1])
    behind = behind[::-1][1:]
    return before[-1].sum(), [b[:, None] * k * a for b, k, a in zip(before, kernels, behind, strict=False)]


@pytest.mark.slow
def test_synflow_is_the_sum_over_paths():
    params = random_net((3, 4, 5, 2))
    total, expected = flow_oracle(params)
    found = scores.synflow(relu_net, params, jax.ShapeDtypeStruct((1, 3), jnp.float32))
    for leaf, oracle in zip(found, expected, strict=True):
        close(leaf, oracle, rtol=1e-5)
        assert abs(float(leaf.sum()) / total - 1) < 1e-5  # conserved from layer to layer


def test_synflow_takes_nan_for_zero_and_reads_no_data():
    params = random_net((3, 4, 2))
    broken = [params[0].at[1, 2].set(jnp.nan), params[1]]
    found = scores.synflow(relu_net, broken, jnp.full((1, 3), jnp.nan))
    expected = flow_oracle([np.nan_to_num(leaf) for leaf in broken])[1]
    assert found[0][1, 2] == -jnp.inf
    close(found[0].at[1, 2].set(0), expected[0], rtol=1e-5)
    close(found[1], expected[1], rtol=1e-5)


def test_synflow_refuses():
    with pytest.raises(TypeError, match=r"feeds ones, but x\['tokens'\] holds int32"):
        scores.synflow(relu_net, random_net((2, 2)), {"tokens": jnp.ones((1, 3), jnp.int32)})
    with pytest.raises(ValueError, match="R is inf"):
        scores.synflow(relu_net, [jnp.full((2, 2), 1e30)] * 3, jnp.ones((1, 2)))
    for rounds in (0, 2.0, True):
        with pytest.raises(ValueError, match="rounds >= 1"):
            oneshot.synflow_masks(relu_net, random_net((2, 2)), jnp.ones((1, 2)), 0.5, rounds=rounds)
    with pytest.raises(ValueError, match=r"sparsity k in \[0, 1\]; got 1.5"):
        oneshot.synflow_masks(relu_net, random_net((2, 2)), jnp.ones((1, 2)), 1.5)


def pruned(kernels, masks):
    return [np.where(mask, kernel, 0) for kernel, mask in zip(kernels, masks, strict=True)]


def synflow_oracle(kernels, sparsity, rounds):
    """Algorithm 1 with exact counts."""
    size = sum(kernel.size for kernel in kernels)
    masks = [np.ones(kernel.shape, bool) for kernel in kernels]
    for r in range(1, rounds + 1):
        found = flow_oracle(pruned(kernels, masks))[1]
        flat = np.concatenate([np.where(m, s, -np.inf).ravel() for m, s in zip(masks, found, strict=True)])
        keep = np.ones(size, bool)
        removed = round((1 - (1 - sparsity) ** (r / rounds)) * size)
        keep[np.lexsort((-np.arange(size), flat))[:removed]] = False
        parts = np.split(keep, np.cumsum([kernel.size for kernel in kernels])[:-1])
        masks = [part.reshape(kernel.shape) for part, kernel in zip(parts, kernels, strict=True)]
    return masks


@pytest.mark.slow
def test_one_round_of_synflow_is_one_shot():
    params = random_net((5, 4))
    [mask] = oneshot.synflow_masks(relu_net, params, jnp.ones((1, 5)), 0.3, rounds=1)
    np.testing.assert_array_equal(mask, synflow_oracle(params, 0.3, 1)[0])


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 9, use_bias=False, rngs=rngs)
        self.second = nnx.Linear(9, 5, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


@pytest.mark.slow
def test_synflow_masks_of_an_nnx_state_follow_the_algorithm_under_jit():
    graph, state = nnx.split(Net(nnx.Rngs(0)), nnx.Param)

    @jax.jit
    def prune(state, sparsity):
        apply = lambda state, x: nnx.merge(graph, state)(x)  # noqa: E731
        return oneshot.synflow_masks(apply, state, jnp.ones((1, 6)), sparsity, rounds=12)

    found = prune(state, 0.9)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    kernels, masks = jax.tree.leaves(state), jax.tree.leaves(found)
    for mask, oracle in zip(masks, synflow_oracle(kernels, 0.9, 12), strict=True):
        np.testing.assert_array_equal(mask, oracle)
    # A path from the inputs to the outputs is left.
    assert flow_oracle(pruned(kernels, masks))[0] > 0
