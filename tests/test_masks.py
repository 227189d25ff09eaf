"""make_masks, apply_masks and sparsity: values, prefixes, stacks, own rules and predicates, jit, vmap, scan."""

import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxprune import apply_masks, make_masks, rules, sparsity

RULES = [rules.std_threshold, rules.mean_threshold, rules.max_threshold, rules.absolute_threshold]
ROWS = jnp.array([[3.0, -1.0], [1.0, -3.0]])  # std = sqrt(5)
DIAGONAL = jnp.array([[True, False], [False, True]])
PARAMS = {
    "conv": {"kernel": ROWS.reshape(1, 2, 2, 1), "bias": jnp.array([0.0, 9.0])},
    "dense": {"kernel": 100 * ROWS, "bias": jnp.array([0.1])},
    "steps": jnp.array([1, 2, 3]),
    "key": jax.random.key(0),
}
MASKS = {
    "conv": {"kernel": DIAGONAL.reshape(1, 2, 2, 1), "bias": jnp.array([True, True])},
    "dense": {"kernel": DIAGONAL, "bias": jnp.array([True])},
    "steps": jnp.ones(3, bool),
    "key": jnp.array(True),
}


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


class WithAndWithoutJit(chex.TestCase):
    """Every public function of masks gives the same under jit and without."""

    @chex.variants(with_jit=True, without_jit=True)
    def test_make_masks(self) -> None:
        chex.assert_trees_all_equal(self.variant(make_masks)(PARAMS, 1.0), MASKS)

    @chex.variants(with_jit=True, without_jit=True)
    @parameterized.named_parameters((rule.__name__, rule) for rule in RULES)
    def test_rules(self, rule: Callable) -> None:
        # Bare arrays are scores as they are. Of 3, 1, 1, 3 the std is 1, the mean 2, the largest 3.
        found = self.variant(rule)([jnp.abs(ROWS)], 0.7)[0]
        all_stay = rule in (rules.std_threshold, rules.absolute_threshold)
        chex.assert_trees_all_equal(found, jnp.ones((2, 2), bool) if all_stay else DIAGONAL)

    @chex.variants(with_jit=True, without_jit=True)
    def test_apply_masks(self) -> None:
        pruned = self.variant(apply_masks)(PARAMS, MASKS)
        expected = PARAMS | {
            "conv": {"kernel": jnp.array([3.0, 0, 0, -3]).reshape(1, 2, 2, 1), "bias": PARAMS["conv"]["bias"]},
            "dense": {"kernel": jnp.array([[300.0, 0], [0, -300]]), "bias": PARAMS["dense"]["bias"]},
        }
        chex.assert_trees_all_equal(pruned, expected)

    @chex.variants(with_jit=True, without_jit=True)
    def test_sparsity(self) -> None:
        share = self.variant(sparsity)(MASKS)
        assert (float(share), share.dtype, share.shape) == (0.5, jnp.float32, ())
        everything = self.variant(functools.partial(sparsity, prunable=lambda path, leaf: True))(MASKS)
        assert float(everything) == pytest.approx(4 / 15)


def test_masks_have_treedef_shapes_and_bool() -> None:
    masks = make_masks(PARAMS, 1.0)
    assert jax.tree.structure(masks) == jax.tree.structure(PARAMS)
    assert all(mask.dtype == bool for mask in jax.tree.leaves(masks))
    assert jax.tree.map(jnp.shape, masks) == jax.tree.map(jnp.shape, PARAMS)
    assert all(isinstance(mask, jax.Array) for mask in jax.tree.leaves(masks))


def test_one_number_of_any_kind_and_a_numpy_tree() -> None:
    params = {"kernel": np.asarray(ROWS)}
    for k in (1, 1.0, np.float32(1), np.float64(1), np.array(1), jnp.array(1), jnp.bfloat16(1)):
        chex.assert_trees_all_equal(make_masks(params, k), {"kernel": DIAGONAL})


@pytest.mark.parametrize(
    ("k", "kept"),
    [
        ({"a": 1.0, "b": 0.0}, [2, 4, 4]),
        ({"a": 0.0, "b": {"x": {"kernel": 1.0}, "y": 0.0}}, [4, 2, 4]),
        ({"a": {"kernel": jnp.array(0.0)}, "b": {"x": 0.0, "y": 1.0}}, [4, 4, 2]),
    ],
)
def test_k_as_a_tree_prefix(k: dict, kept: list[int]) -> None:
    params = {"a": {"kernel": ROWS, "bias": ROWS[0]}, "b": {"x": {"kernel": ROWS}, "y": {"kernel": ROWS}}}
    for run in (make_masks, jax.jit(make_masks)):
        masks = run(params, k)
        found = [masks["a"]["kernel"], masks["b"]["x"]["kernel"], masks["b"]["y"]["kernel"]]
        assert [int(mask.sum()) for mask in found] == kept


