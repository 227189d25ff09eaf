"""What real size costs before anything runs: memory on a large mesh, and the first call for many layers.

    python -m benchmarks.scale memory
    python -m benchmarks.scale first

Two measurements without the arrays of a large model. `memory` compiles jitted `make_masks` and a training step's
update for a language model of 68.7 thousand million bfloat16 parameters (80 layers, 8,192 wide) whose layers are stacked,
over 256 simulated CPU devices, and reports the temporary bytes a device by the compiler's own analysis. `first` traces,
lowers and compiles `make_masks` for 300 layers of 10 shapes and reports the CPU seconds of each stage, then of an eager
first and second call. Nothing is read from a compilation cache.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

import jaxprune
from benchmarks import timing
from jaxprune import rules

RULES: dict[str, Any] = {
    "std": rules.std_threshold,
    "mean": rules.mean_threshold,
    "layer": rules.layer_sparsity,
    "erk": rules.erk_sparsity,
    "global": rules.global_sparsity,
}
SHARDED_BY_THE_INPUTS = PartitionSpec(None, "fsdp", "tp")
SHARDED_BY_THE_OUTPUTS = PartitionSpec(None, "tp", "fsdp")


def language_model(width: int, depth: int, mesh: Any) -> Any:
    """Return the shapes of a decoder's stacked layers and of its table, in bfloat16, sharded over all devices."""

    def leaf(shape: tuple[int, ...], spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    inner, heads = width * 7 // 2, width // 8
    shapes = {
        "q_proj": (width, width, SHARDED_BY_THE_INPUTS),
        "k_proj": (width, heads, SHARDED_BY_THE_INPUTS),
        "v_proj": (width, heads, SHARDED_BY_THE_INPUTS),
        "o_proj": (width, width, SHARDED_BY_THE_OUTPUTS),
        "gate_proj": (width, inner, SHARDED_BY_THE_INPUTS),
        "up_proj": (width, inner, SHARDED_BY_THE_INPUTS),
        "down_proj": (inner, width, SHARDED_BY_THE_OUTPUTS),
    }
    layers = {
        name: {"kernel": leaf((depth, inputs, outputs), spec)} for name, (inputs, outputs, spec) in shapes.items()
    }
    return {"layers": layers, "embed": {"embedding": leaf((4 * width, width), PartitionSpec("fsdp", "tp"))}}


def memory(width: int, depth: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """Compile each rule, and a step of Adam with `keep_pruned`, for the sharded model."""
    devices = len(jax.devices())
    shape = (devices // 8, 8) if devices % 8 == 0 else (devices, 1)
    mesh = jax.make_mesh(shape, ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    params = language_model(width, depth, mesh)
    own = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)) / devices
    masks = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, bool, sharding=leaf.sharding), params)

    def made_by(rule: Any) -> Callable[..., Any]:
        return lambda params, k: jaxprune.make_masks(params, k, rule=rule, stacked="layers")

    cases: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        name: (made_by(RULES[name]), (params, jnp.float32(0.5))) for name in names
    }
    for name, tx in {"adam": optax.adam(1e-3), "adam, keep_pruned": None}.items():
        # The masks are arguments of init, so that they are shapes here too.
        cases[name] = (_step(tx), (params, params, masks))
    results = []
    for name, (function, arguments) in cases.items():
        start, cpu = time.perf_counter(), time.process_time()
        analysis = jax.jit(function, donate_argnums=0).lower(*arguments).compile().memory_analysis()
        results.append(
            {
                "case": name,
                "parameters_bytes": own,
                "temporary_bytes": analysis.temp_size_in_bytes,
                "share": analysis.temp_size_in_bytes / own,
                "compile_wall": time.perf_counter() - start,
                "compile_cpu": time.process_time() - cpu,
            }
        )
    return results


def _step(plain: optax.GradientTransformation | None) -> Callable[..., Any]:
    def step(params: Any, grads: Any, masks: Any) -> Any:
        tx = plain or optax.chain(optax.adam(1e-3), jaxprune.keep_pruned(masks))
        updates, state = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates), state

    return step


def first_calls(layers: int, shapes: int, names: Sequence[str]) -> list[dict[str, Any]]:
    """Measure each rule for so many layers of so many shapes."""
    rng = np.random.default_rng(0)
    params = {
        f"layer_{i}": {"kernel": jnp.asarray(rng.normal(size=(256 + 16 * (i % shapes), 512)), jnp.float32)}
        for i in range(layers)
    }
    results = []
    for name in names:

        def masks(params: Any, k: Any, rule: Any = RULES[name]) -> Any:
            return jaxprune.make_masks(params, k, rule=rule)

        times = [time.process_time()]
        traced = jax.jit(masks).trace(params, jnp.float32(0.5))
        times.append(time.process_time())
        lowered = traced.lower()
        times.append(time.process_time())
        compiled = lowered.compile()
        times.append(time.process_time())
        jax.block_until_ready(compiled(params, jnp.float32(0.5)))
        times.append(time.process_time())
        jax.block_until_ready(compiled(params, jnp.float32(0.5)))
        times.append(time.process_time())
        for _ in range(2):
            jax.block_until_ready(masks(params, 0.5))
            times.append(time.process_time())
        stages = ("trace", "lower", "compile", "", "jit", "eager_first", "eager_second")
        spans = dict(zip(stages, np.diff(times).tolist(), strict=True))
        results.append({"rule": name, **{stage: spans[stage] for stage in stages if stage}})
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure, show tables, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "first"))
    parser.add_argument("--rules", nargs="+", choices=list(RULES), default=list(RULES), help="(default: all)")
    parser.add_argument("--devices", type=int, default=256, help="to simulate; 0: as many as there are")
    parser.add_argument("--width", type=int, default=8192, help="of the language model, a multiple of 64")
    parser.add_argument("--depth", type=int, default=80, help="its layers")
    parser.add_argument("--layers", type=int, default=300, help="of the first call")
    parser.add_argument("--shapes", type=int, default=10, help="of these layers")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    if options.what == "first":
        results = first_calls(options.layers, options.shapes, options.rules)
        title = f"first calls, {options.layers} layers of {options.shapes} shapes, CPU seconds"
    else:
        if options.devices:
            jax.config.update("jax_num_cpu_devices", options.devices)
        results = memory(options.width, options.depth, options.rules)
        title = f"memory a device, {len(jax.devices())} devices"
    _show(Console(), title, results)
    timing.write_json(options.json, results)


def _show(console: Console, title: str, rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:,.3g}" for value in row.values()))
    console.print(table)


if __name__ == "__main__":
    main()
