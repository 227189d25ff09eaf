"""Which leaves, which axes, which stacks: by names, patterns, trees, or what the function does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune
from jaxprune import algebra, rules, scores, transforms
from jaxprune._tree._axes import Axes, conventional
from jaxprune._tree._params import read_params
from jaxprune._tree._paths import as_prefix, flatten
from jaxprune._tree._shapes import require_shapes


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# path, shape, stack, inputs, outputs
CONVENTIONS = [
    ("dense/kernel", (3, 4), (), 0, (1,)),
    ("conv/kernel", (3, 3, 8, 16), (), 2, (3,)),
    ("layers/dense/kernel", (5, 3, 4), (0,), 1, (2,)),
    ("middle/kernel", (3, 5, 4), (1,), 0, (2,)),
    ("attention/query/kernel", (8, 2, 4), (), 0, (1, 2)),
    ("linear/weight", (16, 8), (), 1, (0,)),
    ("conv/weight", (16, 8, 3, 3), (), 1, (0,)),
    ("dense/bias", (4,), (), None, (0,)),
]


@pytest.mark.parametrize(("path", "shape", "stack", "inputs", "outputs"), CONVENTIONS)
def test_axes_by_convention_are_a_function_of_path_and_shape(path, shape, stack, inputs, outputs):
    assert conventional(path, shape, stack)[:3] == (stack, inputs, outputs)


# One function with a convolution, a transposed one, a transposed dense layer and stacks in two places.
PARAMS = {
    "conv": normal(3, 3, 4, 8),
    "back": normal(3, 3, 4, 8, seed=1),  # [window, out, in], as a transposed kernel lies
    "readout": normal(8, 4, seed=2),  # [out, in]
    "layers": normal(3, 4, 4, seed=3),
    "experts": normal(4, 2, 4, seed=4),  # [in, expert, out]
    "scale": normal(4, 4, seed=5),
}


def fn(params, x):
    y = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    y = jax.lax.conv_transpose(
        y, params["back"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), transpose_kernel=True
    )
    y, _ = jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), y, params["layers"])
    y = jnp.einsum("bhwi,ieo->bhweo", y, params["experts"]).sum(3)
    return jnp.einsum("bhwi,oi->bhwo", y * params["scale"][None, None, :1], params["readout"])


SITES = jaxprune.find_sites(fn, PARAMS, jnp.ones((2, 4, 4, 4)))


def test_sites_say_which_leaves_which_axes_and_which_stacks():
    tree = read_params(PARAMS, sites=SITES)
    chosen = dict(zip(tree.paths, tree.prunable, strict=True))
    assert chosen == {"back": True, "conv": True, "experts": True, "layers": True, "readout": True, "scale": False}
    axes = dict(zip(tree.paths, tree.axes, strict=True))
    assert axes["conv"][:3] == ((), 2, (3,))
    assert axes["back"][:3] == ((), 3, (2,))
    assert axes["readout"][:3] == ((), 1, (0,))
    assert axes["layers"][:3] == ((0,), 1, (2,))
    assert axes["scale"] == conventional("scale", (4, 4))


def test_groups_run_along_the_inputs_of_a_convolution_and_of_a_transposed_one_in_one_call():
    masks = jaxprune.make_masks(PARAMS, 2, rule=rules.n_m(4), sites=SITES)
    for path, axis in (("conv", 2), ("back", 3), ("readout", 1), ("layers", 1), ("experts", 0)):
        groups = np.moveaxis(np.asarray(masks[path]), axis, -1).reshape(-1, 4)
        assert (groups.sum(1) == 2).all(), path
    assert masks["scale"].all()


@pytest.mark.slow
def test_rows_and_layers_are_those_of_the_function():
    rows = jaxprune.make_masks(PARAMS, 0.5, rule=rules.row_sparsity, sites=SITES)
    assert (np.asarray(rows["readout"]).sum(1) == 2).all()
    assert (np.asarray(rows["back"]).sum((0, 1, 3)) == 36).all()
    # Each layer of the stack by itself, though one is far larger.
    params = PARAMS | {"layers": PARAMS["layers"] * jnp.array([1.0, 100.0, 0.01])[:, None, None]}
    layers = jaxprune.make_masks(params, 0.25, rule=rules.layer_sparsity, sites=SITES)
    assert (~np.asarray(layers["layers"])).sum((1, 2)).tolist() == [4, 4, 4]
    assert jaxprune.summarize(params, layers, sites=SITES).prunable.sparsity == 0.25


def moved(rule, k, **options):
    """Masks of a stack whose layers lie along the axis in the middle, and of the same with the layers in front."""
    weights = normal(6, 3, 4) * jnp.array([1.0, 50.0, 0.02])[None, :, None]
    axes = Axes((1,), 0, (2,))

    class Middle:
        def prunable(self, path, leaf):
            return True

        def axes(self, path):
            return axes

    found = jaxprune.make_masks({"w": weights}, k, rule=rule, sites=Middle(), **options)["w"]
    front = {"w": jnp.moveaxis(weights, 1, 0)}
    expected = jaxprune.make_masks(front, k, rule=rule, stacked=lambda path, leaf: 1, **options)["w"]
    return np.asarray(found), np.moveaxis(np.asarray(expected), 0, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "k"),
    [
        (rules.std_threshold, 1.0),
        (rules.std_threshold, jnp.array([0.5, 1.0, 1.5])),
        (rules.layer_sparsity, 0.5),
        (rules.layer_sparsity, jnp.array([0.25, 0.5, 0.75])),
        (rules.row_sparsity, 0.5),
        (rules.row_sparsity, jnp.array([0.0, 0.5, 1 / 3])),
        (rules.erk_sparsity, 0.5),
        (rules.n_m(3), 2),
        (rules.n_m(3), jnp.array([1.0, 2.0, 3.0])),
        (rules.channels(rules.layer_sparsity), 0.5),
        (rules.blocks(rules.layer_sparsity, (2, 2)), 0.5),
    ],
    ids=str,
)
def test_layers_may_be_counted_by_any_axis(rule, k):
    found, expected = moved(rule, k)
    np.testing.assert_array_equal(found, expected)
    assert not found.all()


@pytest.mark.slow
def test_patterns_trees_predicates_and_sites_are_accepted_alike():
    named = [path for path in PARAMS if path != "scale"]
    expected = jaxprune.make_masks(PARAMS, 0.5, rule=rules.layer_sparsity, prunable=SITES, stacked=SITES)
    for prunable in (named, lambda path, leaf: path in named, {path: path in named for path in PARAMS}, SITES.prunable):
        for stacked in (["layers"], {"layers": 1}, lambda path, leaf: int(path == "layers")):
            found = jaxprune.make_masks(PARAMS, 0.5, rule=rules.layer_sparsity, prunable=prunable, stacked=stacked)
            for path in ("conv", "layers", "scale"):
                np.testing.assert_array_equal(found[path], expected[path])
    assert algebra.count_kept(expected, prunable="layers") == 24
    assert float(jaxprune.sparsity(expected, sites=SITES)) == pytest.approx(0.5, abs=0.01)


def test_a_pattern_names_a_leaf_or_a_module_above_it():
    params = {"a": {"x": {"kernel": normal(2, 2)}}, "b": {"y": {"kernel": normal(2, 2)}}}
    for pattern in ("a", "a/*", "a/x/kernel", "*/x"):
        masks = jaxprune.make_masks(params, 0.5, rule=rules.layer_sparsity, prunable=pattern)
        assert [int(leaf.sum()) for leaf in jax.tree.leaves(masks)] == [2, 4], pattern


def test_transforms_and_scores_take_sites():
    tx = transforms.keep_zeros(sites=SITES)
    zeroed = jaxprune.apply_masks(PARAMS, jaxprune.make_masks(PARAMS, 0.5, rule=rules.layer_sparsity, sites=SITES))
    zeroed["scale"] = zeroed["scale"].at[0, 0].set(0.0)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, zeroed), tx.init(zeroed), zeroed)
    assert float(updates["scale"][0, 0]) == 1.0  # no product: its zero may move
    assert bool((updates["conv"][zeroed["conv"] == 0] == 0).all())
    found = scores.lamp({"layers": PARAMS["layers"]}, sites=SITES)["layers"]
    assert np.asarray(found).max((1, 2)).tolist() == [1.0, 1.0, 1.0]


def test_a_tree_answers_by_path():
    tree = flatten({"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}, "params")
    assert tree.owner_of("0/mu/a/kernel") == "a/kernel"
    assert tree.owner_of("count") is None
    assert tree.by_path["a/bias"].shape == (3,)
    with pytest.raises(
        ValueError, match=r"The plan has b/kernel of .* params does not have; it has a/bias, a/kernel. Look."
    ):
        require_shapes("The plan", {"b/kernel": (2, 3)}, "params", tree.shapes, "Look.")
    with pytest.raises(
        ValueError, match=r"The plan has a/kernel of shape \(2, 4\); in params it has shape \(2, 3\). Look."
    ):
        require_shapes("The plan", {"a/kernel": (2, 4)}, "params", tree.shapes, "Look.")
    prefix = as_prefix({"a/kernel": 0.5, "a/bias": 1.0})
    assert tree.spread(prefix, "k") == [1.0, 0.5]
