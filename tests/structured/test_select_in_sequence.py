"""Channels chosen in sequence: against numpy's least squares on two streams, written layer by layer in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxprune
from jaxprune.structured import Plan, rebuild, repair, select_channels, select_in_sequence, shrink, trace, verify
from jaxprune.structured._plan import plan_of
from tests.support.structured_zoo import normal

LAYERS, WIDTH, INNER, KEPT = 5, 6, 10, 6
PARAMS = {
    "up": normal(LAYERS, WIDTH, INNER) / 2,
    "down": normal(LAYERS, INNER, WIDTH) / 4,
    "offset": normal(LAYERS, WIDTH) / 4,
    "head": normal(WIDTH, 3),
}
BATCHES = [normal(40, WIDTH, salt=i) for i in range(3)]
NAMES = {"*up": 0.4}


def layer(p: Any, x: Any) -> Any:
    return x + (jnp.tanh(x @ p["up"]) @ p["down"] + p["offset"][None])


def scanned(params: Any, x: Any) -> Any:
    of_layers = {name: params[name] for name in ("up", "down", "offset")}
    return lax.scan(lambda x, p: (layer(p, x), None), x, of_layers)[0] @ params["head"]


def looped(params: Any, x: Any) -> Any:
    for number in range(LAYERS):
        x = layer(params[str(number)], x)
    return x @ params["head"]


def unstacked(params: Any) -> Any:
    of_layers = {str(n): {name: params[name][n] for name in ("up", "down", "offset")} for n in range(LAYERS)}
    return {**of_layers, "head": params["head"]}


def ridge(x: np.ndarray, t: np.ndarray, w: np.ndarray, damping: float, mean: float) -> np.ndarray:
    """The weights closest to outputs t, and to w, as the least squares of one larger problem."""
    rows = np.concatenate([x, np.sqrt(damping * mean) * np.eye(x.shape[1])])
    return np.linalg.lstsq(rows, np.concatenate([t, np.sqrt(damping * mean) * w]))[0]


def cross_validated(x: np.ndarray, t: np.ndarray, w: np.ndarray, mean: float) -> np.ndarray:
    """The weights at the damping of the least generalised cross-validation error."""
    found = []
    for damping in 10.0 ** np.arange(1.0, -6.5, -0.5):
        v = ridge(x, t, w, damping, mean)
        hat = x @ np.linalg.solve(x.T @ x + damping * mean * np.eye(x.shape[1]), x.T)
        found.append((np.square(t - x @ v).sum() / (1 - np.trace(hat) / len(x)) ** 2, damping, v))
    return min(found, key=lambda entry: entry[0])[2]


def by_hand(stays: list[int], target: str) -> tuple[list[list[int]], list[np.ndarray]]:
    """For each layer that stays its channels, and its weights on all of them."""
    p = {name: np.asarray(leaf, np.float64) for name, leaf in PARAMS.items()}
    x = np.concatenate([np.asarray(batch, np.float64) for batch in BATCHES])
    streams = [x]
    for n in range(LAYERS):
        streams.append(streams[-1] + np.tanh(streams[-1] @ p["up"][n]) @ p["down"][n] + p["offset"][n])
    channels, weights = [], []
    for n, following in zip(stays, [*stays[1:], LAYERS], strict=True):
        h, w = np.tanh(x @ p["up"][n]), p["down"][n]
        t = h @ w if target == "current" else streams[following] - p["offset"][n] - x
        mean = np.square(h).sum(0).mean()
        aimed, left = ridge(h, t, w, 0.01, mean), list(range(INNER))
        damped = np.concatenate([h, np.sqrt(0.01 * mean) * np.eye(INNER)])
        while len(left) > KEPT:
            losses = {}
            for channel in left:
                rest = [other for other in left if other != channel]
                v = np.linalg.lstsq(damped[:, rest], damped @ aimed)[0]
                losses[channel] = np.square(damped[:, rest] @ v - damped @ aimed).sum()
            left.remove(min(losses, key=losses.__getitem__))
        found = np.zeros_like(w)
        found[left] = cross_validated(h[:, left], t, w[left], mean)
        x = x + h @ found + p["offset"][n]
        channels.append(left)
        weights.append(found)
    return channels, weights


def depth(graph: Any, stays: list[int]) -> Plan:
    (block,) = graph.blocks
    return plan_of(graph, {block.place: np.array(stays)})


@pytest.mark.parametrize(
    ("stays", "target"),
    [
        ([0, 3], "dense"),
        pytest.param([0, 1, 2, 3, 4], "dense", marks=pytest.mark.slow),
        pytest.param([0, 1, 2, 3, 4], "current", marks=pytest.mark.slow),
        pytest.param([1, 2, 4], "current", marks=pytest.mark.slow),
    ],
)
def test_layers_of_a_scan_against_numpy(stays: list[int], target: Any):
    graph = trace(scanned, PARAMS, BATCHES[0])
    blocks = depth(graph, stays) if len(stays) < LAYERS else None
    plan, repaired = select_in_sequence(graph, PARAMS, NAMES, BATCHES, blocks=blocks, target=target)
    channels, weights = by_hand(stays, target)
    assert [list(plan.kept["down"][1][n]) for n in stays] == channels
    assert plan.to_repair == ()
    assert blocks is None or plan.kept["down"][0] == tuple(stays)
    np.testing.assert_allclose(repaired["down"][np.array(stays)], np.stack(weights), rtol=1e-2, atol=1e-3)
    for name in ("up", "offset", "head"):
        np.testing.assert_array_equal(repaired[name], PARAMS[name])
    gone = sorted(set(range(LAYERS)) - set(stays))
    np.testing.assert_array_equal(repaired["down"][np.array(gone, int)], PARAMS["down"][np.array(gone, int)])
    assert verify(graph, plan, repaired, BATCHES[0])


@pytest.mark.slow
def test_a_loop_of_layers_and_branches_that_go_against_numpy():
    params = unstacked(PARAMS)
    graph = trace(looped, params, BATCHES[0])
    blocks = plan_of(graph, {}, [block for block in graph.blocks if block.name in ("1", "2", "4")])
    plan, repaired = select_in_sequence(graph, params, {"*/up": 0.4}, BATCHES, blocks=blocks)
    channels, weights = by_hand([0, 3], "dense")
    assert [list(plan.kept[f"{n}/down"][0]) for n in (0, 3)] == channels
    assert {path.split("/")[0] for path in plan.dropped} == {"1", "2", "4"}
    for n, expected in zip((0, 3), weights, strict=True):
        np.testing.assert_allclose(repaired[str(n)]["down"], expected, rtol=1e-2, atol=1e-3)
    assert verify(graph, plan, repaired, BATCHES[0])


@pytest.mark.slow
def test_layers_that_stay_make_up_for_those_that_go_without_being_cut():
    graph, x = trace(scanned, PARAMS, BATCHES[0]), normal(200, WIDTH, salt=9)
    blocks, expected = depth(graph, [0, 2, 3]), scanned(PARAMS, x)

    def error(params: Any) -> float:
        return float(jnp.square(rebuild(graph, blocks)(shrink(blocks, params), x) - expected).mean())

    plan, repaired = select_in_sequence(graph, PARAMS, {"up": 0.0}, BATCHES, blocks=blocks)
    assert plan == blocks
    assert error(repaired) < 0.5 * error(PARAMS)
    same, _ = select_in_sequence(graph, PARAMS, {"up": 0.0}, BATCHES, target="current")
    assert same.kept == {}


HEADED = {
    "q": normal(3, 8, 8) / 3, "k": normal(3, 8, 4) / 3, "v": normal(3, 8, 4) / 3, "o": normal(3, 8, 8) / 3,
    "up": normal(3, 8, 12) / 3, "down": normal(3, 12, 8) / 3,
}  # fmt: skip


def attend(p: Any, x: Any) -> Any:
    q, k, v = ((x @ p[name]).reshape(*x.shape[:-1], -1, 2) for name in "qkv")  # two heads of queries for one of keys
    k, v = (jnp.repeat(y, 2, axis=-2) for y in (k, v))
    weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
    x = x + jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape[:2] + (-1,)) @ p["o"]
    return x + jnp.tanh(x @ p["up"]) @ p["down"]


def transformer(params: Any, x: Any) -> Any:
    return lax.scan(lambda x, p: (attend(p, x), None), x, params)[0]


@pytest.mark.slow
def test_less_is_lost_in_sequence_and_towards_the_dense_function():
    x, fresh = [normal(8, 10, 8, salt=i) for i in range(3)], normal(32, 10, 8, salt=9)
    graph, names = trace(transformer, HEADED, x[0]), {"*up": 0.5, "*k": 0.5}
    expected = transformer(HEADED, fresh)

    def error(plan: Plan, params: Any) -> float:
        return float(jnp.square(rebuild(graph, plan)(shrink(plan, params), fresh) - expected).mean())

    grams = jaxprune.calibrate_grams(transformer, HEADED, x)
    at_once = select_channels(graph, HEADED, names, grams=grams)
    current, dense = (select_in_sequence(graph, HEADED, names, x, target=target) for target in ("current", "dense"))  # type: ignore[arg-type]
    assert error(*dense) < error(*current) < error(at_once, repair(at_once, HEADED, grams))
    plan, repaired = dense
    assert {len(row) for row in plan.kept["k"][2]} == {2}
    assert {len(row) for row in plan.kept["o"][1]} == {4}
    assert jax.tree.map(jnp.shape, shrink(plan, repaired)) == jax.tree.map(jnp.shape, shrink(at_once, repair(at_once, HEADED, grams)))  # fmt: skip
    assert verify(graph, plan, repaired, fresh)


@pytest.mark.slow
def test_the_first_of_two_readers_of_one_input_chooses_for_both():
    params = {"up": normal(4, 8), "left": normal(8, 3), "right": normal(8, 2)}

    def fn(params: Any, x: Any) -> Any:
        h = jnp.tanh(x @ params["up"])
        return h @ params["left"], h @ params["right"]

    x = normal(60, 4)
    graph, grams = trace(fn, params, x), jaxprune.calibrate_grams(fn, params, [x])
    plan, repaired = select_in_sequence(graph, params, 0.5, [x])
    expected = select_channels(graph, params, 0.5, grams=grams)
    assert plan.kept == expected.kept
    h = np.tanh(np.asarray(x, np.float64) @ np.asarray(params["up"], np.float64))
    kept = list(plan.kept["left"][0])
    for name in ("left", "right"):
        w = np.asarray(params[name], np.float64)
        best = cross_validated(h[:, kept], h @ w, w[kept], np.square(h).sum(0).mean())
        np.testing.assert_allclose(repaired[name][jnp.array(kept)], best, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_experts_have_channels_in_common():
    params = {"in": normal(4, 4), "up": normal(3, 4, 8), "down": normal(3, 8, 5)}

    def fn(params: Any, x: Any) -> Any:
        return jnp.einsum("teh,eho->teo", jnp.tanh(jnp.einsum("ti,eih->teh", jnp.tanh(x @ params["in"]), params["up"])), params["down"])  # fmt: skip

    x = normal(60, 4)
    graph = trace(fn, params, x)
    plan, repaired = select_in_sequence(graph, params, {"up": 0.5}, [x])
    assert (
        plan.kept == select_channels(graph, params, {"up": 0.5}, grams=jaxprune.calibrate_grams(fn, params, [x])).kept
    )
    kept = list(plan.kept["down"][1])
    for expert in range(3):
        inner = np.tanh(np.asarray(x, np.float64) @ np.asarray(params["in"], np.float64))
        h, w = (
            np.tanh(inner @ np.asarray(params["up"][expert], np.float64)),
            np.asarray(params["down"][expert], np.float64),
        )
        expected = ridge(h[:, kept], h @ w, w[kept], 0.01, np.square(h).sum(0).mean())
        np.testing.assert_allclose(repaired["down"][expert, jnp.array(kept)], expected, rtol=1e-3, atol=1e-4)
    assert verify(graph, plan, repaired, x)


@pytest.mark.slow
def test_convolutions_beside_a_shortcut():
    params = {"stem": normal(3, 3, 2, 6) / 3, "first": normal(3, 3, 6, 8) / 4, "bias": normal(8), "second": normal(3, 3, 8, 6) / 4, "head": normal(6, 3)}  # fmt: skip

    def conv(x: Any, kernel: Any) -> Any:
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def fn(params: Any, x: Any) -> Any:
        x = conv(x, params["stem"])
        x = x + conv(jax.nn.relu(conv(x, params["first"]) + params["bias"][None, None, None]), params["second"])
        return x.mean((1, 2)) @ params["head"]

    x = [normal(16, 5, 5, 2, salt=i) for i in range(2)]
    graph, grams = trace(fn, params, x[0]), jaxprune.calibrate_grams(fn, params, x)
    plan, repaired = select_in_sequence(graph, params, {"first": 0.5}, x)
    # Nothing is cut before, so that both aim at what the kernel computes.
    at_once = select_channels(graph, params, {"first": 0.5}, grams=grams)
    assert plan.kept == at_once.kept
    np.testing.assert_allclose(repaired["second"], repair(at_once, params, grams)["second"], rtol=0.05, atol=0.02)
    assert verify(graph, plan, repaired, x[0])
    with pytest.raises(ValueError, match=r"second.3. cannot be chosen where they are read: first and head read them at different places"):  # fmt: skip
        select_in_sequence(graph, params, 0.5, x)


def test_bad_input():
    graph = trace(scanned, PARAMS, BATCHES[0])
    with pytest.raises(ValueError, match='takes target="dense" or "current", not \'middle\''):
        select_in_sequence(graph, PARAMS, NAMES, BATCHES, target="middle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no calibration batch"):
        select_in_sequence(graph, PARAMS, NAMES, [])
    with pytest.raises(ValueError, match=r"batches\[1\]\[0\] is float32\[4, 6\]"):
        select_in_sequence(graph, PARAMS, NAMES, [BATCHES[0], normal(4, 6)])
    with pytest.raises(ValueError, match="k names 'below', which computes no channels"):
        select_in_sequence(graph, PARAMS, {"below": 0.5}, BATCHES)
    channels = select_channels(graph, PARAMS, NAMES)
    with pytest.raises(ValueError, match=r"blocks is to drop layers or branches, but it cuts channels: up\[2\]"):
        select_in_sequence(graph, PARAMS, NAMES, BATCHES, blocks=channels)
    with pytest.raises(ValueError, match=r"What meets params\['down'\] is NaN or infinite"):
        select_in_sequence(graph, PARAMS, NAMES, [BATCHES[0].at[0, 0].set(jnp.nan)])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda p, h: lax.fori_loop(0, 2, lambda _, y: jnp.tanh(y + h @ p["down"]), jnp.zeros((40, 4))),
            "down is read more than once, in a loop",
        ),
        (lambda p, h: jnp.tanh(h @ p["down"]) + jnp.square(h) @ p["down"], "down is read more than once"),
        (lambda p, h: h.sum(1), "no parameter sums over them"),
    ],
)
def test_groups_that_are_not_read_at_one_place(change: Any, reason: str):
    params = {"up": normal(WIDTH, 8), "down": normal(8, 4)}
    fn = lambda p, x: change(p, jnp.tanh(x @ p["up"]))  # noqa: E731
    with pytest.raises(ValueError, match=f"The channels of up.1. cannot be chosen where they are read: {reason}"):
        select_in_sequence(trace(fn, params, BATCHES[0]), params, {"up": 0.5}, BATCHES)
