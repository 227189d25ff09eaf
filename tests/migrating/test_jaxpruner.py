"""Where the page for those who come from JaxPruner says that masks are the same, they are; where it says how they differ, so."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import algebra, make_masks, masks_in, rules, scores
from jaxprune.transforms import straight_through
from tests.support import oracles_jaxpruner as oracle

SHAPES = {"a": (3, 3, 1, 8), "b": (3, 3, 8, 16), "c": (256, 12), "d": (12, 10)}
ANY = {"prunable": lambda path, leaf: leaf.ndim > 1}  # JaxPruner's default


def draw(seed: int, shapes: dict[str, tuple[int, ...]] = SHAPES, step: float = 0.0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {name: {"kernel": np.round(x / step) * np.float32(step) if step else x} for name, x in values.items()}


def sizes_of(params: dict[str, Any]) -> dict[str, np.ndarray]:
    return {name: np.abs(leaf["kernel"]) for name, leaf in params.items()}


def assert_same(masks: Any, expected: dict[str, np.ndarray]) -> None:
    for name, mask in expected.items():
        np.testing.assert_array_equal(masks[name]["kernel"], mask, name)


@pytest.mark.parametrize("step", [0.0, 0.5], ids=["no ties", "ties"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.8, 0.95])
def test_uniform(sparsity: float, step: float) -> None:
    params = draw(0, step=step)
    masks = make_masks(params, sparsity, rule=rules.layer_sparsity, **ANY)
    assert_same(masks, {name: oracle.top_k(size, sparsity) for name, size in sizes_of(params).items()})


def test_uniform_at_half_a_weight_keeps_one_more_here() -> None:
    kernel = np.arange(1.0, 6.0, dtype=np.float32)[None]
    here = make_masks({"kernel": kernel}, 0.5, rule=rules.layer_sparsity)["kernel"]
    assert (int(np.sum(here)), int(np.sum(oracle.top_k(kernel, 0.5)))) == (3, 2)


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
def test_saliency(sparsity: float) -> None:
    params, grads = draw(0), draw(1)
    masks = make_masks(params, sparsity, scores=scores.saliency(params, grads), rule=rules.layer_sparsity, **ANY)
    expected = {name: np.abs(params[name]["kernel"] * grads[name]["kernel"]) for name in params}
    assert_same(masks, {name: oracle.top_k(size, sparsity) for name, size in expected.items()})


def normalized(params: Any) -> Any:
    """What the page writes."""
    return jax.tree.map(lambda s: s / (jnp.linalg.norm(s) + 1e-8), scores.magnitude(params))


@pytest.mark.parametrize("sparsity", [0.3, 0.8, 0.95])
@pytest.mark.parametrize("scaled", [True, False])
def test_global(sparsity: float, scaled: bool) -> None:
    params = draw(0)
    given = normalized(params) if scaled else None
    masks = make_masks(params, sparsity, scores=given, rule=rules.global_sparsity)
    assert_same(masks, oracle.globally(sizes_of(params), sparsity, normalized=scaled))


def test_global_empties_a_layer_there_and_none_here() -> None:
    params = {
        "large": {"kernel": np.full((4, 5), 9.0, np.float32)},
        "small": {"kernel": np.full((2, 5), 1.0, np.float32)},
    }
    there = oracle.globally(sizes_of(params), 0.5, normalized=False)
    here = make_masks(params, 0.5, rule=rules.global_sparsity)
    assert [int(mask.sum()) for mask in there.values()] == [15, 0]
    assert [int(leaf["kernel"].sum()) for leaf in here.values()] == [14, 1]


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9, 0.95])
def test_erk_keeps_the_same_numbers_within_rounding(sparsity: float) -> None:
    params = draw(0)
    masks = make_masks(params, sparsity, rule=rules.erk_sparsity)
    there = oracle.erk(SHAPES, sparsity)
    kept = {name: int(oracle.top_k(size, there[name]).sum()) for name, size in sizes_of(params).items()}
    here = {name: int(leaf["kernel"].sum()) for name, leaf in masks.items()}
    total = sum(np.prod(shape) for shape in SHAPES.values())
    assert sum(here.values()) == total - round(sparsity * total)
    assert max(abs(here[name] - kept[name]) for name in SHAPES) <= 3, (here, kept)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("axis", [-1, -2])
def test_n_m(n: int, axis: int) -> None:
    params = draw(0, {"a": (8, 12)})
    masks = make_masks(params, n, rule=rules.n_m(4, axis=axis))
    assert_same(masks, {"a": oracle.n_of_m(sizes_of(params)["a"], n, 4, axis)})


def test_n_m_of_equals_keeps_the_first_here_and_the_last_there() -> None:
    ones = np.ones((1, 4), np.float32)
    assert make_masks({"kernel": ones}, 1, rule=rules.n_m(4, axis=-1))["kernel"].tolist() == [
        [True, False, False, False]
    ]
    assert oracle.n_of_m(ones, 1, 4).tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_channels(sparsity: float) -> None:
    params = draw(0)
    rule = rules.channels(rules.layer_sparsity, axis=-1, norm=functools.partial(scores.channel_norm, ord=1))
    masks = make_masks(params, sparsity, rule=rule)
    # Half a channel is rounded down there and to even here.
    whole = {name: size for name, size in sizes_of(params).items() if (sparsity * size.shape[-1]) % 1 != 0.5}
    assert_same(masks, {name: oracle.channels(size, sparsity) for name, size in whole.items()})


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.8])
def test_blocks(sparsity: float) -> None:
    params = draw(0, {"a": (8, 12), "b": (6, 12)})
    masks = make_masks(params, sparsity, rule=rules.blocks(rules.layer_sparsity, (2, 3)))
    assert_same(masks, {name: oracle.blocks(size, sparsity, (2, 3)) for name, size in sizes_of(params).items()})


def cubic(target: float, start: int, end: int) -> optax.Schedule:
    """What the page writes."""
    return optax.polynomial_schedule(0.0, target, power=3, transition_steps=end - start, transition_begin=start - 1)


@pytest.mark.parametrize(("start", "end"), [(1, 40), (10, 40), (7, 95)])
def test_the_schedule(start: int, end: int) -> None:
    steps = range(start, end + 10)
    here = [float(cubic(0.8, start, end)(jnp.int32(t))) for t in steps]
    np.testing.assert_allclose(here, [oracle.sparsity_at(t, 0.8, start, end) for t in steps], atol=1e-6)


def follow(tx: optax.GradientTransformation, params: Any, gradients: Any, number: int) -> list[tuple[Any, Any]]:
    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gradients(params), state, params)
        return optax.apply_updates(params, updates), state

    state, seen = tx.init(params), []
    for _ in range(number):
        params, state = step(params, state)
        seen.append((params, masks_in(state)))
    return seen


def to_targets(params: Any) -> Any:
    """The gradient of half the squared distance to targets, which a weight moves towards."""
    targets = draw(3, {name: leaf["kernel"].shape for name, leaf in params.items()}, step=1 / 64)
    return jax.tree.map(lambda p, t: p - t, params, targets)


def test_gradual_pruning_makes_the_same_masks_step_by_step_at_a_learning_rate_that_moves_weights() -> None:
    start, end, freq = 4, 31, 8
    params = draw(2, {"a": (8, 12), "b": (12, 5)}, step=1 / 64)
    make = functools.partial(make_masks, rule=rules.layer_sparsity)
    last = end // freq * freq
    first = -(-start // freq) * freq
    prune = jaxprune.prune(make, cubic(0.8, start, end), every=freq, begin=first, until=last)
    # Halves and sixty-fourths: no step is rounded for as long as it takes.
    seen = follow(optax.chain(optax.sgd(0.5), prune), params, to_targets, 34)

    weights = {name: leaf["kernel"] for name, leaf in params.items()}
    masks = {name: np.ones(x.shape, bool) for name, x in weights.items()}
    changed = 0
    for t, (here, held) in enumerate(seen):
        grads = to_targets({name: {"kernel": x} for name, x in weights.items()})
        if oracle.updates_at(t, freq, start, end):
            sparsity = oracle.sparsity_at(t, 0.8, start, end)
            new = {name: oracle.top_k(np.abs(x), sparsity) for name, x in weights.items()}
            changed += any((new[name] != masks[name]).any() for name in new)
            masks = new
        # post_gradient_update
        weights = {n: (x - np.float32(0.5) * grads[n]["kernel"]) * masks[n] for n, x in weights.items()}
        assert_same(held, masks)
        for name, x in weights.items():
            np.testing.assert_allclose(here[name]["kernel"], x, rtol=1e-5, atol=1e-7)
    assert changed == 3
    assert float(jaxprune.sparsity(seen[-1][1])) < 0.79  # the last update is step 24 of 31, as there


@pytest.mark.parametrize("fraction", [0.125, 0.25, 0.5])
def test_rigl_drops_and_grows_the_same_weights(fraction: float) -> None:
    rng = np.random.default_rng(0)
    mask = oracle.top_k(rng.uniform(size=(10, 20)).astype(np.float32), 0.84)  # 32 weights: each fraction is whole
    kernel = np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)
    grads = {"kernel": rng.normal(size=mask.shape).astype(np.float32)}
    params = {"kernel": jnp.asarray(kernel)}
    tx = jaxprune.rigl(optax.sgd(0.1), {"kernel": jnp.asarray(mask)}, every=1, until=9, drop_fraction=fraction)
    _, state = tx.update(grads, tx.init(params), params)
    expected = oracle.dropped_and_grown(mask, np.abs(kernel), np.abs(grads["kernel"]), fraction)
    assert int((expected & ~mask).sum()) > 0
    np.testing.assert_array_equal(masks_in(state)["kernel"], expected)


def test_straight_through_sees_the_same_weights_and_keeps_the_dense_ones() -> None:
    params = draw(4)
    for t in (1, 5, 9):
        k = cubic(0.8, 1, 10)(jnp.int32(t))
        seen = straight_through(params, make_masks(params, k, rule=rules.layer_sparsity))
        for name, size in sizes_of(params).items():
            kept = oracle.top_k(size, oracle.sparsity_at(t, 0.8, 1, 10))
            np.testing.assert_array_equal(seen[name]["kernel"], params[name]["kernel"] * kept)


def test_masks_of_a_checkpoint() -> None:
    """Bytes or bits, None where nothing is pruned."""
    params = {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}
    mask = oracle.top_k(np.random.default_rng(0).uniform(size=(3, 5)), 0.5)

    def read(m: Any, p: Any) -> Any:
        return jnp.ones(p.shape, bool) if m is None else m.astype(bool)

    def unpacked(m: Any, p: Any) -> Any:
        return None if m is None else jnp.unpackbits(m)[: p.size].reshape(p.shape)

    packed = {"kernel": jnp.packbits(mask), "bias": None}
    saved = jax.tree.map(unpacked, packed, params, is_leaf=lambda m: m is None)
    masks = jax.tree.map(read, saved, params, is_leaf=lambda m: m is None)
    np.testing.assert_array_equal(masks["kernel"], mask)
    jaxprune.keep_pruned(masks).init(params)


def test_the_share_of_common_weights() -> None:
    """`summarize_intersection` divides by the ones of the first tree, `overlap` by those of either."""
    rng = np.random.default_rng(0)
    a, b = ({"kernel": oracle.top_k(rng.uniform(size=(20, 20)), 0.7)} for _ in range(2))
    there = (a["kernel"] & b["kernel"]).sum() / a["kernel"].sum()
    here = float(algebra.overlap(a, b))
    assert there == pytest.approx(2 * here / (1 + here))
