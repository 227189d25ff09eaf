"""What a table of measured times predicts of smaller networks, beside what these take.

    python -m benchmarks.predicted_times

The CNN of the examples and a transformer. Each group of channels is measured at a few widths (`structured.measure_times`); widths
are allocated to budgets of that time, by prices that grow with the square of the share that goes; then the smaller network is timed
in turns with the whole one. Errors are shares of what was measured; where counts alone predicted, the time would fall as the
multiply-accumulates.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from benchmarks import shrink, timing
from jaxprune import structured


def cpu_seconds(fn: Callable[..., Any], *arguments: Any) -> float:
    """Return the CPU time of a call, after one that is not timed."""
    jax.block_until_ready(fn(*arguments))
    start = time.process_time()
    jax.block_until_ready(fn(*arguments))
    return time.process_time() - start


def measure(name: str, network: shrink.Network, options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Predict and measure one network at each share of its time."""
    fn, params, x, _ = network
    graph, told = structured.trace(fn, params, x), {"repeats": options.repeats}
    if options.cpu_time:
        told["timer"] = cpu_seconds
    times = structured.measure_times(graph, params, x, options=options.widths, round_to=options.round_to, **told)
    again = structured.check_times(times, structured.Plan({}, {}), params, x, **told)
    sizes = {group: graph.group(group).size for group in times.widths}
    step = options.round_to
    widths = {group: {*range(step, size + 1, step), size} for group, size in sizes.items()}
    prices = {group: {n: (1 - n / sizes[group]) ** 2 for n in sorted(each)} for group, each in widths.items()}
    rows = [{"network": name, "share": 1.0, "macs": 1.0, "predicted": again.predicted, "measured": again.measured}]
    for share in options.shares:
        try:
            found = structured.allocate_widths(graph, prices, share * times.whole, cost=times)
        except ValueError as error:  # no width is as fast as that
            console.print(f"{name}: {error}")
            continue
        plan = structured.select_channels(graph, params, found.k)
        seen = structured.check_times(times, plan, params, x, **told)
        macs = structured.count_macs(graph, plan) / structured.count_macs(graph)
        rows.append({"network": name, "share": share, "macs": macs, **seen._asdict()})
    return rows


def table(device: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Show what was predicted and measured, in milliseconds."""
    shown = Table(title=f"predicted and measured, on {device}", title_justify="left")
    for column in ("network", "budget", "MACs", "predicted, ms", "measured, ms", "error", "error by MACs"):
        shown.add_column(column, justify="left" if column == "network" else "right")
    whole = {row["network"]: row["predicted"] for row in rows if row["share"] == 1}
    for row in rows:
        errors = (row["predicted"] / row["measured"] - 1, row["macs"] * whole[row["network"]] / row["measured"] - 1)
        shown.add_row(
            row["network"],
            f"{row['share']:.0%}",
            f"{row['macs']:.0%}",
            *(f"{1e3 * row[what]:.2f}" for what in ("predicted", "measured")),
            *(f"{error:+.0%}" for error in errors),
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure, show a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("digits CNN", "transformer")
    parser.add_argument("--networks", nargs="+", choices=names, default=list(names), help="(default: all)")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.85, 0.7, 0.55], help="of the time that may be taken"
    )
    parser.add_argument("--size", type=int, default=16, help="of the CNN's images")
    parser.add_argument("--batch-size", type=int, default=8, help="of the transformer; of the CNN eight times as many")
    parser.add_argument("--layers", type=int, default=4, help="of the transformer")
    parser.add_argument("--model-width", type=int, default=128, help="of the transformer")
    parser.add_argument("--length", type=int, default=64, help="tokens of the transformer")
    parser.add_argument("--widths", type=int, default=4, help="measured of each group")
    parser.add_argument("--round-to", type=int, default=1, help="widths are multiples of it")
    parser.add_argument("--repeats", type=int, default=30, help="rounds")
    parser.add_argument("--cpu-time", action="store_true", help="time by CPU time, where others use the cores")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    networks = {
        "digits CNN": lambda: shrink.cnn(options.size, 8 * options.batch_size),
        "transformer": lambda: shrink.transformer(
            options.layers, options.batch_size, options.model_width, options.length
        ),
    }
    console = Console(width=110)
    rows = [row for name in options.networks for row in measure(name, networks[name](), options, console)]
    console.print(table(jax.devices()[0].device_kind, rows))
    timing.write_json(options.json, rows)


if __name__ == "__main__":
    main()