STACK = jnp.stack([normal(4, 5), 100 * normal(4, 5, seed=1), 5 + normal(4, 5, seed=2)])
STACKED = {"encoder": {"layers": {"dense": {"kernel": STACK, "bias": jnp.ones((3, 5))}}}, "head": {"kernel": ROWS}}


@pytest.mark.parametrize(
    "stacked",
    [
        "encoder/layers",
        "*/dense",
        "encoder/layers/dense/kernel",
        ["encoder/layers", "*/layers"],
        lambda path, leaf: int("layers" in path),
    ],
)
def test_a_stack_has_statistics_of_its_own(stacked: object) -> None:
    masks = make_masks(STACKED, 1.0, stacked=stacked)
    one_by_one = [make_masks({"kernel": layer}, 1.0)["kernel"] for layer in STACK]
    chex.assert_trees_all_equal(masks["encoder"]["layers"]["dense"]["kernel"], jnp.stack(one_by_one))
    assert bool(masks["encoder"]["layers"]["dense"]["bias"].all())
    chex.assert_trees_all_equal(masks["head"]["kernel"], DIAGONAL)


def test_a_stack_takes_one_k_for_each_layer() -> None:
    ks = jnp.array([0.0, 0.5, 2.0])
    masks = make_masks(STACKED, {"encoder": ks, "head": 1.0}, stacked="encoder/layers")
    expected = [make_masks({"kernel": layer}, k)["kernel"] for layer, k in zip(STACK, ks, strict=True)]
    chex.assert_trees_all_equal(masks["encoder"]["layers"]["dense"]["kernel"], jnp.stack(expected))


def test_a_stack_of_stacks() -> None:
    params = {"kernel": normal(2, 3, 4, 5) * jnp.arange(1.0, 7).reshape(2, 3, 1, 1)}
    mask = make_masks(params, 1.0, stacked=lambda path, leaf: 2)["kernel"]
    each = jax.vmap(jax.vmap(lambda w: make_masks({"kernel": w}, 1.0)["kernel"]))(params["kernel"])
    chex.assert_trees_all_equal(mask, each)


def test_a_rule_of_your_own_sees_float32_scores_and_none() -> None:
    params = {"kernel": ROWS.astype(jnp.bfloat16), "bias": jnp.ones(2)}
    mask = make_masks(params, 2.0, rule=lambda scores, k: jax.tree.map(lambda score: score > k, scores))
    chex.assert_trees_all_equal(mask, {"kernel": DIAGONAL, "bias": jnp.ones(2, bool)})

    def rule(scores: dict, k: float) -> dict:
        (score,) = jax.tree.leaves(scores)
        assert (score.dtype, score.tolist()) == (jnp.float32, [[3.0, 1.0], [1.0, 3.0]])
        assert scores["bias"] is None
        return {"kernel": score < k, "bias": None}

    chex.assert_trees_all_equal(make_masks(params, 2.0, rule=rule)["kernel"], ~DIAGONAL)


def test_scores_of_your_own_decide() -> None:
    params = {"kernel": jnp.zeros((2, 2)), "bias": jnp.zeros(2)}
    scores = {"kernel": jnp.array([[1.0, -5.0], [3.0, 4.0]]), "bias": None}
    masks = make_masks(params, 2.5, rule=rules.absolute_threshold, scores=scores)
    assert masks["kernel"].tolist() == [[False, False], [True, True]]


def test_predicates_and_trees_of_bools() -> None:
    params = {"a": {"kernel": ROWS, "w": ROWS}, "b": {"kernel": ROWS, "bias": jnp.array([1.0, 5.0])}}

    def pruned(prunable: object) -> list[str]:
        masks = jax.tree_util.tree_leaves_with_path(make_masks(params, 1.0, prunable=prunable))
        return [jax.tree_util.keystr(path, simple=True, separator="/") for path, mask in masks if not mask.all()]

    assert pruned(None) == ["a/kernel", "a/w", "b/kernel"]
    assert pruned(lambda path, leaf: path.startswith("b")) == ["b/bias", "b/kernel"]
    assert pruned(lambda path, leaf: leaf.ndim == 1) == ["b/bias"]
    assert pruned({"a": {"kernel": False, "w": True}, "b": {"kernel": False, "bias": True}}) == ["a/w", "b/bias"]
    assert pruned({"a": True, "b": False}) == ["a/kernel", "a/w"]
    assert pruned(True) == ["a/kernel", "a/w", "b/bias", "b/kernel"]


