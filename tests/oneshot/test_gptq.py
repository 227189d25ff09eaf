"""Rounding to integers, alone and with pruning, against float64 NumPy; zeros that are exact; groups of every layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune
from jaxprune import oneshot, rules
from jaxprune.oneshot._codes import read_layout
from tests.support import oracles_oneshot as oracles
from tests.support.oneshot_problems import grams_of, one, params_of
from tests.support.slow import slow_but

KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
DAMPING = 0.01


def arrays(found):
    codes = found.codes["a/kernel"]
    return (*(np.asarray(tree["a"]["kernel"]) for tree in (found.params, found.masks)), np.asarray(codes.codes))


# inputs, bits, group_size, the rows of a group, symmetric
GRIDS = {
    "int4 by groups": (64, 4, 16, 16, True),
    "int4 by output": (40, 4, None, 40, True),
    "int3 by groups, asymmetric": (64, 3, 32, 32, False),
    "int8 by output, asymmetric": (33, 8, None, 33, False),
    "a last group that is shorter": (60, 4, 32, 30, True),
    "groups of one length but the last": (50, 4, 16, 13, False),
    "more than a block": (160, 4, 64, 54, True),
}


@pytest.mark.parametrize("name", slow_but(["int4 by groups", "int8 by output, asymmetric"], GRIDS))
@pytest.mark.slow
def test_dense_weights_are_rounded_as_the_paper_says(name):
    inputs, bits, group_size, group, symmetric = GRIDS[name]
    weights, gram = oracles.problem(inputs, 20, seed=1)
    found = oneshot.gptq(*one(weights, gram), bits=bits, group_size=group_size, symmetric=symmetric, block=64)
    values, mask, codes = arrays(found)
    expected, _, expected_codes = oracles.gptq(
        weights,
        oracles.damped(gram, DAMPING),
        np.ones(weights.shape, bool),
        bits=bits,
        group=group,
        symmetric=symmetric,
    )
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(values, found.codes["a/kernel"].values())
    assert mask.all()
    assert found.codes["a/kernel"].scale.shape == (-(-inputs // group), 20)


# inputs, rule, k, the oracle's choice, bits, group_size, the rows of a group, symmetric
PASSES = {
    "half, int4": (64, rules.layer_sparsity, 0.5, oracles.layer(0.5, 64, 20), 4, 16, 16, True),
    "by unit, int3": (64, rules.row_sparsity, 0.5, oracles.units(0.5, 64), 3, 32, 32, False),
    "2:4, int8": (48, rules.n_m(4), 2, oracles.n_of_m(2, 4), 8, 16, 16, False),
    "90 %, a last group that is shorter": (50, rules.layer_sparsity, 0.9, oracles.layer(0.9, 50, 20), 4, 16, 13, True),
    "none": (64, rules.layer_sparsity, 0.0, oracles.layer(0.0, 64, 20), 4, 32, 32, True),
}


@pytest.mark.parametrize("name", slow_but(["half, int4", "2:4, int8"], PASSES))
@pytest.mark.slow
def test_one_pass_prunes_and_rounds_as_the_paper_says(name):
    inputs, rule, k, choose, bits, group_size, group, symmetric = PASSES[name]
    weights, gram = oracles.problem(inputs, 20, seed=2)
    found = oneshot.prune_and_quantize(
        *one(weights, gram), k, rule=rule, bits=bits, group_size=group_size, symmetric=symmetric
    )
    values, mask, codes = arrays(found)
    expected, expected_mask, expected_codes = oracles.gptq(
        weights,
        oracles.damped(gram, DAMPING),
        np.ones(weights.shape, bool),
        bits=bits,
        group=group,
        symmetric=symmetric,
        choose=choose,
    )
    np.testing.assert_array_equal(mask, expected_mask)
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    assert not np.signbit(values[~mask]).any()
    assert (values[~mask] == 0).all()


def test_where_an_output_has_one_scale_it_is_that_of_the_dense_weights():
    weights, gram = oracles.problem(64, 20, seed=3)
    found = oneshot.prune_and_quantize(*one(weights, gram), 0.5, bits=4)
    scale, _ = oracles.fit(weights, np.ones(weights.shape, bool), 4, symmetric=True)
    np.testing.assert_allclose(found.codes["a/kernel"].scale[0], scale, rtol=1e-6)
    _, mask, codes = arrays(found)
    assert (~mask).sum() == 640
    assert (codes[~mask] == 0).all()
    assert (codes.min(), codes.max()) == (-8, 7)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_mask_that_is_given_stays_whatever_is_rounded(act_order, symmetric):
    weights, gram = oracles.problem(48, 20, seed=4)
    mask = np.random.default_rng(0).random(weights.shape) < 0.4
    params, grams = one(np.where(mask, weights, 0), gram)
    found = oneshot.gptq(
        params,
        grams,
        masks={"a": {"kernel": jnp.asarray(mask)}},
        bits=3,
        group_size=16,
        symmetric=symmetric,
        act_order=act_order,
    )
    values, kept, codes = arrays(found)
    order = np.argsort(-np.diagonal(gram), kind="stable") if act_order else None
    expected, _, expected_codes = oracles.gptq(
        np.where(mask, weights, 0),
        oracles.damped(gram, DAMPING),
        mask,
        bits=3,
        group=16,
        symmetric=symmetric,
        order=order,
    )
    np.testing.assert_array_equal(kept, mask)
    np.testing.assert_array_equal(codes, expected_codes)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6)
    assert (values[~mask] == 0).all()
    # Some weights that stay are rounded to zero: the mask knows which are pruned, the zeros do not.
    assert (values[mask] == 0).any()


def test_weights_of_dead_inputs_are_rounded_to_the_nearest_and_pruned_first():
    weights, gram = oracles.problem(32, 10, 5)
    dead = [3, 7, 15]
    gram[dead] = gram[:, dead] = 0
    values, _, _ = arrays(oneshot.gptq(*one(weights, gram), bits=8, group_size=16))
    scale, _ = oracles.fit(weights[:16], np.ones((16, 10), bool), 8, symmetric=True)
    assert (np.abs(values[dead] - weights[dead]) <= 0.6 * scale).all()
    _, mask, _ = arrays(oneshot.prune_and_quantize(*one(weights, gram), 0.5, bits=8, group_size=32))
    assert not mask[dead].any()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [2.0**125, 2.0**-100])
def test_codes_do_not_depend_on_how_large_the_weights_are(size, symmetric):
    weights, gram = oracles.problem(16, 8, seed=6)
    plain = oneshot.gptq(*one(weights, gram), symmetric=symmetric)
    found = oneshot.gptq(*one(weights * np.float32(size), gram), symmetric=symmetric)
    np.testing.assert_array_equal(found.codes["a/kernel"].codes, plain.codes["a/kernel"].codes)
    np.testing.assert_array_equal(found.codes["a/kernel"].scale, plain.codes["a/kernel"].scale * size)


def test_each_matrix_of_a_stack_is_rounded_by_itself():
    problems = [oracles.problem(24, 16, seed) for seed in range(3)]
    weights, grams = (np.stack(each) for each in zip(*problems, strict=True))
    found = oneshot.prune_and_quantize(*one(weights, grams), jnp.array([0.25, 0.5, 0.75]), group_size=8)
    assert found.codes["a/kernel"].scale.shape == (3, 3, 16)
    np.testing.assert_array_equal((~found.masks["a"]["kernel"]).sum((1, 2)), [96, 192, 288])
    for n, k in enumerate([0.25, 0.5, 0.75]):
        alone = oneshot.prune_and_quantize(*one(*problems[n]), k, group_size=8)
        np.testing.assert_array_equal(found.codes["a/kernel"].codes[n], alone.codes["a/kernel"].codes)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["HWIO", "OIHW"])
def test_the_inputs_of_a_convolution_form_groups_that_lie_together_in_memory(layout):
    """A group of 4 is 4 channels of one place of the window, or of 2 rows of a window of 2 where the window comes last."""
    shape = (2, 2, 8, 6) if layout == "HWIO" else (6, 8, 2, 2)
    kernel = jax.random.normal(jax.random.key(0), shape)

    def apply(params, x):
        return lax.conv_general_dilated(x, params["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", layout, "NHWC"))

    grams = jaxprune.calibrate_grams(apply, {"kernel": kernel}, [jax.random.normal(jax.random.key(1), (16, 5, 5, 8))])
    found = oneshot.gptq({"kernel": kernel}, grams, bits=8, group_size=4)
    codes = found.codes["kernel"]
    assert codes.scale.shape == ((2, 2, 2, 6) if layout == "HWIO" else (6, 8, 1, 1))
    # With 8 bits errors are small, so that a group's scale is nearly that of the dense weights.
    groups = kernel.reshape(2, 2, 2, 4, 6).transpose(3, 0, 1, 2, 4) if layout == "HWIO" else kernel.reshape(6, 8, 4).T
    largest = np.abs(np.asarray(groups)).max(0).reshape(-1)
    ours = np.asarray(codes.scale if layout == "HWIO" else codes.scale[..., 0, 0].T).reshape(-1)
    np.testing.assert_allclose(ours, largest / 127.5, rtol=0.05)
    np.testing.assert_allclose(found.params["kernel"], kernel, atol=0.05)
    np.testing.assert_array_equal(found.params["kernel"], codes.values())


def test_the_dtype_stays_and_the_codes_are_exact():
    weights, gram = oracles.problem(32, 16, 9)
    found = oneshot.prune_and_quantize(*one(jnp.asarray(weights, jnp.bfloat16), gram), 0.5, group_size=16)
    kernel, codes = found.params["a"]["kernel"], found.codes["a/kernel"]
    assert (kernel.dtype, codes.codes.dtype, codes.scale.dtype, codes.bits) == (jnp.bfloat16, jnp.int8, jnp.float32, 4)
    np.testing.assert_array_equal(kernel, codes.values().astype(jnp.bfloat16))
    np.testing.assert_array_equal(codes.scale, codes.scale.astype(jnp.bfloat16))


@pytest.mark.slow
def test_it_traces_and_codes_are_a_pytree():
    weights, gram = oracles.problem(16, 8, 6)
    params, grams = one(weights, gram)
    run = functools.partial(oneshot.prune_and_quantize, bits=4, group_size=8)
    plain, traced = run(params, grams, 0.5), jax.jit(run)(params, grams, 0.5)
    assert jax.tree.structure(plain) == jax.tree.structure(traced)
    for one_leaf, other in zip(jax.tree.leaves(plain), jax.tree.leaves(traced), strict=True):
        np.testing.assert_array_equal(one_leaf, other)


def test_leaves_that_are_not_rounded_stay_as_they_are():
    (first, gram), (second, other) = oracles.problem(16, 8, 6), oracles.problem(8, 8, 7)
    params, grams = params_of(a=first, b=second), grams_of({"a": first, "b": second}, {"a": gram, "b": other})
    params["a"]["bias"] = jnp.arange(8.0)
    masks = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), params)
    masks["b"]["kernel"] = masks["b"]["kernel"].at[0].set(False)
    found = oneshot.gptq(params, grams, masks=masks, prunable="a/kernel")
    assert list(found.codes) == ["a/kernel"]
    np.testing.assert_array_equal(found.params["b"]["kernel"], second)
    np.testing.assert_array_equal(found.params["a"]["bias"], np.arange(8.0))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found.masks, masks))


@pytest.mark.slow
def test_later_weights_make_up_and_one_pass_loses_less_than_two():
    """In the mean of ten layers: rounding alone, one pass, and pruning and rounding one after the other."""
    nearest, compensated, one_pass, in_turn, careless = np.zeros((5, 10))
    for seed in range(10):
        weights, gram = oracles.problem(96, 32, seed)
        params, grams = one(weights, gram)
        identity = grams_of({"a": weights}, {"a": np.eye(96)})

        def lost(found, weights=weights, gram=gram):
            return oracles.loss(np.asarray(found.params["a"]["kernel"]), weights, gram)

        nearest[seed] = lost(oneshot.gptq(params, identity, group_size=32))
        compensated[seed] = lost(oneshot.gptq(params, grams, group_size=32))
        one_pass[seed] = lost(oneshot.prune_and_quantize(params, grams, 0.5, group_size=32))
        pruned, masks = oneshot.sparsegpt(params, grams, 0.5, mask_block=32)
        in_turn[seed] = lost(oneshot.gptq(pruned, grams, masks=masks, group_size=32))
        careless[seed] = lost(oneshot.gptq(pruned, identity, masks=masks, group_size=32))
    assert compensated.mean() < 0.7 * nearest.mean()
    assert one_pass.mean() < in_turn.mean() < careless.mean()


# options, what the message says
REFUSED = {
    "bits": ({"bits": 9}, "bits from 2 to 8; got 9"),
    "bits that are a bool": ({"bits": True}, "bits from 2 to 8; got True"),
    "group": ({"group_size": 1}, "group_size, a whole number of inputs of at least 2, or None; got 1"),
    "block": ({"block": 0}, "block >= 1; got 0"),
    "damping": ({"damping": -1.0}, "damping >= 0"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("function", ["gptq", "prune_and_quantize"])
def test_errors_say_what_was_asked(name, function):
    options, message = REFUSED[name]
    params, grams = one(*oracles.problem(16, 8, 16))
    arguments = (params, grams) if function == "gptq" else (params, grams, 0.5)
    with pytest.raises(ValueError, match=f"{function} takes {message}|{message}"):
        getattr(oneshot, function)(*arguments, **options)


# The shape of a convolution's kernel, group_size, that of the scales
WINDOWS = {
    "two channels' worth do not divide a window of three": ((3, 3, 4, 2), 8, (3, 3, 1, 2)),
    "a window of three does": ((3, 3, 4, 2), 12, (3, 1, 1, 2)),
    "no half of ten has more than four": ((3, 3, 10, 2), 4, (3, 3, 5, 2)),
    "the whole": ((3, 3, 4, 2), None, (1, 1, 1, 2)),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_groups_divide_a_window_evenly(name):
    shape, group_size, scales = WINDOWS[name]
    params = {"kernel": jax.random.normal(jax.random.key(0), shape)}
    kinds = ("NHWC", "HWIO", "NHWC")

    def apply(params, x):
        return lax.conv_general_dilated(x, params["kernel"], (1, 1), "VALID", dimension_numbers=kinds)

    (site,) = jaxprune.find_sites(apply, params, jax.ShapeDtypeStruct((1, 5, 5, shape[2]), jnp.float32))
    boxes = read_layout(site, group_size, 1).boxes
    assert tuple(-(-n // box) for n, box in zip(shape, boxes, strict=True)) == scales


def test_groups_that_cut_a_pattern_are_refused():
    params, grams = one(*oracles.problem(48, 8, 16))
    with pytest.raises(
        ValueError, match=r"groups of 6 cut through the pattern's groups of 4 .* params\['a'\]\['kernel'\]"
    ):
        oneshot.prune_and_quantize(params, grams, 2, rule=rules.n_m(4), group_size=6)


def test_a_part_of_a_leaf_that_multiplies_nothing_is_refused():
    params = {"kernel": jnp.ones((4, 6))}
    grams = jaxprune.calibrate_grams(lambda p, x: x @ p["kernel"][:, :3], params, [jnp.eye(4)])
    with pytest.raises(ValueError, match=r"Of params\['kernel'\] only a part multiplies the data"):
        oneshot.gptq(params, grams)


@pytest.mark.slow
def test_parts_of_a_fused_leaf_are_rounded_each_with_its_own_inputs():
    kernel = jax.random.normal(jax.random.key(0), (8, 6))

    def apply(params, x):
        return x @ params["kernel"][:, :3], jnp.flip(x, 1) @ params["kernel"][:, 3:]

    grams = jaxprune.calibrate_grams(apply, {"kernel": kernel}, [jax.random.normal(jax.random.key(1), (64, 8))])
    found = oneshot.gptq({"kernel": kernel}, grams, group_size=4)
    assert found.codes["kernel"].scale.shape == (2, 6)
    for columns, flipped in ((slice(3), False), (slice(3, 6), True)):
        (site,) = (site for site in grams.sites if (grams.of(site) == grams.of(grams.sites.sites[int(flipped)])).all())
        alone = oneshot.gptq(*one(np.asarray(kernel[:, columns]), np.asarray(grams.of(site)[0])), group_size=4)
        np.testing.assert_array_equal(found.codes["kernel"].codes[:, columns], alone.codes["a/kernel"].codes)


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize("spec", [P(None, "x"), P("x", None)])
def test_on_a_mesh_the_codes_are_those_of_one_device(kind, spec):
    weights, gram = oracles.problem(32, 64, 18)
    params, grams = one(weights, gram)
    expected = oneshot.prune_and_quantize(params, grams, 0.5, group_size=8)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    params = jax.device_put(params, NamedSharding(mesh, spec))
    grams = jax.device_put(grams, NamedSharding(mesh, P()))
    found = oneshot.prune_and_quantize(params, grams, 0.5, group_size=8)
    for ours, alone in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, alone)
    if spec == P("x", None):
        return  # where each device has some inputs, the compiler decides
    for leaf in (found.params["a"]["kernel"], found.masks["a"]["kernel"], found.codes["a/kernel"].codes):
        assert leaf.sharding.is_equivalent_to(params["a"]["kernel"].sharding, 2)
