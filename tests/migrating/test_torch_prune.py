"""What torch.nn.utils.prune defines, in NumPy, against what the page for those who come from it writes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune import algebra, make_masks, rules, scores

# [outputs, inputs] and [outputs, inputs, taps, taps], as torch keeps them.
LINEAR = np.random.default_rng(0).normal(size=(10, 12)).astype(np.float32)
CONV = np.random.default_rng(1).normal(size=(8, 3, 3, 3)).astype(np.float32)


def number(amount: float | int, size: int) -> int:
    """An int is a count, a float a share, rounded half to even."""
    return amount if isinstance(amount, int) else round(amount * size)


def unstructured(sizes: np.ndarray, amount: float | int) -> np.ndarray:
    mask = np.ones(sizes.size, bool)
    mask[np.argsort(sizes.ravel(), kind="stable")[: number(amount, sizes.size)]] = False
    return mask.reshape(sizes.shape)


def ln_structured(weight: np.ndarray, amount: float | int, n: int, dim: int) -> np.ndarray:
    others = tuple(a for a in range(weight.ndim) if a != dim)
    norms = (np.abs(weight) ** n).sum(others, keepdims=True) ** (1 / n)
    return np.broadcast_to(unstructured(norms, amount), weight.shape)


def mask_of(weight: np.ndarray, k: Any, **given: Any) -> np.ndarray:
    return np.asarray(make_masks({"layer": {"weight": weight}}, k, **given)["layer"]["weight"])


@pytest.mark.parametrize("weight", [LINEAR, CONV], ids=["linear", "conv"])
@pytest.mark.parametrize("amount", [0.0, 0.125, 0.3, 0.5, 0.9, 7])
def test_l1_unstructured(weight: np.ndarray, amount: float | int) -> None:
    k = amount / weight.size if isinstance(amount, int) else amount
    here = mask_of(weight, k, rule=rules.layer_sparsity)
    np.testing.assert_array_equal(here, unstructured(np.abs(weight), amount))


def test_half_a_weight_is_rounded_to_even_in_both() -> None:
    five = np.arange(1.0, 6.0, dtype=np.float32)[None]
    assert mask_of(five, 0.5, rule=rules.layer_sparsity).sum() == unstructured(five, 0.5).sum() == 3


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("weight", [LINEAR, CONV], ids=["linear", "conv"])
def test_ln_structured(weight: np.ndarray, n: int, dim: int) -> None:
    norm = functools.partial(scores.channel_norm, ord=n)
    here = mask_of(weight, 0.3, rule=rules.channels(rules.layer_sparsity, axis=dim, norm=norm))
    np.testing.assert_array_equal(here, ln_structured(weight, 0.3, n, dim))


@pytest.mark.parametrize("amount", [0.2, 0.5, 0.9])
def test_global_unstructured(amount: float) -> None:
    params = {"0": {"weight": CONV}, "1": {"weight": LINEAR}}
    flat = unstructured(np.abs(np.concatenate([CONV.ravel(), LINEAR.ravel()])), amount)
    masks = make_masks(params, amount, rule=rules.global_sparsity)
    here = np.concatenate([np.ravel(masks[name]["weight"]) for name in params])
    np.testing.assert_array_equal(here, flat)


def test_a_second_call_there_prunes_a_share_of_what_is_left() -> None:
    first = unstructured(np.abs(LINEAR), 0.3)
    rest = np.abs(LINEAR)[first]
    second = first.copy()
    second[first] = unstructured(rest, 0.2)
    np.testing.assert_array_equal(mask_of(LINEAR, 0.3 + 0.7 * 0.2, rule=rules.layer_sparsity), second)
    twice = [{"weight": jnp.asarray(mask)} for mask in (first, unstructured(np.abs(LINEAR), 0.2))]
    np.testing.assert_array_equal(algebra.intersect(*twice)["weight"], first)  # k is always of the whole


def test_everything_may_go_there_and_one_weight_stays_here() -> None:
    assert unstructured(np.abs(LINEAR), 1.0).sum() == 0
    with pytest.warns(rules.PruningWarning):
        assert mask_of(LINEAR, 1.0, rule=rules.layer_sparsity).sum() == 1


def test_masks_in_the_forward_pass_are_their_hooks() -> None:
    """weight_orig keeps its value under a mask and gets no gradient."""
    params = {"weight": jnp.asarray(LINEAR)}
    masks = make_masks(params, 0.3, rule=rules.layer_sparsity)
    grads = jax.grad(lambda p: jnp.sum(jaxprune.apply_masks(p, masks)["weight"] ** 2))(params)
    np.testing.assert_array_equal(grads["weight"], 2 * LINEAR * np.asarray(masks["weight"]))


def test_masks_of_a_torch_model_by_transposition() -> None:
    kernel = jnp.asarray(LINEAR.T)
    here = make_masks({"kernel": kernel}, 0.3, rule=rules.layer_sparsity)["kernel"]
    np.testing.assert_array_equal(np.transpose(here), unstructured(np.abs(LINEAR), 0.3))