def test_k_may_be_traced_and_one_compilation_serves_a_sweep() -> None:
    """Promise 5: one trace for all k, also for k as a tree."""
    params = {"a": {"kernel": normal(5, 6)}, "b": {"kernel": normal(7, 8)}}
    traces = []

    @jax.jit
    def run(params: dict, k: object) -> dict:
        traces.append(k)
        return make_masks(params, k)

    for k in (0.0, 0.5, 1.0, 1.5):
        chex.assert_trees_all_equal(run(params, k), make_masks(params, k))
    assert len(traces) == 1
    for k in (0.5, 1.0):
        chex.assert_trees_all_equal(run(params, {"a": k, "b": 1.0}), make_masks(params, {"a": k, "b": 1.0}))
    assert len(traces) == 2


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.filterwarnings("ignore::jaxprune.rules.PruningWarning")
def test_vmap_over_k_and_scan(rule: Callable) -> None:
    """Promise 5: vmap over k, and make_masks inside lax.scan."""
    params = {"kernel": normal(5, 6), "bias": jnp.ones(3), "far": {"kernel": 7 + normal(5, 6)}}
    make = functools.partial(make_masks, rule=rule)
    ks = jnp.array([0.0, 0.3, 0.8, 9.0])
    expected = jax.tree.map(lambda *masks: jnp.stack(masks), *[make(params, k) for k in ks])
    chex.assert_trees_all_equal(jax.vmap(make, (None, 0))(params, ks), expected)
    _, scanned = jax.lax.scan(lambda carry, k: (carry, make(carry, k)), params, ks)
    chex.assert_trees_all_equal(scanned, expected)


def test_masks_carry_no_gradient_and_pruned_weights_get_none() -> None:
    def loss(params: dict) -> jax.Array:
        pruned = apply_masks(params, make_masks(params, 1.0))
        return jnp.sum(pruned["kernel"] ** 2)

    assert jax.grad(loss)({"kernel": ROWS})["kernel"].tolist() == [[6.0, 0.0], [0.0, -6.0]]


BITS = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", BITS)
@given(data=st.data())
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_apply_masks_sets_plus_zero_and_keeps_the_rest_bit_for_bit(dtype: str, data: st.DataObject) -> None:
    """Promise 8: any bit pattern, NaN and infinity included, becomes +0.0 where pruned."""
    bits = data.draw(hnp.arrays(BITS[dtype], (3, 4)))
    mask = data.draw(hnp.arrays(bool, (3, 4)))
    weights = jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.dtype(dtype))
    pruned = apply_masks([weights], [jnp.asarray(mask)])[0]
    assert pruned.dtype == weights.dtype
    after = np.asarray(jax.lax.bitcast_convert_type(pruned, BITS[dtype]))
    # A NaN that is kept stays one, but some backends change its bits (quiet for signalling).
    number = ~np.isnan(np.asarray(weights, np.float32))
    np.testing.assert_array_equal(after[mask & number], bits[mask & number])
    assert np.isnan(np.asarray(pruned, np.float32)[mask & ~number]).all()
    assert not after[~mask].any(), "+0.0 has no bit set"


def test_apply_masks_leaves_integers_keys_and_unmasked_leaves_alone() -> None:
    masks = MASKS | {"steps": jnp.zeros(3, bool), "key": None, "conv": {"kernel": None, "bias": None}}
    pruned = apply_masks(PARAMS, masks)
    chex.assert_trees_all_equal(pruned["conv"], PARAMS["conv"])
    chex.assert_trees_all_equal(pruned["steps"], PARAMS["steps"])
    assert pruned["key"] == PARAMS["key"]


def test_numpy_trees_of_float64() -> None:
    params = {"kernel": np.asarray(ROWS, np.float64), "bias": np.ones(2)}
    pruned = apply_masks(params, jax.device_get(make_masks(params, 1.0)))
    assert pruned["kernel"].tolist() == [[3.0, 0.0], [0.0, -3.0]]


def test_a_python_number_is_kept() -> None:
    params = {"kernel": ROWS, "rate": 0.1, "steps": 3}
    masks = make_masks(params, 1.0)
    assert masks["rate"].shape == masks["steps"].shape == ()
    assert float(apply_masks(params, masks)["rate"]) == pytest.approx(0.1)


def test_sparsity_of_stacks_and_of_nothing() -> None:
    masks = {"layers": {"kernel": jnp.zeros((2, 3, 3), bool), "bias": jnp.zeros((2, 3), bool)}}
    assert float(sparsity(masks)) == 1.0
    assert float(sparsity(masks, prunable={"layers": {"kernel": False, "bias": True}})) == 1.0
    assert float(sparsity({"kernel": jnp.ones((0, 2), bool)})) == 0.0


def test_sparsity_is_exact_beyond_the_float32_integers() -> None:
    mask = np.ones((4097, 4096), bool)  # 2**24 + 4096 entries
    mask[-1, -1] = False
    assert float(sparsity({"kernel": mask})) == np.float32(1 / mask.size)
