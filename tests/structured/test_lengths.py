"""Functions at other lengths and batches than they were traced with: against the function itself, and masked against cut."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxprune.structured import (
    channel_masks,
    count_macs,
    masked,
    rebuild,
    select_blocks,
    select_channels,
    shrink,
    trace,
    verify,
)
from tests.support.structured_depth import close
from tests.support.structured_zoo import normal

PARAMS = {"in": normal(5, 6), "table": normal(16, 6)} | {
    str(n): {"q": normal(6, 2, 4, salt=n), "k": normal(6, 2, 4), "v": normal(6, 2, 4), "o": normal(2, 4, 6), "up": normal(6, 8), "down": normal(8, 6)}
    for n in range(2)
}  # fmt: skip


def decoder(params: Any, x: Any) -> Any:
    """Two causal layers over a batch of sequences, with learned positions and a mean that knows how many it is over."""
    length = x.shape[1]
    h = x @ params["in"] + params["table"][None, :length]
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
    for number in range(2):
        p = params[str(number)]
        q, k, v = (jnp.einsum("bti,ihd->bthd", h, p[name]) for name in "qkv")
        weights = jax.nn.softmax(jnp.where(causal, jnp.einsum("bthd,bshd->bhts", q, k), -1e9))
        h = h + jnp.einsum("bhts,bshd,hdo->bto", weights, v, p["o"])
        h = h + jnp.tanh(h @ p["up"]) @ p["down"]
    return h.sum(1) / length


X = normal(2, 7, 5)
GRAPH = trace(decoder, PARAMS, X)
PLAN = select_channels(GRAPH, PARAMS, {"*/up": 0.5, "*/v": 0.5})
SHAPES = [(2, 11, 5), (5, 7, 5), (3, 16, 5), (1, 1, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_rebuilt_masked_and_whole(shape: tuple[int, ...]):
    x = normal(*shape)
    small_fn, masked_fn = rebuild(GRAPH, PLAN), masked(GRAPH)
    whole = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, bool), PARAMS)
    close(masked_fn(PARAMS, whole, x), decoder(PARAMS, x))
    found = small_fn(shrink(PLAN, PARAMS), x)
    close(found, masked_fn(PARAMS, channel_masks(PLAN, PARAMS), x))
    close(found, decoder(shrink(PLAN, PARAMS), x))  # which computes from shapes alone
    small_fn(shrink(PLAN, PARAMS), X)
    assert small_fn._cache_size() == 2  # once for each shape


@pytest.mark.slow
def test_verified_at_another_length():
    assert verify(GRAPH, PLAN, PARAMS, normal(3, 12, 5))


def test_costs_at_another_length():
    longer = GRAPH.at(jax.ShapeDtypeStruct((2, 14, 5), jnp.float32))
    products = (
        2 * 2 * 2 * 4 * (14**2 - 2 * 7**2)
    )  # of queries with keys and of weights with values, in each layer and head
    assert count_macs(longer) - 2 * count_macs(GRAPH) == 2 * products
    assert count_macs(longer, PLAN) < count_macs(longer)


def test_blocks_are_chosen_on_any_batches():
    x = normal(3, 12, 5)
    whole = decoder(PARAMS, x)
    plan = select_blocks(GRAPH, PARAMS, 1, lambda fn, params: jnp.square(fn(params, x) - whole).mean())
    losses = {}
    for block in GRAPH.blocks:
        less = {name: {k: jnp.zeros_like(w) if f"{name}/{k}" in block.paths and k in ("o", "down") else w for k, w in leaf.items()} if isinstance(leaf, dict) else leaf for name, leaf in PARAMS.items()}  # fmt: skip
        losses[block.paths] = float(jnp.square(decoder(less, x) - whole).mean())
    assert plan.dropped == min(losses, key=losses.__getitem__)


def test_what_does_not_go():
    with pytest.raises(ValueError, match=r"takes no inputs of shapes \(2, 17, 5\); it was traced with \(2, 7, 5\): "):
        GRAPH.at(normal(2, 17, 5))  # the table has 16 positions

    def other(params: Any, x: Any) -> Any:
        h = jnp.tanh(x @ params["up"])
        return (h if len(x) == 4 else h[:, ::-1]) @ params["down"]

    params = {"up": normal(3, 8), "down": normal(8, 2)}
    graph = trace(other, params, normal(4, 3))
    small = rebuild(graph, select_channels(graph, params, 0.5))
    with pytest.raises(
        ValueError, match=r"With inputs of shapes \(5, 3\) the function has other channels .* up\[1\] are not the same"
    ):
        small(params, normal(5, 3))
