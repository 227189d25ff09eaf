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
