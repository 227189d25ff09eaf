"""Learned masks: soft masks and losses against NumPy, what they become when hard, exact counts, resumption, the best mask found."""

import functools
import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune
from jaxprune import learned, rules

RNG = np.random.default_rng(0)
PARAMS = {
    "a": {"kernel": RNG.normal(size=(8, 6)).astype(np.float32), "bias": np.zeros(6, np.float32)},
    "layers": {"kernel": RNG.normal(size=(2, 8, 4)).astype(np.float32)},
}
MASKS = {
    "a": {"kernel": RNG.random((8, 6)) < 0.5, "bias": np.ones(6, bool)},
    "layers": {"kernel": RNG.random((2, 8, 4)) < 0.5},
}
KEY = jax.random.key(3)
STACKED = {"stacked": "layers"}


def noise_key(step, path):
    """The key of the noise, as the reference says: the step, then the path."""
    return jax.random.fold_in(jax.random.fold_in(KEY, step), zlib.crc32(path.encode()))


def by_path(tree):
    return {"a/kernel": np.asarray(tree["a"]["kernel"]), "layers/kernel": np.asarray(tree["layers"]["kernel"])}


def softmax(x):
    shares = np.exp(x - x.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("step", "tau", "kappa"), [(0, 4.0, 25.0), (5, 2.025, 187.5), (10, 0.05, 350.0), (99, 0.05, 350.0)]
)
def test_soft_masks_are_those_of_the_equation(step, tau, kappa):
    gates = learned.weight_gates(PARAMS, KEY, prior=MASKS, **STACKED)
    found = by_path(learned.soft_masks(gates, KEY, step, steps=10))
    for path, gate in by_path(gates).items():
        noise = np.float64(jax.random.logistic(noise_key(step, path), gate.shape, jnp.float32))
        np.testing.assert_allclose(found[path], 1 / (1 + np.exp(-(kappa * np.float64(gate) + noise) / tau)), atol=1e-5)
        assert found[path].dtype == np.float32


