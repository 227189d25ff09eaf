"""Groups by the names that people give them."""

import jax.numpy as jnp
import pytest

import jaxprune
from jaxprune.structured import count_macs, select_channels, select_channels_globally, sparsity_within, trace
from jaxprune.structured._plan import solve
from tests.support.structured_zoo import normal

KERNELS = {"q_proj": (8, 4, 3), "k_proj": (8, 2, 3), "v_proj": (8, 2, 3), "o_proj": (4, 3, 8)}
KERNELS |= {"gate_proj": (8, 12), "up_proj": (8, 12), "down_proj": (12, 8)}


def llama(params, tokens):
    """Two layers of grouped-query attention and a gated layer each; the table is the output layer as well."""
    h = params["embed"]["embedding"][tokens]
    for number in range(2):
        p = {name: layer["kernel"] for name, layer in params["layers"][str(number)].items()}
        q = jnp.einsum("ti,ihd->thd", h, p["q_proj"]).reshape(-1, 2, 2, 3)
        k, v = (jnp.einsum("ti,ihd->thd", h, p[name]) for name in ("k_proj", "v_proj"))
        weights = jnp.tanh(jnp.einsum("tgqd,sgd->gqts", q, k))
        mixed = jnp.einsum("gqts,sgd->tgqd", weights, v).reshape(-1, 4, 3)
        h = h + jnp.einsum("thd,hdo->to", mixed, p["o_proj"])
        h = h + (jnp.tanh(h @ p["gate_proj"]) * (h @ p["up_proj"])) @ p["down_proj"]
    return h @ params["embed"]["embedding"].T


PARAMS = {
    "embed": {"embedding": normal(20, 8)},
    "layers": {str(n): {name: {"kernel": normal(*shape, salt=n)} for name, shape in KERNELS.items()} for n in range(2)},
}
TOKENS = jnp.arange(30) % 20
GRAPH = trace(llama, PARAMS, TOKENS)
FFN, HEADS, HIDDEN = "layers/{}/gate_proj/kernel[1]", "layers/{}/k_proj/kernel[1]", "embed/embedding[1]"


def cut(k, **told) -> set[str]:
    """The groups that are cut."""
    kept = solve(GRAPH, select_channels(GRAPH, PARAMS, k, **told))
    return {group.name for group in GRAPH.groups if group.var in kept}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("layers/0/gate_proj/kernel", {FFN.format(0)}),
        ("layers/0/up_proj", {FFN.format(0)}),  # any layer that computes them
        ("layers.1.up_proj", {FFN.format(1)}),
        ("*/gate_proj", {FFN.format(0), FFN.format(1)}),
        ("*/k_proj", {HEADS.format(0), HEADS.format(1)}),  # heads, of which their dimensions are parts
        ("*/v_proj", {HEADS.format(0), HEADS.format(1)}),
        ("layers/0/q_proj", {HEADS.format(0)}),
        ("layers/1", {FFN.format(1), HEADS.format(1)}),  # the width is computed elsewhere as well
        ("layers/*", {FFN.format(0), FFN.format(1), HEADS.format(0), HEADS.format(1)}),
        ("embed", {HIDDEN}),
        ("*/o_proj", {HIDDEN}),
        ("*", {HIDDEN, *(name.format(n) for name in (FFN, HEADS) for n in range(2))}),
        ("*/k_proj/kernel[2]", {"layers/0/k_proj/kernel[2]", "layers/1/k_proj/kernel[2]"}),
        (HEADS.format(1), {HEADS.format(1)}),
    ],
)
def test_names(name: str, found: set[str]):
    assert cut({name: 0.5}) == found


def test_the_last_that_fits_counts():
    plan = select_channels(GRAPH, PARAMS, {"*/gate_proj": 0.25, "*/k_proj": 1 / 2, "layers/1/up_proj": 0.5})
    assert plan.shrunk_shape("layers/0/down_proj/kernel") == (9, 8)
    assert plan.shrunk_shape("layers/1/down_proj/kernel") == (6, 8)
    assert plan.shrunk_shape("layers/1/o_proj/kernel") == (2, 3, 8)  # a head of keys is two of queries


def test_rounding_by_names():
    plan = select_channels(GRAPH, PARAMS, {"*/up_proj": 0.25}, round_to={"layers/1/gate_proj": 4})
    assert plan.shrunk_shape("layers/0/down_proj/kernel") == (9, 8)
    assert plan.shrunk_shape("layers/1/down_proj/kernel") == (8, 8)
    with pytest.raises(ValueError, match=r"round_to\['\*/up_proj'\] is a whole number, at least 1, not 0"):
        sparsity_within(GRAPH, 1e4, round_to={"*/up_proj": 0})


def test_few_names_are_listed():
    with pytest.raises(ValueError, match=r"k names '\*/w1', which .* groups are (?:[^,]+, ){3}[^,]+ and \d+ more\.$"):
        select_channels(GRAPH, PARAMS, {"*/w1": 0.5})
    with pytest.raises(KeyError, match=r"'w1' is no group; there are .* and \d+ more"):
        GRAPH.group("w1")


@pytest.mark.parametrize("by_grams", [False, True])
def test_alike_layers_keep_one_width(by_grams: bool):
    told = {"grams": jaxprune.calibrate_grams(llama, PARAMS, [TOKENS])} if by_grams else {}
    patterns = ("*/gate_proj", "*/k_proj")
    budget = 0.7 * count_macs(GRAPH)
    plan = select_channels_globally(GRAPH, PARAMS, budget, among=patterns, alike=patterns, **told)
    widths = [plan.shrunk_shape(f"layers/{n}/down_proj/kernel") for n in range(2)]
    assert widths[0] == widths[1]
    assert widths[0][0] < 12
    first, second = (plan.kept[f"layers/{n}/down_proj/kernel"][0] for n in range(2))
    assert first != second  # the channels are each layer's own
    assert "embed/embedding" not in plan.kept
    assert count_macs(GRAPH, plan) <= budget
    one = select_channels_globally(
        GRAPH, PARAMS, budget, among=patterns, alike="*/gate_proj", round_to={"*/up_proj": 4}
    )
    assert {len(one.kept[f"layers/{n}/down_proj/kernel"][0]) for n in range(2)} <= {4, 8}


def test_what_cannot_be_alike():
    with pytest.raises(ValueError, match=r"alike names '\*', but .* has 8 channels in steps of 1 and .* has \d+"):
        select_channels_globally(GRAPH, PARAMS, 1e9, alike="*")
    with pytest.raises(ValueError, match=r"alike names 'embed', of which among leaves no group"):
        select_channels_globally(GRAPH, PARAMS, 1e9, among="*/gate_proj", alike="embed")
    with pytest.raises(ValueError, match=r"among names 'x', which computes no channels"):
        select_channels_globally(GRAPH, PARAMS, 1e9, among="x")
    assert select_channels_globally(GRAPH, PARAMS, count_macs(GRAPH), alike=("*/gate_proj", "*/up_proj")).kept == {}
