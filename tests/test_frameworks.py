"""The same weights give the same masks, whatever holds them: Linen, NNX, Equinox, Haiku, plain containers."""

from collections.abc import Callable
from typing import NamedTuple

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze

from jaxprune import apply_masks, make_masks, rules, sparsity, summarize

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(2, 6)), jnp.float32)
# One multilayer perceptron, 6 to 8 to 3.
WEIGHTS = [
    (jnp.asarray(RNG.normal(size=shape), jnp.float32), jnp.asarray(RNG.normal(size=shape[1]), jnp.float32))
    for shape in [(6, 8), (8, 3)]
]
EXPECTED = [jnp.abs(kernel) >= 0.8 * jnp.std(kernel) for kernel, _ in WEIGHTS]
PRUNED = [jnp.where(mask, kernel, 0) for mask, (kernel, _) in zip(EXPECTED, WEIGHTS, strict=True)]


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.relu(nn.Dense(8)(x))
        return nn.Dense(3)(hidden)


class NNX(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Linear(8, 3, rngs=rngs)
        self.steps = nnx.BatchStat(jnp.array(3))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.second(nnx.relu(self.first(x)))


class Dense(NamedTuple):
    w: jax.Array
    b: jax.Array


def nnx_model() -> NNX:
    model = NNX(nnx.Rngs(0))
    for layer, (kernel, bias) in zip((model.first, model.second), WEIGHTS, strict=True):
        layer.kernel[...], layer.bias[...] = kernel, bias
    return model


def linen() -> dict:
    return {f"Dense_{i}": {"kernel": kernel, "bias": bias} for i, (kernel, bias) in enumerate(WEIGHTS)}


def boxed() -> dict:
    names = ("inputs", "outputs")
    return {name: leaf | {"kernel": nn.Partitioned(leaf["kernel"], names)} for name, leaf in linen().items()}


def equinox_model() -> eqx.nn.MLP:
    model = eqx.nn.MLP(6, 3, 8, 1, key=jax.random.key(0))
    return eqx.tree_at(
        lambda mlp: [leaf for layer in mlp.layers for leaf in (layer.weight, layer.bias)],
        model,
        [leaf for kernel, bias in WEIGHTS for leaf in (kernel.T, bias)],
    )


def haiku() -> dict:
    return {f"mlp/~/linear_{i}": {"w": kernel, "b": bias} for i, (kernel, bias) in enumerate(WEIGHTS)}


def plain(tree: object) -> object:
    """The leaf itself, out of an NNX variable or a Linen box."""
    return tree[...] if isinstance(tree, nnx.Variable) else tree.unbox() if isinstance(tree, nn.Partitioned) else tree


HOLDERS: dict[str, tuple[Callable, Callable]] = {
    # name: (make the tree, find its two kernels)
    "linen dict": (linen, lambda t: [t["Dense_0"]["kernel"], t["Dense_1"]["kernel"]]),
    "linen FrozenDict": (lambda: freeze(linen()), lambda t: [t["Dense_0"]["kernel"], t["Dense_1"]["kernel"]]),
    "linen boxed": (boxed, lambda t: [plain(t["Dense_0"]["kernel"]), plain(t["Dense_1"]["kernel"])]),
    "nnx.State": (
        lambda: nnx.state(nnx_model(), nnx.Param),
        lambda t: [plain(t["first"]["kernel"]), plain(t["second"]["kernel"])],
    ),
    "pure nnx.State": (
        lambda: nnx.as_pure(nnx.state(nnx_model(), nnx.Param)),
        lambda t: [t["first"]["kernel"], t["second"]["kernel"]],
    ),
    "nnx dict": (
        lambda: nnx.to_pure_dict(nnx.state(nnx_model(), nnx.Param)),
        lambda t: [t["first"]["kernel"], t["second"]["kernel"]],
    ),
    "whole nnx.Module": (nnx_model, lambda t: [plain(t.first.kernel), plain(t.second.kernel)]),
    "equinox": (
        lambda: eqx.filter(equinox_model(), eqx.is_inexact_array),
        lambda t: [t.layers[0].weight.T, t.layers[1].weight.T],
    ),
    "haiku": (haiku, lambda t: [t["mlp/~/linear_0"]["w"], t["mlp/~/linear_1"]["w"]]),
    "tuple": (lambda: tuple(WEIGHTS), lambda t: [t[0][0], t[1][0]]),
    "list of NamedTuples": (lambda: [Dense(*layer) for layer in WEIGHTS], lambda t: [t[0].w, t[1].w]),
}
# Of tuples the warning is in order, and what it says is tested where it is made.
pytestmark = pytest.mark.filterwarnings("ignore:(params|masks) has no names")
every_holder = pytest.mark.parametrize(("make", "kernels"), HOLDERS.values(), ids=HOLDERS.keys())


@every_holder
def test_the_same_masks_and_weights(make: Callable, kernels: Callable) -> None:
    params = make()
    masks = make_masks(params, 0.8)
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    chex.assert_trees_all_equal(kernels(masks), EXPECTED)
    kept_whole = sum(bool(mask.all()) for mask in jax.tree.leaves(masks))
    assert kept_whole == len(jax.tree.leaves(params)) - 2
    pruned = apply_masks(params, masks)
    assert jax.tree.structure(pruned) == jax.tree.structure(params)
    chex.assert_trees_all_equal(kernels(pruned), PRUNED)


@pytest.mark.parametrize("holder", ["nnx.State", "whole nnx.Module", "equinox", "linen boxed"])
def test_trees_of_classes_go_through_jit(holder: str) -> None:
    make, kernels = HOLDERS[holder]
    pruned = jax.jit(lambda params: apply_masks(params, make_masks(params, 0.8)))(make())
    chex.assert_trees_all_equal(kernels(pruned), PRUNED)


@pytest.mark.slow
@every_holder
def test_the_same_figures(make: Callable, kernels: Callable) -> None:
    params = make()
    masks = make_masks(params, 0.8)
    removed = sum(int((~mask).sum()) for mask in EXPECTED)
    assert float(sparsity(masks)) == pytest.approx(removed / 72)
    summary = summarize(params, masks)
    assert (summary.prunable.size, summary.prunable.kept) == (72, 72 - removed)
    assert [row.kept for row in summary.rows if row.prunable] == [int(mask.sum()) for mask in EXPECTED]


@pytest.mark.slow
@every_holder
def test_one_k_for_each_layer_and_the_joint_threshold(make: Callable, kernels: Callable) -> None:
    """A tree prefix of any class fits, and rules that look at all layers see the same weights."""
    params = make()
    whole = make_masks(params, 0.8)
    ks = jax.tree.map(lambda leaf: 0.8, params)
    chex.assert_trees_all_equal(kernels(make_masks(params, ks)), kernels(whole))
    masks = kernels(make_masks(params, 0.5, rule=rules.global_sparsity))
    joint = np.median(np.abs(np.concatenate([kernel.ravel() for kernel, _ in WEIGHTS])))
    chex.assert_trees_all_equal(masks, [jnp.abs(kernel) > joint for kernel, _ in WEIGHTS])


@pytest.mark.parametrize(
    ("masks_of", "params_of"),
    [
        ("linen dict", "linen FrozenDict"),
        ("linen FrozenDict", "linen dict"),
        ("linen boxed", "linen dict"),
        ("linen dict", "linen boxed"),
        ("nnx.State", "pure nnx.State"),
        ("pure nnx.State", "nnx.State"),
        ("nnx dict", "nnx.State"),
        ("nnx.State", "nnx dict"),
    ],
)
def test_masks_fit_another_class_of_the_same_paths(masks_of: str, params_of: str) -> None:
    (make_others, _), (make, kernels) = HOLDERS[masks_of], HOLDERS[params_of]
    params = make()
    pruned = apply_masks(params, make_masks(make_others(), 0.8))
    assert jax.tree.structure(pruned) == jax.tree.structure(params)
    chex.assert_trees_all_equal(kernels(pruned), PRUNED)


def test_pruned_models_run_and_agree() -> None:
    """The pruned trees go back into their frameworks: all four compute the same."""

    def prune(params: object) -> object:
        return apply_masks(params, make_masks(params, 0.8))

    (first, first_bias), (second, second_bias) = WEIGHTS

    def forward(kernels: list) -> np.ndarray:
        return np.maximum(X @ kernels[0] + first_bias[None], 0) @ kernels[1] + second_bias[None]

    expected = forward(PRUNED)
    assert not np.allclose(expected, forward([first, second]), atol=1e-3)

    model = nnx_model()
    nnx.update(model, prune(nnx.state(model, nnx.Param)))
    arrays, static = eqx.partition(equinox_model(), eqx.is_inexact_array)
    equinox = eqx.combine(prune(arrays), static)
    network = hk.transform(lambda x: hk.nets.MLP([8, 3])(x))
    outputs = {
        "linen": Linen().apply({"params": prune(linen())}, X),
        "frozen": Linen().apply({"params": FrozenDict(prune(linen()))}, X),
        "nnx": model(X),
        "whole nnx": prune(nnx_model())(X),
        "equinox": jax.vmap(equinox)(X),
        "haiku": network.apply(prune(haiku()), None, X),
    }
    for name, output in outputs.items():
        np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_whole_nnx_module_keeps_its_counters_and_keys() -> None:
    model = nnx_model()
    masks = make_masks(model, 0.8)
    pruned = apply_masks(model, masks)
    assert int(pruned.steps[...]) == 3
    assert pruned.dropout.rngs.key[...] == model.dropout.rngs.key[...]
    assert all(mask.dtype == bool for mask in jax.tree.leaves(masks))


def test_an_equinox_module_given_whole_names_the_function_in_it() -> None:
    with pytest.raises(TypeError, match=r"params\.activation.*eqx\.filter"):
        make_masks(equinox_model(), 0.8)
