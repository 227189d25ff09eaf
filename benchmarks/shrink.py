"""A smaller model against the dense one: how much faster than how many fewer multiply-accumulates, in JAX and torch.

    python -m benchmarks.shrink

Half the channels of a ResNet-18, half the heads and hidden units of a transformer, half the channels of the CNN of the
examples. For each the dense function, the rebuilt smaller one, and the same function written at the smaller widths
("native": what XLA makes of these shapes). Where torch-pruning is installed it cuts the same networks in torch.
Speed-ups are medians over rounds of ratios within a round, in wall time, each against the dense one of its framework.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from rich.console import Console

from benchmarks import timing
from jaxprune import structured

Tree = Any


class Network(NamedTuple):
    """A function that reads its widths from its parameters, so that it is native at every width."""

    fn: Callable[[Tree, jax.Array], jax.Array]
    params: Tree
    x: jax.Array
    sparsity: float | dict[str, float]


def _normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    scale = math.sqrt(2 / math.prod(shape[:-1])) if len(shape) > 1 else 1.0
    return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)


def _convolve(x: jax.Array, kernel: jax.Array, strides: int = 1) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (strides,) * 2, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _pool(x: jax.Array) -> jax.Array:
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def cnn(size: int, batch: int) -> Network:
    """Two convolutions, each pooled, and two dense layers, as in the examples."""
    rng = np.random.default_rng(0)
    places = (size // 4) ** 2
    kernels = {
        "a": (3, 3, 3, 32), "b": (3, 3, 32, 64), "c": (places * 64, 100), "d": (100, 10),
    }  # fmt: skip
    params = {name: {"w": _normal(rng, *shape), "b": _normal(rng, shape[-1])} for name, shape in kernels.items()}

    def fn(params: Tree, x: jax.Array) -> jax.Array:
        for name in "ab":
            x = _pool(jax.nn.relu(_convolve(x, params[name]["w"]) + params[name]["b"][None, None, None]))
        x = jax.nn.relu(x.reshape(len(x), -1) @ params["c"]["w"] + params["c"]["b"][None])
        return x @ params["d"]["w"] + params["d"]["b"][None]

    return Network(fn, params, _normal(rng, batch, size, size, 3), 0.5)


STAGES = ((1, 1), (2, 2), (4, 2), (8, 2))  # width, stride of the first of two blocks


def resnet18(size: int, batch: int, width: int) -> Network:
    """The ResNet-18 of small images: a 3 x 3 stem, four stages of two blocks, norms as scale and offset."""
    rng = np.random.default_rng(0)

    def convolution(window: int, ins: int, outs: int) -> Tree:
        return {"w": _normal(rng, window, window, ins, outs), "scale": jnp.ones(outs), "offset": _normal(rng, outs)}

    params: Tree = {"stem": convolution(3, 3, width), "blocks": []}
    ins = width
    for factor, strides in STAGES:
        for number in range(2):
            outs = width * factor
            block = {"a": convolution(3, ins, outs), "b": convolution(3, outs, outs)}
            if number == 0 and (strides != 1 or ins != outs):
                block["skip"] = convolution(1, ins, outs)
            params["blocks"].append(block)
            ins = outs
    params["head"] = _normal(rng, ins, 10)

    def layer(x: jax.Array, p: Tree, strides: int = 1) -> jax.Array:
        scale, offset = (p[name][None, None, None] for name in ("scale", "offset"))
        return _convolve(x, p["w"], strides) * scale + offset

    def fn(params: Tree, x: jax.Array) -> jax.Array:
        x = jax.nn.relu(layer(x, params["stem"]))
        for number, block in enumerate(params["blocks"]):
            strides = STAGES[number // 2][1] if number % 2 == 0 else 1
            y = layer(jax.nn.relu(layer(x, block["a"], strides)), block["b"])
            x = jax.nn.relu(y + (layer(x, block["skip"], strides) if "skip" in block else x))
        return x.mean((1, 2)) @ params["head"]

    return Network(fn, params, _normal(rng, batch, size, size, 3), 0.5)


def transformer(layers: int, batch: int, width: int, length: int) -> Network:
    """Blocks of attention, eight heads, and a hidden layer of four times the width; the stream stays."""
    rng = np.random.default_rng(0)
    heads, size = 8, width // 8
    params = [
        {
            **{name: _normal(rng, width, heads, size) / math.sqrt(size) for name in ("q", "k", "v")},
            "o": _normal(rng, heads, size, width) / math.sqrt(heads),
            "up": _normal(rng, width, 4 * width),
            "down": _normal(rng, 4 * width, width),
        }
        for _ in range(layers)
    ]

    def norm(x: jax.Array) -> jax.Array:
        return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)

    def fn(params: Tree, x: jax.Array) -> jax.Array:
        for p in params:
            q, k, v = (jnp.einsum("btd,dhe->bhte", norm(x), p[name]) for name in ("q", "k", "v"))
            weights = jax.nn.softmax(jnp.einsum("bhqe,bhke->bhqk", q, k) / math.sqrt(q.shape[-1]))
            x = x + jnp.einsum("bhqe,hed->bqd", jnp.einsum("bhqk,bhke->bhqe", weights, v), p["o"])
            x = x + jax.nn.gelu(norm(x) @ p["up"]) @ p["down"]
        return x

    return Network(fn, params, _normal(rng, batch, length, width), 0.5)


def measure(name: str, network: Network, round_to: int, repeats: int, console: Console) -> dict[str, Any]:
    """Cut one network in JAX, time it, show and return the results."""
    graph = structured.trace(network.fn, network.params, network.x)
    plan = structured.select_channels(graph, network.params, network.sparsity, round_to=round_to)
    small = structured.shrink(plan, network.params)
    error = max(output.difference for output in structured.verify(graph, plan, network.params, network.x).outputs)
    dense_fn, small_fn, native_fn = jax.jit(network.fn), structured.rebuild(graph, plan), jax.jit(network.fn)
    native = jax.tree.map(jnp.array, small)
    variants = {
        "dense": lambda: jax.block_until_ready(dense_fn(network.params, network.x)),
        "smaller": lambda: jax.block_until_ready(small_fn(small, network.x)),
        "native": lambda: jax.block_until_ready(native_fn(native, network.x)),
    }
    rows = timing.compare(variants, repeats)
    macs = structured.count_macs(graph) / structured.count_macs(graph, plan)
    sizes = structured.count_parameters(graph) / structured.count_parameters(graph, plan)
    ratios = {row.variant: row.wall_ratio for row in rows}
    result = {
        "network": name, "framework": "jax", "macs": macs, "parameters": sizes, "error": error,
        "speedup": 1 / ratios["smaller"], "native_over_smaller": ratios["native"] / ratios["smaller"],
        "rows": [row._asdict() for row in rows],
    }  # fmt: skip
    title = f"{name} in JAX: {macs:.2f} x fewer MACs, {sizes:.2f} x fewer parameters, {result['speedup']:.2f} x as fast"
    console.print(timing.table(title, rows))
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure the networks, show tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("cnn", "resnet18", "transformer")
    parser.add_argument("--networks", nargs="+", choices=names, default=list(names), help="(default: all)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--size", type=int, default=32, help="of the images")
    parser.add_argument("--width", type=int, default=64, help="of the ResNet's first stage")
    parser.add_argument("--layers", type=int, default=4, help="of the transformer")
    parser.add_argument("--model-width", type=int, default=256, help="of the transformer")
    parser.add_argument("--length", type=int, default=64, help="tokens of the transformer")
    parser.add_argument("--round-to", type=int, default=1, help="widths are multiples of it")
    parser.add_argument("--repeats", type=int, default=21, help="rounds")
    parser.add_argument("--no-torch", action="store_true", help="measure JAX alone")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    console = Console()
    networks = {
        "cnn": lambda: cnn(options.size, 8 * options.batch_size),
        "resnet18": lambda: resnet18(options.size, options.batch_size, options.width),
        "transformer": lambda: transformer(options.layers, options.batch_size, options.model_width, options.length),
    }
    results = []
    for name in options.networks:
        results.append(measure(name, networks[name](), options.round_to, options.repeats, console))
        if not options.no_torch and (found := _torch(name, options, console)) is not None:
            results.append(found)
    timing.write_json(options.json, results)


def _torch(name: str, options: argparse.Namespace, console: Console) -> dict[str, Any] | None:
    try:
        from benchmarks import shrink_torch
    except ImportError as error:
        console.print(f"torch is left out: {error}")
        return None
    return shrink_torch.measure(name, options, console)


if __name__ == "__main__":
    main()
