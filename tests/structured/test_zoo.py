"""For networks of every kind: the channels found, and that the smaller function computes what the masked one does."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.structured import (
    Graph,
    Plan,
    channel_masks,
    count_macs,
    masked,
    rebuild,
    select_channels,
    shrink,
    trace,
    verify,
)
from jaxprune.structured._axes._replay import Replay
from jaxprune.structured._rebuild import evaluate, whole_shapes
from tests.support.slow import slow_but
from tests.support.structured_cases import CASES
from tests.support.structured_zoo import Case

QUICK = ["cnn_linen"]
PRUNABLE = [name for name in CASES if name != "weird"]
# Each part of the machinery once: convolutions, statistics as results, loops, derivatives of one's own, attention.
DIFFERENTIATED = ["cnn_linen", "resnet_train", "transformer_scan", "gru", "derivatives"]


@functools.cache
def traced(name: str) -> tuple[Case, Graph]:
    case = CASES[name]()
    return case, trace(case.fn, case.params, *case.inputs, prunable_outputs=case.outputs)


def half(case: Case, graph: Graph) -> Plan:
    """Half of every group, those inside others as well; where there are two, one."""
    return select_channels(graph, case.params, {group.name: 0.5 for group in graph.groups})


def close(found: Any, expected: Any, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * max(1.0, np.abs(b).max())


@pytest.mark.parametrize("name", slow_but([*QUICK, "gru", "resnet_train"], CASES))
def test_the_channels_are_those_found_by_hand(name: str):
    case, graph = traced(name)
    found = {
        group.name: (group.size, len(group.members), *([group.outer] if group.outer else [])) for group in graph.groups
    }
    assert found == case.groups


@pytest.mark.parametrize("name", slow_but(QUICK, PRUNABLE))
def test_the_smaller_function_equals_the_masked_one(name: str):
    case, graph = traced(name)
    plan = half(case, graph)
    assert count_macs(graph, plan) < count_macs(graph)
    result = verify(graph, plan, case.params, *case.inputs)
    assert result.passed, result
    assert all(output.difference < 1e-5 for output in result.outputs)


@pytest.mark.parametrize("name", slow_but(QUICK, CASES))
def test_replay_of_everything_equals_the_function(name: str):
    case, graph = traced(name)
    replay = jax.jit(lambda params, *inputs: evaluate(graph, Replay(), params, whole_shapes(graph), inputs, {}))
    close(replay(case.params, *case.inputs), jax.jit(case.fn)(case.params, *case.inputs), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(QUICK, PRUNABLE))
def test_what_is_coupled_cannot_be_moved_alone(name: str):
    """Rolling the channels of one member must change the result, unless nothing depends on it."""
    case, graph = traced(name)
    plan = half(case, graph)
    small_fn, small = rebuild(graph, plan), shrink(plan, case.params)
    before = small_fn(small, *case.inputs)
    paths = dict(zip(graph.paths, range(len(graph.paths)), strict=True))
    leaves, treedef = jax.tree.flatten(small)
    still = set()
    for group in graph.groups:
        for member in group.members:
            order = _rolled(plan, member)
            if order is None:
                continue
            moved = list(leaves)
            moved[paths[member.path]] = jnp.take(moved[paths[member.path]], order, member.axis)
            after = small_fn(jax.tree.unflatten(treedef, moved), *case.inputs)
            if not _differs(after, before):
                still.add(member.path)
    assert still <= set(case.inert)


def _rolled(plan: Plan, member: Any) -> np.ndarray | None:
    """The order of a smaller axis in which every channel has taken the next one's place."""
    kept = plan.kept.get(member.path, {}).get(member.axis)
    # Where layers keep their own, each has the next one's place in the order of its own.
    labels = member.channels if kept is None else member.channels[np.atleast_2d(kept)[0]]
    channels = [np.flatnonzero(labels == channel) for channel in np.unique(labels[labels >= 0])]
    if len(channels) < 2:
        return None
    order = np.arange(len(labels))
    order[np.concatenate(channels)] = np.concatenate([*channels[1:], channels[0]])
    return order


def _differs(found: Any, expected: Any) -> bool:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return any(float(jnp.abs(a - b).max()) > 1e-5 * float(jnp.abs(b).max()) for a, b in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(["gru"], DIFFERENTIATED))
def test_gradients_equal_those_of_the_masked_function(name: str):
    case, graph = traced(name)
    plan = half(case, graph)
    masks, masked_fn, small_fn = channel_masks(plan, case.params), masked(graph), rebuild(graph, plan)

    def loss(outputs: Any) -> Any:
        first = jax.tree.leaves(outputs)[-1]  # the logits
        return (first * jnp.cos(jnp.arange(first.size, dtype=first.dtype).reshape(first.shape))).sum()

    expected = jax.grad(lambda p: loss(masked_fn(p, masks, *case.inputs)))(case.params)
    found = jax.grad(lambda p: loss(small_fn(p, *case.inputs)))(shrink(plan, case.params))
    assert any(float(jnp.abs(leaf).max()) > 1e-3 for leaf in jax.tree.leaves(found))
    close(found, shrink(plan, expected), 1e-5)


def test_derivatives_of_ones_own_are_kept():
    """Gradients of the dense replay are those of the function: where a tie has 0, and a sign is passed straight on."""
    case, graph = traced("derivatives")

    def loss(fn: Any) -> Any:
        return jax.grad(lambda params: jnp.sin(fn(params, *case.inputs)).sum())(case.params)

    replay = lambda params, *inputs: evaluate(graph, Replay(), params, whole_shapes(graph), inputs, {})  # noqa: E731
    found, expected = loss(jax.jit(replay)), loss(case.fn)
    close(found, expected, 1e-6)
    assert float(jnp.abs(expected["a"]).max()) > 0.01
    assert not np.asarray(expected["tie"]).any()


BATCHED = ["cnn_linen", "cnn_equinox", "transformer", "vit", "lstm"]


@pytest.mark.slow
@pytest.mark.parametrize("name", BATCHED)
def test_the_batch_may_differ(name: str):
    case, graph = traced(name)
    plan = half(case, graph)
    small = shrink(plan, case.params)
    three = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), case.inputs)
    found = rebuild(graph, plan)(small, *three)
    expected = rebuild(graph, plan)(small, *case.inputs)
    close(found[:2], expected, 1e-5)
    close(found[2], expected[0], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cnn_linen", "vit", "gru"])
def test_export_with_a_symbolic_batch(name: str):
    case, graph = traced(name)
    plan = half(case, graph)
    small_fn, small = rebuild(graph, plan), shrink(plan, case.params)
    (batch,) = jax.export.symbolic_shape("batch")
    shapes = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in case.inputs]
    params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), small)
    text = jax.export.export(small_fn, platforms=("cpu", "cuda", "tpu"))(params, *shapes).serialize()
    found = jax.export.deserialize(text).call(small, *case.inputs)
    close(found, small_fn(small, *case.inputs), 1e-6)