@pytest.mark.parametrize(("k", "m"), [(2, 4), (1, 4), (3, 8)])
def test_soft_patterns_are_those_of_the_equation(k, m):
    gates = learned.pattern_gates(PARAMS, k, m, KEY, prior=MASKS, **STACKED)
    found = by_path(learned.soft_patterns(gates, PARAMS, k, KEY, 4, steps=8))
    patterns = np.zeros((0, m))
    for kept in itertools.combinations(range(m), k):
        patterns = np.vstack([patterns, np.isin(np.arange(m), kept)])
    for path, gate in by_path(gates).items():
        assert gate.shape == (*found[path].shape[:-2], 8 // m, found[path].shape[-1], len(patterns))
        noise = np.float64(jax.random.gumbel(noise_key(4, path), gate.shape, jnp.float32))
        mixed = softmax((300.0 * np.float64(gate) + noise) / 2.025) @ patterns
        expected = np.moveaxis(mixed, -1, -2).reshape(found[path].shape)
        np.testing.assert_allclose(found[path], expected, atol=2e-6)
        sums = found[path].reshape(*found[path].shape[:-2], 8 // m, m, -1).sum(-2)
        np.testing.assert_allclose(sums, k, rtol=1e-6)


def test_gates_begin_as_published():
    big = {"kernel": np.zeros((400, 300), np.float32)}
    masks = {"kernel": np.arange(400 * 300).reshape(400, 300) % 3 == 0}
    gates = np.asarray(learned.weight_gates(big, KEY, prior=masks)["kernel"])
    for kept, sign in ((masks["kernel"], 1), (~masks["kernel"], -1)):
        assert gates[kept].mean() == pytest.approx(sign * 3 * 0.014, abs=2e-4)
        assert gates[kept].std() == pytest.approx(0.014, rel=0.02)
    # Patterns of 2:4 with two, one and none of the weights that the prior keeps: 3, 0 and -3 deviations more.
    masks = {"kernel": np.tile([[True], [True], [False], [False]], (100, 300))}
    gates = np.asarray(learned.pattern_gates(big, 2, 4, KEY, prior=masks)["kernel"])
    assert gates.shape == (100, 300, 6)
    np.testing.assert_allclose(gates.mean((0, 1)), [0.03, 0, 0, 0, 0, -0.03], atol=3e-4)
    np.testing.assert_allclose(gates.std((0, 1)), 0.01, rtol=0.03)


def test_in_the_limit_soft_masks_are_hard():
    cold = {"steps": 1, "temperature": (1e-3, 1e-3), "scale": (1e6, 1e6)}
    gates = learned.weight_gates(PARAMS, KEY, **STACKED)
    for path, mask in by_path(learned.soft_masks(gates, KEY, 0, **cold)).items():
        np.testing.assert_array_equal(mask, by_path(gates)[path] > 0)
    gates = learned.pattern_gates(PARAMS, 2, 4, KEY, **STACKED)
    soft = by_path(learned.soft_patterns(gates, PARAMS, 2, KEY, 0, **cold))
    for path, mask in by_path(learned.pattern_masks(gates, PARAMS, 2)).items():
        np.testing.assert_array_equal(soft[path], mask)


def test_schedules_may_be_those_of_optax():
    gates = learned.weight_gates(PARAMS, KEY, **STACKED)
    linear = optax.linear_schedule(4.0, 0.05, 10)
    found = learned.soft_masks(gates, KEY, 3, steps=10, temperature=lambda step: linear(jnp.float32(step)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, learned.soft_masks(gates, KEY, 3, steps=10)
    )


def test_counts_at_the_end_are_exact():
    gates = learned.weight_gates(PARAMS, KEY, prior=MASKS, **STACKED)
    masks = jaxprune.make_masks(PARAMS, 0.25, rule=rules.global_sparsity, scores=gates, **STACKED)
    assert sum(int(mask.sum()) for mask in by_path(masks).values()) == 84
    assert masks["a"]["bias"].all()
    masks = jaxprune.make_masks(PARAMS, 0.25, rule=rules.layer_sparsity, scores=gates, **STACKED)
    assert masks["layers"]["kernel"].sum((1, 2)).tolist() == [24, 24]
    gates = learned.pattern_gates(PARAMS, 1, 4, KEY, **STACKED)
    masks = learned.pattern_masks(gates, PARAMS, 1)
    assert masks["a"]["bias"].all()
    for mask in by_path(masks).values():
        assert (mask.reshape(*mask.shape[:-2], 2, 4, -1).sum(-2) == 1).all()
    gates["a"]["kernel"] = gates["a"]["kernel"].at[0, 0].set(jnp.array([0, jnp.nan, 5, 0])).at[1, 1].set(0)
    found = learned.pattern_masks(gates, PARAMS, 1)["a"]["kernel"]
    assert found[:4, 0].tolist() == [False, False, True, False]
    assert found[4:, 1].tolist() == [True, False, False, False]


def test_a_prior_that_is_strong_is_what_is_chosen():
    masks = jaxprune.make_masks(PARAMS, 2, rule=rules.n_m(4), **STACKED)
    gates = learned.pattern_gates(PARAMS, 2, 4, KEY, prior=masks, strength=20.0, **STACKED)
    jax.tree.map(np.testing.assert_array_equal, learned.pattern_masks(gates, PARAMS, 2), masks)
    gates = learned.weight_gates(PARAMS, KEY, prior=masks, strength=20.0, **STACKED)
    found = jaxprune.make_masks(PARAMS, 0.5, rule=rules.layer_sparsity, scores=gates, **STACKED)
    jax.tree.map(np.testing.assert_array_equal, found, masks)


def test_the_groups_are_those_of_the_rule():
    """Of a kernel kept as (out, in), which only the function tells; and along an axis that is given."""
    params = {"mixing": {"kernel": RNG.normal(size=(3, 8)).astype(np.float32)}}
    fn = lambda params, x: x @ params["mixing"]["kernel"].T  # noqa: E731
    sites = jaxprune.find_sites(fn, params, jnp.ones((2, 8)))
    for which in ({"sites": sites}, {"axis": 1}):
        gates = learned.pattern_gates(params, 2, 4, KEY, **which)
        assert gates["mixing"]["kernel"].shape == (3, 2, 6)
        found = learned.pattern_masks(gates, params, 2)["mixing"]["kernel"]
        assert (found.reshape(3, 2, 4).sum(-1) == 2).all()


def test_losses_are_those_of_the_equations():
    gates = learned.weight_gates(PARAMS, KEY, **STACKED)
    soft = learned.soft_masks(gates, KEY, 0, steps=10)
    flat = by_path(soft)
    density = np.concatenate([np.float64(mask).ravel() for mask in flat.values()]).mean()
    for k in (0.0, 0.9):
        np.testing.assert_allclose(learned.sparsity_loss(soft, k), abs(1 - density - k), rtol=1e-5)
    layers = [(PARAMS["a"]["kernel"], flat["a/kernel"])]
    layers += list(zip(PARAMS["layers"]["kernel"], flat["layers/kernel"], strict=True))
    expected = sum(np.linalg.norm(w * mask) for w, mask in layers) / sum(np.linalg.norm(w) for w, _ in layers)
    np.testing.assert_allclose(learned.kept_norm(PARAMS, soft, **STACKED), expected, rtol=1e-5)
    params = jax.tree.map(jnp.asarray, PARAMS)
    slopes = jax.grad(lambda params: learned.kept_norm(params, soft))(params)
    assert not any(np.any(slope) for slope in jax.tree.leaves(slopes))
    dead = {"kernel": jnp.zeros((2, 2))}
    slopes = jax.grad(lambda soft: learned.kept_norm(dead | {"other": jnp.ones(2)}, soft))(
        dead | {"other": jnp.ones(2)}
    )
    assert np.isfinite(slopes["kernel"]).all()


def test_a_mean_of_more_weights_than_float32_counts_one_by_one():
    soft = {"kernel": jnp.ones((1 << 13, 1 << 12))}
    assert float(learned.sparsity_loss(soft, 1.0)) == 1.0


def test_half_precision_rounds_once_and_gates_are_float32():
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), PARAMS)
    gates = learned.weight_gates(params, KEY, **STACKED)
    assert {leaf.dtype for leaf in jax.tree.leaves(gates)} == {np.dtype("float32")}
    patterns = learned.pattern_gates(params, 2, 4, KEY, **STACKED)
    assert {leaf.dtype for leaf in jax.tree.leaves(patterns)} == {np.dtype("float32")}
    for soft in (
        learned.soft_masks(gates, KEY, 0, steps=9),
        learned.soft_patterns(patterns, params, 2, KEY, 0, steps=9),
    ):
        found = learned.apply_soft_masks(params, soft)
        for name in ("a", "layers"):
            wide = params[name]["kernel"].astype(jnp.float32) * soft[name]["kernel"]
            assert found[name]["kernel"].dtype == jnp.bfloat16
            np.testing.assert_array_equal(found[name]["kernel"], wide.astype(jnp.bfloat16))
        np.testing.assert_array_equal(found["a"]["bias"], params["a"]["bias"])


def problem(seed):
    """Inputs that are correlated, so that the best mask is not that of the largest weights, and the loss of a mask."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(64, 3)) @ rng.normal(size=(3, 8)) + 0.3 * rng.normal(size=(64, 8))
    weights = rng.uniform(0.7, 1.3, (8, 1)) * rng.choice([-1, 1], (8, 1))
    params = {"kernel": jnp.asarray(weights, jnp.float32), "bias": jnp.zeros(1)}
    x = jnp.asarray(x, jnp.float32)

    def loss(params, other):
        return jnp.mean(jnp.square(x @ (params["kernel"] - other["kernel"])))

    return params, loss


def best(params, loss, tried):
    """The best of all masks, by trying them."""
    losses = [float(loss(params, {"kernel": jnp.where(mask, params["kernel"], 0)})) for mask in tried]
    return tried[int(np.argmin(losses))]


def train(loss, gates, soften, *, begin=0, until, steps, state=None, rate=0.02):
    tx = optax.adamw(rate, b2=0.95, weight_decay=0.0)

    @jax.jit
    def update(gates, state, step):
        updates, state = tx.update(jax.grad(lambda gates: loss(soften(gates, step)))(gates), state, gates)
        return optax.apply_updates(gates, updates), state

    with jax.numpy_dtype_promotion("standard"):  # which Adam needs
        state = tx.init(gates) if state is None else state
        for step in range(begin, until):
            gates, state = update(gates, state, step)
    return gates, state


def bernoulli(seed, steps):
    params, loss = problem(seed)
    soften = lambda gates, step: learned.soft_masks(gates, KEY, step, steps=steps)  # noqa: E731

    def total(soft):
        found = loss(params, learned.apply_soft_masks(params, soft))
        return found + 7 * learned.sparsity_loss(soft, 0.5)

    return params, loss, total, soften


@pytest.mark.parametrize("seed", [0, 1])
def test_the_best_mask_is_found(seed):
    steps = 400
    params, loss, total, soften = bernoulli(seed, steps)
    gates, _ = train(total, learned.weight_gates(params, KEY), soften, until=steps, steps=steps)
    masks = jaxprune.make_masks(params, 0.5, rule=rules.layer_sparsity, scores=gates)
    tried = [np.isin(np.arange(8), kept)[:, None] for kept in itertools.combinations(range(8), 4)]
    largest = jaxprune.make_masks(params, 0.5, rule=rules.layer_sparsity)["kernel"]
    assert (best(params, loss, tried) != largest).any()
    np.testing.assert_array_equal(masks["kernel"], best(params, loss, tried))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_best_patterns_are_found(seed):
    steps = 400
    params, loss = problem(seed)
    soften = lambda gates, step: learned.soft_patterns(gates, params, 2, KEY, step, steps=steps)  # noqa: E731
    total = lambda soft: loss(params, learned.apply_soft_masks(params, soft))  # noqa: E731
    gates, _ = train(total, learned.pattern_gates(params, 2, 4, KEY), soften, until=steps, steps=steps)
    pairs = list(itertools.combinations(range(4), 2))
    tried = [np.isin(np.arange(8), [*a, *(4 + i for i in b)])[:, None] for a in pairs for b in pairs]
    np.testing.assert_array_equal(learned.pattern_masks(gates, params, 2)["kernel"], best(params, loss, tried))


@pytest.mark.parametrize("kind", ["weights", "patterns"])
def test_a_resumed_run_is_the_run(kind):
    params, loss, total, soften = bernoulli(0, 8)
    make = learned.weight_gates
    if kind == "patterns":
        make = lambda params, key: learned.pattern_gates(params, 2, 4, key)  # noqa: E731
        soften = lambda gates, step: learned.soft_patterns(gates, params, 2, KEY, step, steps=8)  # noqa: E731
        total = lambda soft: loss(params, learned.apply_soft_masks(params, soft))  # noqa: E731
    gates = make(params, KEY)
    whole, _ = train(total, gates, soften, until=8, steps=8)
    half, state = train(total, gates, soften, until=4, steps=8)
    half, state = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), (half, state))
    resumed, _ = train(total, half, soften, begin=4, until=8, steps=8, state=state)
    np.testing.assert_array_equal(resumed["kernel"], whole["kernel"])
    other = make(params | {"another": {"kernel": jnp.ones((4, 2))}}, KEY)
    np.testing.assert_array_equal(other["kernel"], gates["kernel"])


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_on_eight_devices_all_is_as_on_one(kind, jitted):
    specs = {"a": {"kernel": P("x", "y"), "bias": P("y")}, "layers": {"kernel": P("y", None, "x")}}
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    place = lambda tree: jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs)  # noqa: E731

    def weights(params, prior):
        gates = learned.weight_gates(params, KEY, prior=prior, **STACKED)
        soft = learned.soft_masks(gates, KEY, 1, steps=3)
        return gates, soft, learned.sparsity_loss(soft, 0.5), learned.apply_soft_masks(params, soft)

    def patterns(params, prior):
        gates = learned.pattern_gates(params, 2, 4, KEY, prior=prior, **STACKED)
        soft = learned.soft_patterns(gates, params, 2, KEY, 1, steps=3)
        return gates, soft, learned.kept_norm(params, soft, **STACKED), learned.pattern_masks(gates, params, 2)

    for function in (weights, patterns):
        expected = function(jax.tree.map(jnp.asarray, PARAMS), MASKS)
        with jax.set_mesh(mesh):
            found = (jax.jit(function) if jitted else function)(place(PARAMS), place(MASKS))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, expected)
        if not jitted:
            placed = place(PARAMS)["a"]["kernel"].sharding
            assert found[1]["a"]["kernel"].sharding.is_equivalent_to(placed, 2)


def test_any_optimizer_takes_gates_and_keeps_nothing_of_the_weights():
    for gates in (learned.weight_gates(PARAMS, KEY, **STACKED), learned.pattern_gates(PARAMS, 2, 4, KEY, **STACKED)):
        count = sum(leaf.size for leaf in jax.tree.leaves(gates))
        for tx in (optax.adam(1.0), optax.lion(1.0), optax.adafactor(1.0)):
            held = sum(np.size(leaf) for leaf in jax.tree.leaves(tx.init(gates)))
            assert held <= 2 * count + 20


PATTERNS = functools.partial(learned.pattern_gates, PARAMS, key=KEY, **STACKED)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: learned.weight_gates(PARAMS, KEY, std=0.0), ValueError, "positive std"),
        (lambda: learned.weight_gates(PARAMS, KEY, strength=-1.0), ValueError, "strength >= 0"),
        (lambda: learned.weight_gates(PARAMS, KEY, prior=PARAMS), ValueError, r"params\['a'\]\['bias'\].*bool"),
        (lambda: PATTERNS(4, 4), ValueError, "1 <= k < m; got k = 4, m = 4"),
        (lambda: PATTERNS(0.5, 4), ValueError, "whole numbers; got k = 0.5"),
        (lambda: PATTERNS(2, 3), ValueError, r"by 3 along axis -2, but params\['a'\]\['kernel'\] has shape \(8, 6\)"),
        (lambda: learned.soft_masks({"kernel": None}, KEY, 0, steps=3), ValueError, "gates is empty"),
        (lambda: learned.soft_masks(MASKS, KEY, 0, steps=3), TypeError, r"gates\['a'\]\['bias'\] is bool"),
        (lambda: learned.soft_masks(PARAMS, KEY, 0, steps=0), ValueError, "steps is the whole number of steps, >= 1; got 0"),
        (
            lambda: learned.soft_masks(PARAMS, KEY, 0, steps=3, temperature=(4.0, 0.0)),
            ValueError,
            r"temperature is a pair of positive numbers.*got \(4.0, 0.0\)",
        ),
        (lambda: learned.soft_masks(PARAMS, KEY, 0, steps=3, scale="high"), ValueError, "scale is a pair.*the string 'high'"),
        (
            lambda: learned.soft_patterns(PATTERNS(2, 4), PARAMS, 1, KEY, 0, steps=3),
            ValueError,
            r"gates has for params\['a'\]\['kernel'\] an array of shape \(2, 6, 6\).*keep 1 weights",
        ),
        (lambda: learned.pattern_masks(PARAMS, PARAMS, 2), ValueError, r"params\['a'\]\['bias'\] an array of shape \(6,\)"),
        (lambda: learned.pattern_masks(PATTERNS(2, 4), PARAMS, 0), ValueError, "got k = 0"),
        (lambda: learned.sparsity_loss(PARAMS, 60), ValueError, "within 0 to 1; got k = 60"),
        (lambda: learned.apply_soft_masks(PARAMS, MASKS), TypeError, r"soft\['a'\]\['bias'\] is bool.*apply_masks"),
        (lambda: learned.apply_soft_masks(PARAMS, {"a": None}), ValueError, r"no entry for params\['a'\]\['bias'\]"),
        (
            lambda: learned.apply_soft_masks({"kernel": jnp.ones(3)}, {"kernel": jnp.ones(2)}),
            ValueError,
            r"soft has for params\['kernel'\] an array of shape \(2,\)",
        ),
        (lambda: learned.kept_norm({"kernel": jnp.ones(3)}, {"kernel": None}), ValueError, "soft is empty"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
