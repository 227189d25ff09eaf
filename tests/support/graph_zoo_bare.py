"""The zoo's bare functions: every way a parameter may take on its way to the data."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.support.graph_zoo_frameworks import Case, f64, normal, rows


def fused_split() -> Case:
    params = {"qkv": normal(4, 18), "out": normal(6, 3)}
    x = normal(5, 4)

    def fn(params: Any, x: Any) -> Any:
        q, k, v = jnp.split(params["qkv"], 3, axis=1)
        return (jnp.tanh(x @ q) * (x @ k) + x @ v) @ params["out"]

    q, k, v = np.split(f64(params["qkv"]), 3, axis=1)
    y = np.tanh(f64(x) @ q) * (f64(x) @ k) + f64(x) @ v
    return Case(fn, params, (x,), {"qkv": [rows(x)] * 3, "out": [rows(y)]})


def unstacked() -> Case:
    params = {"w": normal(2, 8, 8)}
    x = normal(5, 8)

    def fn(params: Any, x: Any) -> Any:
        first, second = jnp.unstack(params["w"])
        return jnp.tanh(x @ first) @ second

    return Case(fn, params, (x,), {"w": [rows(x), rows(np.tanh(f64(x) @ f64(params["w"])[0]))]})


def concatenated() -> Case:
    params = {"a": normal(4, 2), "b": normal(4, 3), "c": normal(3, 5), "d": normal(2, 5, salt=1)}
    x = normal(6, 4)

    def fn(params: Any, x: Any) -> Any:
        y = x @ jnp.concatenate([params["a"], params["b"]], axis=1)
        return y @ jnp.concatenate([params["c"], params["d"]])

    y = f64(x) @ np.concatenate([f64(params["a"]), f64(params["b"])], axis=1)
    met = {"a": [rows(x)], "b": [rows(x)], "c": [rows(y[:, :3])], "d": [rows(y[:, 3:])]}
    return Case(fn, params, (x,), met)


def experts() -> Case:
    params = {"up": normal(3, 4, 6)}
    x = normal(3, 5, 4)
    return Case(lambda p, x: jnp.einsum("etd,edf->etf", x, p["up"]), params, (x,), {"up": [f64(x)]})


def experts_einsum() -> Case:
    params = {"up": normal(4, 6, 3)}
    x = normal(5, 3, 4)
    met = {"up": [f64(x).transpose(1, 0, 2)]}
    return Case(lambda p, x: jnp.einsum("ted,dfe->tef", x, p["up"]), params, (x,), met)


def ragged() -> Case:
    params = {"up": normal(3, 4, 6)}
    x, sizes = normal(9, 4), jnp.array([4, 0, 3])
    met = np.zeros((3, 9, 4))
    met[0, :4], met[2, :3] = f64(x[:4]), f64(x[4:7])
    return Case(lambda p, x, sizes: lax.ragged_dot(x, p["up"], sizes), params, (x, sizes), {"up": [met]})


def vmapped_ensemble() -> Case:
    params = {"w": normal(3, 4, 2)}
    x = normal(5, 4)
    fn = lambda p, x: jax.vmap(lambda w: x @ w)(p["w"])  # noqa: E731
    # vmap puts the members among the outputs: all of them see the same data.
    return Case(fn, params, (x,), {"w": [rows(x)]})


def conditional() -> Case:
    params = {"a": normal(4, 3), "b": normal(4, 3, salt=1)}
    x = jnp.abs(normal(5, 4))

    def fn(params: Any, x: Any) -> Any:
        return lax.cond(x.sum() > 0, lambda x: x @ params["a"], lambda x: (2 * x) @ params["b"], x)

    return Case(fn, params, (x,), {"a": [rows(x)], "b": [np.zeros((1, 0, 4))]})


def indexed() -> Case:
    params = {"w": normal(3, 8, 8) / 3}
    x = normal(5, 8)
    h, seen = f64(x), []
    for w in f64(params["w"]):
        seen.append(h)
        h = np.tanh(h @ w)
    fn = lambda p, x: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p["w"][i]), x)  # noqa: E731
    return Case(fn, params, (x,), {"w": [np.stack(seen)]})


def chosen_by_data() -> Case:
    params = {"w": normal(3, 4, 2)}
    x, which = normal(5, 4), jnp.int32(1)
    met = np.zeros((3, 5, 4))
    met[1] = f64(x)
    return Case(lambda p, x, which: x @ p["w"][which], params, (x, which), {"w": [met]})


def nested_scans() -> Case:
    params = {"w": normal(2, 3, 8, 8) / 3, "shared": normal(8, 8) / 3}
    x = normal(5, 8)

    def fn(params: Any, x: Any) -> Any:
        def outer(h: Any, w: Any) -> Any:
            return lax.scan(lambda h, w: (jnp.tanh(jnp.tanh(h @ w) @ params["shared"]), None), h, w)[0], None

        return lax.scan(outer, x, params["w"])[0]

    h, own, shared = f64(x), [], []
    for w in f64(params["w"]).reshape(6, 8, 8):
        own.append(h)
        h = np.tanh(h @ w)
        shared.append(h)
        h = np.tanh(h @ f64(params["shared"]))
    return Case(fn, params, (x,), {"w": [np.stack(own)], "shared": [rows(np.stack(shared))]})


def while_loop() -> Case:
    params = {"w": normal(8, 8) / 3}
    x = normal(5, 8)

    def fn(params: Any, x: Any) -> Any:
        step = lambda state: (state[0] + 1, jnp.tanh(state[1] @ params["w"]))  # noqa: E731
        return lax.while_loop(lambda state: state[0] < 3, step, (0, x))[1]

    h, seen = f64(x), []
    for _ in range(3):
        seen.append(h)
        h = np.tanh(h @ f64(params["w"]))
    return Case(fn, params, (x,), {"w": [rows(np.stack(seen))]})


def carried_params() -> Case:
    params = {"w": normal(8, 8) / 3}
    x = normal(5, 8)

    def fn(params: Any, x: Any) -> Any:
        return lax.fori_loop(0, 2, lambda _, state: (state[0], jnp.tanh(state[1] @ state[0])), (params["w"], x))[1]

    return Case(fn, params, (x,), {"w": [rows(np.stack([f64(x), np.tanh(f64(x) @ f64(params["w"]))]))]})


def used_twice() -> Case:
    params = {"w": normal(8, 8) / 3, "v": normal(8, 8, salt=1)}
    x = normal(5, 8)

    def fn(params: Any, x: Any) -> Any:
        h = jnp.tanh(x @ params["w"])
        return h @ params["w"] + h @ params["v"]

    h = np.tanh(f64(x) @ f64(params["w"]))
    return Case(fn, params, (x,), {"w": [np.concatenate([rows(x), rows(h)], 1)], "v": [rows(h)]})


def modified() -> Case:
    params = {"masked": normal(4, 3), "v": normal(3, 5), "g": jnp.ones(5), "clipped": normal(5, 2)}
    x = normal(6, 4)
    mask = params["masked"] > 0

    def fn(params: Any, x: Any) -> Any:
        y = x @ jnp.where(mask, params["masked"], 0)
        y = y @ (params["g"][None] * params["v"] / jnp.linalg.norm(params["v"], axis=0, keepdims=True))
        return y @ jnp.round(jnp.clip(params["clipped"], -1, 1) * 7).astype(jnp.float32)

    y = f64(x) @ np.where(np.asarray(mask), f64(params["masked"]), 0)
    z = y @ (f64(params["v"]) / np.linalg.norm(f64(params["v"]), axis=0))
    return Case(fn, params, (x,), {"masked": [rows(x)], "v": [rows(y)], "clipped": [rows(z)]})


def custom_derivatives() -> Case:
    @jax.custom_vjp
    def multiply(x: Any, w: Any) -> Any:
        return x @ w

    multiply.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))

    @jax.custom_jvp
    def square(x: Any, w: Any) -> Any:
        return jnp.square(x) @ w

    square.defjvp(lambda primals, tangents: (square(*primals), square(*tangents)))
    params = {"a": normal(4, 3), "b": normal(3, 2)}
    x = normal(5, 4)
    met = {"a": [rows(x)], "b": [rows(np.square(f64(x) @ f64(params["a"])))]}
    return Case(lambda p, x: square(jax.jit(multiply)(x, p["a"]), p["b"]), params, (x,), met)


def weight_layouts() -> Case:
    params = {"w": normal(2, 3, 4), "t": normal(5, 8)}
    x = normal(6, 3)

    def fn(params: Any, x: Any) -> Any:
        y = x @ jnp.flip(lax.stop_gradient(params["w"]).transpose(1, 0, 2).reshape(3, 8)[:, ::2], 1)
        return jnp.concatenate([y, y], 1) @ params["t"].T

    w = f64(params["w"]).transpose(1, 0, 2).reshape(3, 8)[:, ::2][:, ::-1]
    y = f64(x) @ w
    return Case(fn, params, (x,), {"w": [rows(x)], "t": [rows(np.concatenate([y, y], 1))]})


def learned_query() -> Case:
    """Attention of queries that are parameters, repeated for every sample: what they are projected by multiplies them."""
    params = {"query": normal(1, 3, 4), "scale": normal(4), "q": normal(4, 5), "k": normal(6, 5, salt=1)}
    x = normal(2, 7, 6)

    def fn(params: Any, x: Any) -> Any:
        query = jnp.tile(params["query"], (2, 1, 1)) * params["scale"][None, None]
        return jnp.einsum("bqd,btd->bqt", query @ params["q"], x @ params["k"])

    query = np.tile(f64(params["query"]) * f64(params["scale"]), (2, 1, 1))
    return Case(fn, params, (x,), {"q": [rows(query)], "k": [rows(x)]})


def scaled_by_einsum() -> Case:
    """An einsum that sums nothing is a scale, of data or of weights; of depthwise ones it sums the window."""
    params = {"scale": normal(4), "gain": normal(3), "w": normal(4, 3), "depth": normal(2, 3), "out": normal(3, 5)}
    x = normal(6, 4)

    def fn(params: Any, x: Any) -> Any:
        y = jnp.einsum("td,d->td", x, params["scale"]) @ jnp.einsum("io,o->io", params["w"], params["gain"])
        y = jnp.einsum("tkd,kd->td", jnp.stack([y, jnp.tanh(y)], 1), params["depth"])
        return jnp.einsum("to,o->to", y, jnp.ones(3)) @ params["out"]

    scaled = f64(x) * f64(params["scale"])
    y = scaled @ (f64(params["w"]) * f64(params["gain"]))
    taps = np.stack([y, np.tanh(y)], 1)
    out = np.einsum("tkd,kd->td", taps, f64(params["depth"]))
    return Case(fn, params, (x,), {"w": [rows(scaled)], "depth": [taps.transpose(2, 0, 1)], "out": [rows(out)]})


def stacked_here() -> Case:
    """Parameters that the function joins, and takes apart again."""
    shapes = {"a": (4, 3), "b": (4, 3), "c": (4, 2), "d": (4, 4), "e": (2, 3), "f": (3, 3), "g": (3, 2), "h": (3, 2)}
    params = {name: normal(*shape, salt=salt) for salt, (name, shape) in enumerate(shapes.items())}
    x = normal(6, 4)

    def fn(params: Any, x: Any) -> Any:
        p = params
        both = jnp.einsum("td,sde->ste", x, jnp.stack([p["a"], p["b"]]))
        fused = jnp.concatenate([p["c"], p["d"]], 1)  # 2 and 4 outputs
        left, right = jnp.split(jnp.flip(fused, 1), [4], axis=1)
        y = (x @ left.reshape(4, 2, 2)[:, ::-1].reshape(4, 4)).sum(1) + (x @ right).sum(1)
        z = jnp.concatenate([both[0][:, :2], both[1]], 1) @ jnp.concatenate([p["e"], p["f"]])  # 2 and 3 inputs
        pair = jnp.stack([p["g"], p["h"]], axis=1)  # [3, 2, 2]
        w = jnp.einsum("nti,nio->nto", jnp.stack([z, 2 * z]), pair.transpose(1, 0, 2))
        return w + y[None, :, None]

    a, b = f64(x) @ f64(params["a"]), f64(x) @ f64(params["b"])
    z = a[:, :2] @ f64(params["e"]) + b @ f64(params["f"])
    met = {
        **{name: [rows(x)] for name in "abcd"},
        "e": [rows(a[:, :2])],
        "f": [rows(b)],
        "g": [rows(z)],
        "h": [rows(2 * z)],
    }
    return Case(fn, params, (x,), met)


def codebooks() -> Case:
    """Vector quantisation by one codebook for each half: distances, rows that data chooses, then by one-hot vectors."""
    params = {"books": normal(2, 5, 3), "out": normal(6, 4), "book": normal(7, 4)}
    x = normal(8, 6)

    def fn(params: Any, x: Any) -> Any:
        halves = x.reshape(8, 2, 3)
        distance = jnp.square(halves[:, :, None] - params["books"][None]).sum(-1)
        chosen = jax.vmap(lambda book, code: book[code], (0, 1), 1)(params["books"], distance.argmin(-1))
        y = chosen.reshape(8, 6) @ params["out"]
        return jax.nn.one_hot(jnp.argmax(y @ params["book"].T, 1), 7) @ params["book"]

    halves, books = f64(x).reshape(8, 2, 3), f64(params["books"])
    codes = np.square(halves[:, :, None] - books).sum(-1).argmin(-1)
    chosen = np.stack([books[half, codes[:, half]] for half in range(2)], 1).reshape(8, 6)
    y = chosen @ f64(params["out"])
    one_hot = np.eye(7)[(y @ f64(params["book"]).T).argmax(1)]
    met = {"books": [np.eye(5)[codes.T]], "out": [rows(chosen)], "book": [rows(y), rows(one_hot)]}
    return Case(fn, params, (x,), met)
