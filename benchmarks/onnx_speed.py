"""What cutting channels is worth in onnxruntime: the time of a network beside that of its smaller self, by one thread.

    .ci/interop onnx              # once, to see that it works; then, in an environment with jax2onnx and onnxruntime,
    python -m benchmarks.onnx_speed

A CNN with poolings, a ResNet with batch norms and a transformer, at random weights: half of the channels of every group is cut.
Both are written by `export.save_onnx` and run in turn, in an order shuffled for each round; the ratio is the median over rounds.
Beside it: the ratio of the multiply-adds, and the transformer rounded to 8 bits by onnxruntime's quantiser, with the share of its
pruned weights (half of every kernel, by magnitude) that are still zero.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from rich.console import Console
from rich.table import Table

import jaxprune
from benchmarks import timing
from jaxprune import export, rules, structured

WIDTH, IMAGE, TOKENS = 64, 32, 128


class CNN(nn.Module):
    """Convolutions, each before a pooling."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images to logits."""
        for features in (WIDTH, 2 * WIDTH, 4 * WIDTH):
            x = nn.max_pool(nn.relu(nn.Conv(features, (3, 3))(x)), (2, 2), strides=(2, 2))
        return nn.Dense(10)(nn.relu(nn.Dense(4 * WIDTH)(x.reshape(len(x), -1))))


class ResNet(nn.Module):
    """Three stages of two blocks."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images to logits."""
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = nn.relu(norm()(nn.Conv(WIDTH, (3, 3), use_bias=False)(x)))
        for features, strides in (
            (WIDTH, 1),
            (WIDTH, 1),
            (2 * WIDTH, 2),
            (2 * WIDTH, 1),
            (4 * WIDTH, 2),
            (4 * WIDTH, 1),
        ):
            y = nn.relu(norm()(nn.Conv(features, (3, 3), (strides,) * 2, use_bias=False)(x)))
            y = norm()(nn.Conv(features, (3, 3), use_bias=False)(y))
            if x.shape != y.shape:
                x = norm()(nn.Conv(features, (1, 1), (strides,) * 2, use_bias=False)(x))
            x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


class Transformer(nn.Module):
    """Four blocks without a table."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [batch, time, width] to the same shape."""
        for _ in range(4):
            h = nn.LayerNorm()(x)
            x += nn.MultiHeadDotProductAttention(8)(h)
            h = nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x))
            x += nn.Dense(x.shape[-1])(nn.gelu(h))
        return x


NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "CNN": (CNN(), (1, IMAGE, IMAGE, 3)),
    "ResNet": (ResNet(), (1, IMAGE, IMAGE, 3)),
    "transformer": (Transformer(), (1, TOKENS, 4 * WIDTH)),
}


def session(path: Path) -> Any:
    """Open a file to run on one thread."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def runner(path: Path, x: np.ndarray, times: int) -> Callable[[], Any]:
    """Return a function that runs a file several times."""
    opened = session(path)
    return lambda: [opened.run(None, {"input_0": x}) for _ in range(times)]


def measure(name: str, repeats: int, folder: Path) -> dict[str, Any]:
    """Write a network and its smaller self, and time them side by side."""
    module, shape = NETWORKS[name]
    x = jax.random.normal(jax.random.key(0), shape)
    params = module.init(jax.random.key(1), x)
    graph = structured.trace(module.apply, params, x)
    plan = structured.select_channels(graph, params, 0.5, round_to=8)
    small, small_fn = structured.shrink(plan, params), structured.rebuild(graph, plan)
    dense_path = export.save_onnx(folder / "dense.onnx", module.apply, params, x, force=True)
    small_path = export.save_onnx(folder / "small.onnx", small_fn, small, x, force=True)
    expected, (found,) = small_fn(small, x), session(small_path).run(None, {"input_0": np.asarray(x)})
    macs = structured.count_macs(graph), structured.count_macs(graph, plan)
    runs = {kind: runner(path, np.asarray(x), 10) for kind, path in (("dense", dense_path), ("smaller", small_path))}
    rows = timing.compare(runs, repeats)
    return {
        "network": name,
        "error": float(np.abs(found - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max()),
        "macs_ratio": macs[0] / macs[1],
        "time_ratio": 1 / rows[1].cpu_ratio,
        "control": rows[-1].cpu_ratio,
        "milliseconds": [100 * row.wall for row in rows[:2]],
    }


def quantised(folder: Path) -> dict[str, float]:
    """Prune the transformer by magnitude, round it by onnxruntime's quantiser; return how many zeros stay zeros."""
    import onnx
    from onnxruntime.quantization import quantize_dynamic

    module, shape = NETWORKS["transformer"]
    x = jax.random.normal(jax.random.key(0), shape)
    params = module.init(jax.random.key(1), x)
    params = jaxprune.apply_masks(params, jaxprune.make_masks(params, 0.5, rule=rules.layer_sparsity))
    path = export.save_onnx(folder / "masked.onnx", module.apply, params, x, force=True)
    quantize_dynamic(path, folder / "int8.onnx")
    tensors = {
        tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(folder / "int8.onnx").graph.initializer
    }
    before = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    zeros = kept = 0
    for name, codes in tensors.items():
        origin = name.removesuffix("_quantized")
        if origin != name and origin in before:
            zero = tensors[origin + "_zero_point"]
            pruned = before[origin] == 0
            zeros += int(pruned.sum())
            kept += int((codes == zero)[pruned].sum())
    (found,), (expected,) = (session(p).run(None, {"input_0": np.asarray(x)}) for p in (folder / "int8.onnx", path))
    return {
        "pruned": zeros,
        "still_zero": kept,
        "bytes_ratio": path.stat().st_size / (folder / "int8.onnx").stat().st_size,
        "error": float(np.abs(found - expected).max() / np.abs(expected).max()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure every network, show the table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write every number here")
    options = parser.parse_args(arguments)
    console = Console()
    shown = Table("network", "dense, ms", "smaller, ms", "times faster", "fewer multiply-adds", "share", "A/A", "error")
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(name, options.repeats, Path(folder)) for name in options.networks]
        integers = quantised(Path(folder))
    for row in rows:
        dense, smaller = row["milliseconds"]
        shown.add_row(
            row["network"], f"{dense:.2f}", f"{smaller:.2f}", f"{row['time_ratio']:.2f}", f"{row['macs_ratio']:.2f}",
            f"{row['time_ratio'] / row['macs_ratio']:.2f}", f"{row['control']:.2f}", f"{row['error']:.0e}",
        )  # fmt: skip
    console.print(shown)
    console.print(
        f"8 bits: {integers['still_zero']:,} of {integers['pruned']:,} pruned weights are zero, {integers['bytes_ratio']:.2f} times fewer "
        f"bytes, error {integers['error']:.0e}"
    )
    timing.write_json(options.json, {"networks": rows, "int8": integers})


if __name__ == "__main__":
    main()
