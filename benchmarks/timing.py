"""How the benchmarks measure: variants in shuffled order, a control, medians of wall and CPU time, ratios."""

import json
import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

CONTROL = " (A/A control)"


class Row(NamedTuple):
    """One variant's medians over the rounds, in seconds, and its medians of ratios to the baseline."""

    variant: str
    wall: float
    cpu: float
    wall_ratio: float
    cpu_ratio: float


class _Sample(NamedTuple):
    wall: float
    cpu: float


def compare(
    variants: Mapping[str, Callable[[], Any]], repeats: int, *, baseline: str | None = None, seed: int = 0
) -> list[Row]:
    """Time each variant once a round, in an order shuffled anew for every round.

    A fixed order gives each variant the caches and the heat that its predecessor leaves. The baseline runs twice a
    round: how far its second ratio lies from 1 is the noise of all the others. A ratio is the median over rounds of
    the ratios within a round, so that what slows a whole round down cancels.

    Args:
        variants: functions without arguments, by name, that return when their work is done (in JAX by
            ``jax.block_until_ready``). Each is called once beforehand, to compile.
        repeats: the number of rounds, at least 1.
        baseline: the variant that ratios refer to; the first one when None.
        seed: of the order.

    Returns:
        One row a variant, in the order given, then the control's.
    """
    baseline = next(iter(variants)) if baseline is None else baseline
    control = baseline + CONTROL
    runs = {**variants, control: variants[baseline]}
    for run in variants.values():
        _sample(run)
    samples: dict[str, list[_Sample]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(seed).shuffle
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            samples[name].append(_sample(runs[name]))
    return [_row(name, taken, samples[baseline]) for name, taken in samples.items()]


def _sample(run: Callable[[], Any]) -> _Sample:
    wall, cpu = time.perf_counter(), _cpu_time()
    run()
    return _Sample(time.perf_counter() - wall, _cpu_time() - cpu)


def _cpu_time() -> float:
    """CPU seconds of all threads of this process and of its finished child processes."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _row(name: str, taken: Sequence[_Sample], reference: Sequence[_Sample]) -> Row:
    pairs = list(zip(taken, reference, strict=True))
    return Row(
        name,
        statistics.median(sample.wall for sample in taken),
        statistics.median(sample.cpu for sample in taken),
        statistics.median(sample.wall / base.wall for sample, base in pairs),
        statistics.median(sample.cpu / base.cpu for sample, base in pairs),
    )


def table(title: str, rows: Sequence[Row]) -> Table:
    """Show rows of `compare` with times in milliseconds."""
    shown = Table(title=title, title_justify="left")
    shown.add_column("variant")
    for heading in ("wall, ms", "ratio", "CPU, ms", "ratio"):
        shown.add_column(heading, justify="right")
    for row in rows:
        shown.add_row(
            row.variant,
            f"{1e3 * row.wall:.2f}",
            f"{row.wall_ratio:.3f}",
            f"{1e3 * row.cpu:.2f}",
            f"{row.cpu_ratio:.3f}",
        )
    return shown


def write_json(path: Path | None, results: Any) -> None:
    """Write results to a file, if one is wanted."""
    if path is not None:
        path.write_text(json.dumps(results, indent=2) + "\n")
