"""Rules that remove exact counts, against a NumPy stable sort, by properties, and their guards."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxprune
from jaxprune import rules

KEY = jax.random.key(0)
COUNTED = {"layer": rules.layer_sparsity, "global": rules.global_sparsity, "erk": rules.erk_sparsity}


def model(dtype=jnp.float32):
    keys = jax.random.split(KEY, 3)
    return {
        "a": {"kernel": jax.random.normal(keys[0], (6, 8), dtype), "bias": jnp.zeros(8, dtype)},
        "b": {"kernel": jax.random.normal(keys[1], (2, 2, 3, 4), dtype)},
        "c": {"kernel": jax.random.normal(keys[2], (10, 10), dtype)},
    }


def removed(masks):
    return sum(int((~mask).sum()) for mask in jax.tree.leaves(masks))


def oracle(arrays, count):
    """Masks by a stable sort: the smallest go, among equals the last ones (later array, higher index)."""
    flat = np.concatenate([np.asarray(a, np.float64).ravel() for a in arrays])
    flat = np.abs(flat)
    order = np.lexsort((-np.arange(flat.size), flat))
    keep = np.ones(flat.size, bool)
    keep[order[:count]] = False
    ends = np.cumsum([np.size(a) for a in arrays])
    return [part.reshape(np.shape(a)) for part, a in zip(np.split(keep, ends[:-1]), arrays, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("k", [0.0, 0.3, 0.5, 0.9])
def test_layer_sparsity_equals_a_stable_sort(k, dtype):
    params = model(dtype)
    masks = jaxprune.make_masks(params, k, rule=rules.layer_sparsity)
    for name in "abc":
        weights = params[name]["kernel"]
        [expected] = oracle([weights], round(k * weights.size))
        np.testing.assert_array_equal(masks[name]["kernel"], expected)
    assert masks["a"]["bias"].all()


@pytest.mark.parametrize("k", [0.3, 0.8])
def test_global_sparsity_equals_a_stable_sort_of_all_leaves(k):
    params = model()
    masks = jaxprune.make_masks(params, k, rule=rules.global_sparsity)
    leaves = [params[name]["kernel"] for name in "abc"]
    expected = oracle(leaves, round(k * sum(leaf.size for leaf in leaves)))
    for name, mask in zip("abc", expected, strict=True):
        np.testing.assert_array_equal(masks[name]["kernel"], mask)


def test_promise_3_ties_keep_the_lower_index_and_the_earlier_leaf():
    params = {"a": {"kernel": jnp.ones((2, 3))}, "b": {"kernel": jnp.ones((2, 3))}}
    masks = jaxprune.make_masks(params, 5 / 12, rule=rules.global_sparsity)
    assert masks["a"]["kernel"].ravel().tolist() == [True] * 6
    assert masks["b"]["kernel"].ravel().tolist() == [True] + [False] * 5


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, -0.0, 0.5, 1.0, -1.0, 2.0]), min_size=48, max_size=48),
    k=st.floats(0, 1),
    name=st.sampled_from(sorted(COUNTED)),
)
def test_promise_3_counts_are_exact_under_heavy_ties(values, k, name):
    params = {"a": {"kernel": jnp.asarray(values, jnp.bfloat16).reshape(6, 8)}, "b": {"kernel": jnp.ones((6, 8))}}
    with pytest.warns(jaxprune.rules.PruningWarning) if round(k * 96) > 94 or round(k * 48) > 47 else _quiet():
        masks = jaxprune.make_masks(params, k, rule=COUNTED[name])
    if name == "layer":
        assert [removed(masks["a"]), removed(masks["b"])] == [min(round(k * 48), 47)] * 2
    else:
        assert removed(masks) == min(round(k * 96), 94)
    assert all(leaf.any() for leaf in jax.tree.leaves(masks))


class _quiet:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False


@pytest.mark.slow
@pytest.mark.parametrize("rule", [rules.layer_sparsity, rules.global_sparsity])
def test_a_higher_sparsity_removes_a_superset(rule):
    params = model()
    previous = jaxprune.make_masks(params, 0.0, rule=rule)
    for k in (0.2, 0.5, 0.8, 0.95):
        masks = jaxprune.make_masks(params, k, rule=rule)
        chex.assert_trees_all_equal(masks, jax.tree.map(jnp.logical_and, masks, previous))
        previous = masks


def test_permuting_the_scores_permutes_the_mask():
    weights = model()["c"]["kernel"].ravel()
    order = jax.random.permutation(KEY, weights.size)
    mask = jaxprune.make_masks({"kernel": weights.reshape(10, 10)}, 0.7, rule=rules.layer_sparsity)["kernel"]
    other = jaxprune.make_masks({"kernel": weights[order].reshape(10, 10)}, 0.7, rule=rules.layer_sparsity)["kernel"]
    np.testing.assert_array_equal(mask.ravel()[order], other.ravel())


@pytest.mark.slow
@pytest.mark.parametrize("rule", [*COUNTED.values(), rules.row_sparsity], ids=[*COUNTED, "row"])
def test_promise_5_traced_strength_gives_the_same_masks_with_one_compile(rule):
    params = model()
    calls = []

    @jax.jit
    def traced(params, k):
        calls.append(k)
        return jaxprune.make_masks(params, k, rule=rule)

    for k in (0.25, 0.5, 0.75):  # exact in float32
        chex.assert_trees_all_equal(traced(params, k), jaxprune.make_masks(params, k, rule=rule))
    assert len(calls) == 1
    over_ks = jax.vmap(lambda k: jaxprune.make_masks(params, k, rule=rule))(jnp.array([0.25, 0.5]))
    chex.assert_trees_all_equal(jax.tree.map(lambda m: m[1], over_ks), traced(params, 0.5))


@pytest.mark.slow
def test_row_sparsity_removes_the_same_count_of_every_output_unit():
    params = model() | {"weight": jax.random.normal(KEY, (5, 8))}  # Equinox keeps (out, in)
    masks = jaxprune.make_masks(params, 0.5, rule=rules.row_sparsity)
    assert (~masks["a"]["kernel"]).sum(0).tolist() == [3] * 8
    assert (~masks["b"]["kernel"]).sum((0, 1, 2)).tolist() == [6] * 4
    assert (~masks["weight"]).sum(1).tolist() == [4] * 5
    other = jaxprune.make_masks(params, 0.5, rule=functools.partial(rules.row_sparsity, axis=0))
    assert (~other["a"]["kernel"]).sum(1).tolist() == [4] * 6


@pytest.mark.slow
def test_row_sparsity_of_attention_projections_is_per_head_and_unit():
    params = {"query": {"kernel": jax.random.normal(KEY, (8, 2, 4))}, "out": {"kernel": jnp.ones((2, 4, 8))}}
    masks = jaxprune.make_masks(params, 0.5, rule=rules.row_sparsity)
    assert (~masks["query"]["kernel"]).sum(0).tolist() == [[4] * 4] * 2
    assert (~masks["out"]["kernel"]).sum((0, 1)).tolist() == [4] * 8


@pytest.mark.slow
@pytest.mark.parametrize("rule", COUNTED.values(), ids=COUNTED)
def test_stacked_layers_are_pruned_one_by_one(rule):
    layers = [jax.random.normal(jax.random.fold_in(KEY, i), (4, 6)) * (1 + i) for i in range(3)]
    stack = {"layers": {"kernel": jnp.stack(layers)}, "head": {"kernel": jax.random.normal(KEY, (6, 3))}}
    loose = {f"layer{i}": {"kernel": layer} for i, layer in enumerate(layers)} | {
        "out": {"kernel": stack["head"]["kernel"]}
    }
    if rule is rules.global_sparsity:  # leaves in the same order: head first there, out last here
        loose = {"a": loose.pop("out")} | loose
    masks = jaxprune.make_masks(stack, 0.6, rule=rule, stacked="layers")
    expected = jaxprune.make_masks(loose, 0.6, rule=rule)
    for i in range(3):
        np.testing.assert_array_equal(masks["layers"]["kernel"][i].sum(), expected[f"layer{i}"]["kernel"].sum())
    assert removed(masks) == removed(expected)


@pytest.mark.slow
def test_a_global_rule_at_99_percent_wipes_out_no_layer():
    """JaxPruner's normalised global magnitude keeps 0 of the 90,000 weights of the first layer here."""
    keys = jax.random.split(KEY, 3)
    params = {
        "uniform": {"kernel": jax.random.uniform(keys[0], (300, 300))},
        "normal": {"kernel": jax.random.normal(keys[1], (300, 300))},
        "cubed": {"kernel": jax.random.normal(keys[2], (300, 300)) ** 3},
    }
    masks = jaxprune.make_masks(params, 0.99, rule=rules.global_sparsity)
    assert removed(masks) == round(0.99 * 270_000)
    assert int(masks["uniform"]["kernel"].sum()) == 1
    largest = jnp.argmax(params["uniform"]["kernel"])
    assert masks["uniform"]["kernel"].ravel()[largest]
    capped = jaxprune.make_masks(params, 0.99, rule=functools.partial(rules.global_sparsity, max_sparsity=0.995))
    assert removed(capped) == removed(masks)
    assert [int(mask.sum()) >= 450 for mask in jax.tree.leaves(capped)] == [True] * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["global", "erk"])
