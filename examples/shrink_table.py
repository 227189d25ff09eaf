"""Run `shrink_cnn.py` with several seeds and print its accuracies by measure of importance, as a table in Markdown.

Every seed has its own folder in the output folder. The other options are those of `shrink_cnn.py`; `--resume` takes up
finished and unfinished seeds alike.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shrink_cnn
from _support.experiment import Experiment, exit_code
from _support.options import count
from rich import box
from rich.console import Console
from rich.table import Table


def table(runs: Sequence[dict[str, Any]]) -> Table:
    """Show mean and standard deviation over the runs: before fine-tuning, repaired, after fine-tuning."""
    shown = Table("importance", "cut", "cut and repaired", "fine-tuned", box=box.MARKDOWN)
    for measure in runs[0]["settings"]["measures"]:
        shown.add_row(measure, *(_accuracy(runs, stage, measure) for stage in ("before", "repaired", "validation")))
    return shown


def _accuracy(runs: Sequence[dict[str, Any]], stage: str, measure: str) -> str:
    if measure not in runs[0][stage]:
        return ""
    found = [100 * run[stage][measure]["accuracy"] for run in runs]
    return f"{np.mean(found):.1f} ± {np.std(found):.1f}"


def tabulate(arguments: list[str] | None = None) -> None:
    """Run all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=count(0), nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/shrink_table"),
        help="a folder for each seed in it (default: %(default)s)",
    )
    own, others = parser.parse_known_args(arguments)
    console, runs = Console(highlight=False), []
    for seed in own.seeds:
        settings = shrink_cnn.parse([*others, "--seed", str(seed), "--out", str(own.out / f"seed-{seed}")])
        with console.status(f"seed {seed}"):
            experiment = Experiment(settings, Console(quiet=True))
            shrink_cnn.run(experiment, settings)
        runs.append(experiment.results)
    dense = [100 * run["validation"]["dense"]["accuracy"] for run in runs]
    before, after = runs[0]["cost"]["macs"]
    console.print(
        f"\n{len(runs)} seed(s), {before / after:.2f} times fewer multiply-accumulates; dense {np.mean(dense):.1f} %\n",
        table(runs),
    )


if __name__ == "__main__":
    sys.exit(exit_code(tabulate))
