"""Results own their arrays: what is donated or deleted of them does not take the parameters with it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune
from jaxprune import algebra, oneshot, rules, scores, storage, structured, transforms
from tests.support.graph_zoo import normal

X = normal(5, 3)


def fn(params: Any, x: Any) -> Any:
    return jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None]) @ params["down"]["kernel"]


def tree() -> Any:
    """Parameters, with leaves that no method touches: a bias, integers, a random key."""
    return {
        "up": {"kernel": normal(3, 8), "bias": normal(8)},
        "down": {"kernel": normal(8, 2)},
        "steps": jnp.arange(3),
        "key": jax.random.key(0),
    }


def kernels(params: Any) -> Any:
    return {name: {key: leaf for key, leaf in params[name].items()} for name in ("up", "down")}


def masks_of(params: Any) -> Any:
    return jaxprune.make_masks(params, 0.5, rule=rules.layer_sparsity)


@functools.cache
def grams() -> Any:
    return jaxprune.calibrate_grams(fn, kernels(tree()), [normal(64, 3)])


@functools.cache
def plan() -> structured.Plan:
    params = kernels(tree())
    return structured.select_channels(structured.trace(fn, params, X), params, 0.5)


def state_of(params: Any) -> Any:
    return optax.chain(optax.sgd(0.1, 0.9), jaxprune.keep_pruned(masks_of(params))).init(params)


def reads(params: Any) -> Any:
    """Only what the functions of calibration know."""
    return kernels(params)


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "apply_masks": lambda p: jaxprune.apply_masks(p, masks_of(p)),
    "apply_masks without masks": lambda p: jaxprune.apply_masks(kernels(p), jax.tree.map(lambda leaf: None, kernels(p))),
    "shrink": lambda p: structured.shrink(plan(), p),
    "channel_masks": lambda p: structured.channel_masks(plan(), p),
    "repair": lambda p: structured.repair(plan(), reads(p), grams()),
    "select_in_sequence": lambda p: structured.select_in_sequence(structured.trace(fn, p, X), p, 0.5, [X])[1],
    "swap": lambda p: oneshot.swap(reads(p), masks_of(reads(p)), grams())[:2],
    "reconstruct": lambda p: oneshot.reconstruct(reads(p), masks_of(reads(p)), grams()),
    "gptq": lambda p: oneshot.gptq(reads(p), grams(), prunable="up/kernel"),
    "sparsegpt": lambda p: oneshot.sparsegpt(reads(p), grams(), 0.5, prunable="up/kernel"),
    "admm": lambda p: oneshot.admm(reads(p), grams(), 0.5, prunable="up/kernel", steps=2),
    "sequential": lambda p: oneshot.sequential(
        fn, reads(p), [X], functools.partial(oneshot.sparsegpt, k=0.5), prunable="up/kernel"
    ),
    "block_by_block": lambda p: list(
        oneshot.block_by_block(
            lambda p, x: x + fn(p, x) @ jnp.ones((2, 3)), [p] * 2, [X], functools.partial(oneshot.sparsegpt, k=0.5), prunable="up/kernel"
        )
    ),
    "soft_threshold": lambda p: transforms.soft_threshold(kernels(p), -1.0),
    "straight_through": lambda p: transforms.straight_through(p, masks_of(p)),
    "merge_lora": lambda p: transforms.merge_lora(
        p["down"]["kernel"], normal(8, 1), normal(1, 2), masks_of(p)["down"]["kernel"]
    ),
    "iterate": lambda p: [r.params for r in jaxprune.iterate(lambda p, m: p, jaxprune.make_masks, kernels(p), [1.0])],
    "rewound": lambda p: [
        r.params for r in jaxprune.iterate(lambda p, m: p, jaxprune.make_masks, kernels(p), [1.0], rewind_to=kernels(p))
    ],
    "recalibrate": lambda p: jaxprune.recalibrate(lambda s, x: jax.tree.map(lambda s: 0.5 * s + x, s), kernels(p), [1.0]),
    "make_masks": masks_of,
    "magnitude": lambda p: scores.magnitude(kernels(p)),
    "masks_of": lambda p: algebra.masks_of(kernels(p)),
    "unpack": lambda p: algebra.unpack(algebra.pack(masks_of(kernels(p))), kernels(p)),
    "keep_pruned": state_of,
    "to_bcsr": lambda p: storage.to_bcsr(kernels(p), masks_of(kernels(p))),
}  # fmt: skip


def arrays(result: Any) -> list[jax.Array]:
    return [leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_returned_can_be_deleted(name: str) -> None:
    params = tree()
    results = arrays(FUNCTIONS[name](params))
    assert results
    for leaf in results:
        leaf.delete()
    assert not any(leaf.is_deleted() for leaf in arrays(params))
    assert np.isfinite(np.asarray(params["up"]["kernel"])).all()


MASKS: dict[str, Callable[[Any], Any]] = {
    "intersect": lambda m: algebra.intersect(m, {"up": {"kernel": None, "bias": None}, "down": {"kernel": None}}),
    "union": lambda m: algebra.union({"up": {"kernel": None, "bias": None}, "down": {"kernel": None}}, m),
    "invert": algebra.invert,
    "masks_in": lambda m: jaxprune.masks_in(transforms.KeepPrunedState(m)),
    "keep_pruned": lambda m: jaxprune.keep_pruned(m).init(kernels(tree())),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_that_are_returned_can_be_deleted(name: str) -> None:
    masks = masks_of(kernels(tree()))
    results = arrays(MASKS[name](masks))
    assert len(results) == 3
    for leaf in results:
        leaf.delete()
    assert not any(leaf.is_deleted() for leaf in arrays(masks))


def test_masks_stay_when_the_state_is_donated() -> None:
    params = kernels(tree())
    state = state_of(params)
    masks = jaxprune.masks_in(state)
    jax.jit(lambda state: jax.tree.map(lambda leaf: leaf, state), donate_argnums=0)(state)
    assert [bool(leaf.all()) for leaf in arrays(masks)] == [False, True, False]


def test_numpy_and_numbers_pass_and_copies_keep_their_sharding() -> None:
    bias = np.ones(3, np.float32)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    sharded = jax.device_put(jnp.arange(8), jax.NamedSharding(mesh, jax.P("d")))
    found = jaxprune.apply_masks({"a": bias, "b": 2.0, "c": sharded}, {"a": None, "b": None, "c": None})
    assert found["a"] is bias
    assert found["b"] == 2.0
    assert found["c"] is not sharded
    assert found["c"].sharding == sharded.sharding
    text = str(jax.make_jaxpr(lambda x: jaxprune.apply_masks({"x": x}, {"x": None}))(jnp.ones(3)))
    assert "copy" not in text  # under jit it costs nothing