@pytest.mark.parametrize("jitted", [False, True])
def test_max_sparsity_holds_in_every_layer_with_the_total_exact(name, jitted):
    params = model()
    make = functools.partial(jaxprune.make_masks, rule=functools.partial(COUNTED[name], max_sparsity=0.75))
    masks = (jax.jit(make) if jitted else make)(params, 0.7)
    sizes = [params[n]["kernel"].size for n in "abc"]
    assert removed(masks) == round(0.7 * sum(sizes))
    for n, size in zip("abc", sizes, strict=True):
        assert removed(masks[n]) <= math.floor(0.75 * size)


@pytest.mark.slow
def test_erk_shares_follow_the_paper():
    """Evci et al. 2020: density e (sum of dims) / (product of dims); layers above 1 are whole."""
    shapes = {"a": (3, 3, 1, 8), "b": (3, 3, 8, 16), "c": (64, 32), "d": (32, 10)}
    params = {name: {"kernel": jax.random.normal(KEY, shape)} for name, shape in shapes.items()}
    for sparsity in (0.5, 0.8, 0.9, 0.95):
        masks = jaxprune.make_masks(params, sparsity, rule=rules.erk_sparsity)
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        total = sum(sizes.values()) - round(sparsity * sum(sizes.values()))
        dense: set = set()
        while True:  # the paper's loop: whatever exceeds its size becomes dense
            rest = total - sum(sizes[name] for name in dense)
            e = rest / sum(sum(shapes[name]) for name in shapes if name not in dense)
            over = {name for name in shapes if name not in dense and e * sum(shapes[name]) > sizes[name]}
            if not over:
                break
            dense |= over
        for name in shapes:
            share = sizes[name] if name in dense else e * sum(shapes[name])
            assert abs(int(masks[name]["kernel"].sum()) - share) <= len(shapes), (sparsity, name)
        assert removed(masks) == round(sparsity * sum(sizes.values()))


