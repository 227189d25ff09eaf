"""Every public function under strict promotion of dtypes (`conftest.py`): right values, and dtypes kept."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import choose, oneshot, rules, scores, structured, transforms
from tests.support.one_layer import step
from tests.support.slow import slow_but

NARROW = ("bfloat16", "float16", "float32")
TINY = ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn")
SHAPE = (4, 8)
# Multiples of one half up to six; those that the four-bit format holds among them.
VALUES = np.random.default_rng(0).choice(
    [-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0], (2, *SHAPE)
)

RULES = {
    "std": (rules.std_threshold, 0.8),
    "std, capped": (functools.partial(rules.std_threshold, max_sparsity=0.25), 0.8),
    "mean": (rules.mean_threshold, 0.9),
    "max": (rules.max_threshold, 0.4),
    "absolute": (rules.absolute_threshold, 1.6),
    "layer": (rules.layer_sparsity, 0.4),
    "row": (rules.row_sparsity, 0.5),
    "global": (rules.global_sparsity, 0.4),
    "erk": (rules.erk_sparsity, 0.4),
    "n_m": (rules.n_m(4), 2),
    "channels": (rules.channels(rules.layer_sparsity), 0.5),
    "blocks": (rules.blocks(rules.global_sparsity, (2, 3)), 0.4),
}


def params_in(dtype: Any) -> dict[str, Any]:
    return {name: {"kernel": jnp.asarray(values, dtype)} for name, values in zip("ab", VALUES, strict=True)}


def dtypes_of(tree: Any) -> set[str]:
    return {leaf.dtype.name for leaf in jax.tree.leaves(tree)}


def assert_same(found: Any, expected: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, expected)


def layered(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["a"]["kernel"]) @ params["b"]["kernel"].T


def data_in(dtype: Any) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(-2, 3, (32, SHAPE[0])), dtype)


# --- Masks: those of the same values in float32. ---


@pytest.mark.filterwarnings("ignore:rules.std_threshold kept more than k says")
@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], [*NARROW[:2], *TINY]))
@pytest.mark.parametrize("name", slow_but(["std", "layer", "n_m"], RULES))
def test_masks_are_those_of_float32(name, dtype):
    rule, k = RULES[name]
    params = params_in(dtype)
    masks = jaxprune.make_masks(params, k, rule=rule)
    assert_same(masks, jaxprune.make_masks(params_in(jnp.float32), k, rule=rule))
    assert 0 < float(jaxprune.sparsity(masks)) < 1
    pruned = jaxprune.apply_masks(params, masks)
    assert dtypes_of(pruned) == {dtype}
    assert_same(jaxprune.algebra.masks_of(pruned), jax.tree.map(lambda w: w != 0, pruned))


@pytest.mark.slow
@pytest.mark.parametrize("rule", [rules.global_sparsity, rules.std_threshold])
def test_leaves_of_several_dtypes(rule):
    params = {**params_in("float8_e4m3fn"), "c": params_in("bfloat16")["a"], "d": params_in("float32")["b"]}
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    assert_same(jaxprune.make_masks(params, 0.4, rule=rule), jaxprune.make_masks(wide, 0.4, rule=rule))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float16"])
@pytest.mark.parametrize("name", ["std", "max", "layer", "n_m"])
def test_a_nan_weight_goes_first(name, dtype):
    rule, k = RULES[name]
    kernel = jnp.asarray(VALUES[0], dtype).at[0, 1].set(jnp.nan)
    mask = jaxprune.make_masks({"kernel": kernel}, k, rule=rule)["kernel"]
    assert not mask[0, 1]
    assert mask.any()
    assert_same(mask, jaxprune.make_masks({"kernel": kernel.astype(jnp.float32)}, k, rule=rule)["kernel"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], [*NARROW, *TINY]))
def test_reports_and_choices(dtype, tmp_path):
    params = params_in(dtype)
    masks = jaxprune.make_masks(params, 0.4, rule=rules.layer_sparsity)
    kept = jaxprune.apply_masks(params, masks)
    row = jaxprune.summarize(params, masks).rows[0]
    weights = np.abs(VALUES[0])
    assert (row.kept, row.threshold) == (round(0.6 * 32), weights[np.asarray(masks["a"]["kernel"])].min())
    assert math.isclose(row.std, VALUES[0].std(), rel_tol=1e-6)
    jaxprune.algebra.require_pruned(kept, masks)
    jaxprune.report(tmp_path / "page.html", params, masks)

    def total(params: Any) -> float:
        return float(sum(jnp.sum(jnp.abs(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(params)))

    curves = jaxprune.sensitivity(total, params, [0.25, 0.5], rule=rules.layer_sparsity)
    assert curves.sparsity.tolist() == [[0.25, 0.5]] * 2
    expected = [np.abs(VALUES).sum() - np.sort(np.abs(VALUES[0]), axis=None)[:n].sum() for n in (8, 16)]
    assert curves.metric[0].tolist() == expected
    k = jaxprune.search_k(total, params, max_drop=6.0, rule=rules.layer_sparsity, steps=6)
    assert k == jaxprune.search_k(total, params_in("float32"), max_drop=6.0, rule=rules.layer_sparsity, steps=6)
    assert choose.allocate(curves, 0.25)


# --- Scores: float32, those of the same values. ---


@pytest.mark.slow
@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], NARROW))
def test_scores_are_float32(dtype):
    params, wide, x = params_in(dtype), params_in("float32"), data_in(dtype)
    grads = jax.tree.map(lambda w: w[::-1], params)

    def both(score: Any) -> None:
        found = score(params, grads)
        assert dtypes_of(found) == {"float32"}
        assert_same(found, score(wide, jax.tree.map(lambda w: w.astype(jnp.float32), grads)))

    for of_gradient in (scores.gradient, scores.saliency, scores.fisher, scores.snip, scores.movement):
        both(of_gradient)
    both(lambda p, g: scores.movement(p, g, previous=scores.movement(p, g)))
    for of_weights in (scores.magnitude, scores.lamp, lambda p: scores.random(p, jax.random.key(0))):
        both(lambda p, g, score=of_weights: score(p))
    both(lambda p, g: scores.synflow(lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"].T, p, x[:1]))
    square = scores.grasp(lambda p: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p)), params)
    assert_same(square, jax.tree.map(lambda w: 4 * w**2, wide))
    norms, grams = jaxprune.calibrate_norms(linear, params, [x]), jaxprune.calibrate_grams(linear, params, [x])
    wide_x = x.astype(jnp.float32)
    assert_same(scores.wanda(params, norms), scores.wanda(wide, jaxprune.calibrate_norms(linear, wide, [wide_x])))
    assert_same(scores.ria(params, norms), scores.ria(wide, jaxprune.calibrate_norms(linear, wide, [wide_x])))
    assert_same(scores.obs(params, grams), scores.obs(wide, jaxprune.calibrate_grams(linear, wide, [wide_x])))


def linear(params: Any, x: jax.Array) -> Any:
    return [x @ leaf["kernel"] for leaf in params.values()]


# --- Solvers: computed in float32, then rounded to the parameters' dtype. ---


def assert_solvers(dtype: str) -> None:
    params, wide, x = params_in(dtype), params_in("float32"), data_in(dtype)
    grams = jaxprune.calibrate_grams(linear, params, [x])
    same = jaxprune.calibrate_grams(linear, wide, [x.astype(jnp.float32)])
    masks = jaxprune.make_masks(params, 0.5, rule=rules.row_sparsity)
    plan = structured.select_channels(structured.trace(layered, params, x), params, 0.5)

    def both(solve: Any) -> None:
        found, expected = solve(params, grams), solve(wide, same)
        assert dtypes_of(found) - {"bool"} == {dtype}
        rounded = jax.tree.map(lambda a, b: b.astype(a.dtype).astype(np.float32), found, expected)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a.astype(np.float32), b, 1e-2, 1e-5), found, rounded)

    both(lambda p, g: oneshot.sparsegpt(p, g, 0.5))
    both(lambda p, g: oneshot.sparsegpt(p, g, 2, rule=rules.n_m(4)))
    both(lambda p, g: oneshot.admm(p, g, 0.5, rule=rules.row_sparsity, steps=4))
    both(lambda p, g: oneshot.admm(p, g, 2, rule=rules.n_m(4), steps=4))
    both(lambda p, g: oneshot.reconstruct(p, masks, g))
    both(lambda p, g: structured.repair(plan, p, g))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], NARROW))
def test_solvers(dtype):
    assert_solvers(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_solvers_with_64_bits(dtype):
    with jax.enable_x64(True):
        assert_solvers(dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], NARROW))
def test_synflow_masks(dtype):
    def apply(params: Any, x: Any) -> Any:
        return x @ params["a"]["kernel"] @ params["b"]["kernel"].T

    found = [oneshot.synflow_masks(apply, params_in(d), data_in(d)[:1], 0.5, rounds=3) for d in (dtype, "float32")]
    assert_same(*found)


# --- Transforms. ---


@pytest.mark.slow
@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], NARROW))
@pytest.mark.parametrize(
    "name",
    [
        "keep_pruned",
        "keep_zeros",
        "prune",
        "prune_and_regrow",
        "rigl",
        "sparse_evolution",
        "static_sparse",
        "elsa",
        "prune_and_splice",
        "prune_by_gradients",
    ],
)
def test_transforms(name, dtype):
    def make(params: Any, k: Any) -> Any:
        return jaxprune.make_masks(params, k, rule=rules.layer_sparsity)

    masks = make(params_in("float32"), 0.5)
    sgd = optax.sgd(0.5)
    tx = {
        "keep_pruned": lambda: optax.chain(sgd, jaxprune.keep_pruned(masks)),
        "keep_zeros": lambda: optax.chain(sgd, transforms.keep_zeros()),
        "prune": lambda: optax.chain(sgd, jaxprune.prune(make, 0.5, until=1)),
        "prune_and_regrow": lambda: optax.chain(sgd, transforms.prune_and_regrow(make, 0.5, until=1)),
        "rigl": lambda: jaxprune.rigl(sgd, masks, every=1, until=1),
        "sparse_evolution": lambda: transforms.sparse_evolution(sgd, masks, jax.random.key(0), every=1, until=1),
        "static_sparse": lambda: transforms.static_sparse(sgd, masks),
        "prune_and_splice": lambda: optax.chain(sgd, transforms.prune_and_splice(make, 0.5, back=0.75, until=1)),
        "elsa": lambda: transforms.elsa(sgd, make, 0.5, penalty=0.25, every=1, until=1),
        "prune_by_gradients": lambda: transforms.prune_by_gradients(
            sgd,
            lambda params, mean, k: jaxprune.make_masks(params, k, rule=rules.layer_sparsity, scores=mean),
            0.75,
            measure=scores.saliency,
            until=1,
        ),
    }[name]()

    @jax.jit
    def advance(params: Any, state: Any) -> Any:
        return step(tx, params, state, jax.tree.map(lambda w: w[::-1], params))

    ends = []
    for start in (params_in(dtype), params_in("float32")):
        params = jaxprune.apply_masks(start, masks)
        state = tx.init(params)
        for _ in range(2):
            params, state = advance(params, state)
        assert dtypes_of(params) == dtypes_of(start)
        ends.append(jax.tree.map(lambda w: np.asarray(w, np.float32), params))
    # Halves and quarters of small numbers: exact in all these formats.
    assert_same(*ends)


@pytest.mark.slow
def test_the_schedule_of_rigl_is_optax_own():
    counts = jnp.arange(6, dtype=jnp.int32)
    masks = jaxprune.make_masks(params_in("float32"), 0.5, rule=rules.layer_sparsity)
    told: list[dict[str, float]] = []
    params = jaxprune.apply_masks(params_in("float32"), masks)
    tx = jaxprune.rigl(optax.sgd(0.0), masks, every=1, until=5, log=told.append)
    state = tx.init(params)
    for _ in counts:
        params, state = step(tx, params, state, params)
    jax.effects_barrier()
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies the count, a whole number, by pi
        expected = optax.cosine_decay_schedule(0.3, 5)(counts)
    assert sorted(numbers["drop_fraction"] for numbers in told) == sorted(expected.tolist())


@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], NARROW))
def test_reparametrisations(dtype):
    params = params_in(dtype)
    masks = jaxprune.make_masks(params, 0.5, rule=rules.layer_sparsity)
    assert_same(transforms.straight_through(params, masks), jaxprune.apply_masks(params, masks))
    shrunk = transforms.soft_threshold(params, 0.0)  # the sigmoid of 0 is one half
    assert_same(shrunk, jax.tree.map(lambda w: (np.sign(w) * np.maximum(np.abs(w) - 0.5, 0)).astype(dtype), params))
    tx = transforms.decay_pruned(lambda params, k: masks, 1.0, rate=0.5)
    updates, _ = tx.update(params, tx.init(params), params)
    assert_same(updates, jax.tree.map(lambda w, m: jnp.where(m, w, 1.5 * w), params, masks))
    assert dtypes_of(updates) == dtypes_of(shrunk) == {dtype}


# --- Smaller networks and files. ---


@pytest.mark.parametrize("dtype", slow_but(["bfloat16"], NARROW))
def test_structured(dtype):
    params, x = params_in(dtype), data_in(dtype)
    graph = structured.trace(layered, params, x)
    plan = structured.select_channels(graph, params, 0.5)
    assert plan == structured.select_channels(
        structured.trace(layered, params_in("float32"), x.astype(jnp.float32)), params_in("float32"), 0.5
    )
    small = structured.shrink(plan, params)
    assert small["a"]["kernel"].shape == (4, 4)
    assert dtypes_of([small, structured.rebuild(graph, plan)(small, x)]) == {dtype}
    assert math.isclose(
        structured.group_lasso(graph, params), structured.group_lasso(graph, params_in("float32")), rel_tol=1e-6
    )


# A safetensors file holds no four-bit numbers.
@pytest.mark.parametrize("dtype", [*NARROW, *TINY[:2]])
def test_storage(dtype, tmp_path):
    params = params_in(dtype)
    masks = jaxprune.make_masks(params, 0.5, rule=rules.layer_sparsity)
    kept = jaxprune.apply_masks(params, masks)
    jaxprune.save_sparse(tmp_path / "model.safetensors", params, masks)
    loaded, of_file = jaxprune.load_sparse(tmp_path / "model.safetensors", like=params)
    assert_same((loaded, of_file), (kept, masks))
    assert dtypes_of(loaded) == {dtype}