def test_nan_weights_go_first_and_infinities_last():
    """Promise 8."""
    weights = jnp.array([[jnp.nan, 1.0, -jnp.inf, 2.0]])
    mask = jaxprune.make_masks({"kernel": weights}, 0.5, rule=rules.layer_sparsity)["kernel"]
    assert mask.tolist() == [[False, False, True, True]]
    assert jaxprune.apply_masks({"kernel": weights}, {"kernel": mask})["kernel"].tolist() == [[0, 0, -math.inf, 2]]


@pytest.mark.parametrize(
    ("k", "rule", "message"),
    [
        (1.5, rules.layer_sparsity, r"0 <= k <= 1.*k = 1.5 for params\['a'\]\['kernel'\]"),
        (-0.1, rules.global_sparsity, "0 <= k <= 1"),
        (math.nan, rules.erk_sparsity, "0 <= k <= 1"),
        ({"a": 0.5, "b": 0.5, "c": 0.5}, rules.global_sparsity, "one k for all layers"),
        (0.9, functools.partial(rules.global_sparsity, max_sparsity=0.5), "k <= 0.5"),
        (0.9, functools.partial(rules.layer_sparsity, max_sparsity=1.5), "max_sparsity <= 1"),
    ],
)
def test_bad_input_gets_one_clear_error(k, rule, message):
    with pytest.raises(ValueError, match=message):
        jaxprune.make_masks(model(), k, rule=rule)


def test_scores_must_fit_the_parameters():
    params = model()
    with pytest.raises(ValueError, match=r"scores has no entry for params\['a'\]"):
        jaxprune.make_masks(params, 0.5, rule=rules.layer_sparsity, scores={"b": {"kernel": jnp.ones((2, 2, 3, 4))}})
    scores = jax.tree.map(jnp.abs, params)
    scores["c"]["kernel"] = scores["c"]["kernel"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"scores for params\['c'\]\['kernel'\] hold NaN"):
        jaxprune.make_masks(params, 0.5, rule=rules.layer_sparsity, scores=scores)
    scores["c"]["kernel"] = jnp.ones((5, 5))
    with pytest.raises(ValueError, match=r"\[5, 5\].*\[10, 10\]"):
        jaxprune.make_masks(params, 0.5, rule=rules.layer_sparsity, scores=scores)


def test_negative_scores_rank_by_sign():
    scores = {"kernel": jnp.array([[-3.0, -1.0, 0.0, 2.0]])}
    mask = jaxprune.make_masks({"kernel": jnp.ones((1, 4))}, 0.5, rule=rules.layer_sparsity, scores=scores)
    assert mask["kernel"].tolist() == [[False, False, True, True]]
