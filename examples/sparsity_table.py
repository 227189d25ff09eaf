"""Run `cnn.py` with several seeds and print the mean of their sweeps, as a table in Markdown.

Every seed has its own folder in the output folder, which also receives `accuracy.png`, with bars of one standard
deviation. `--figure` draws the fine-tuned accuracies alone, small and without a background of its own, as they stand in the
README. The other options are those of `cnn.py`; `--resume` takes up finished and unfinished seeds alike.
"""

import argparse
import sys
from pathlib import Path

import cnn
from _support import options, report
from _support.experiment import Experiment, exit_code
from rich import box
from rich.console import Console


def tabulate(arguments: list[str] | None = None) -> None:
    """Run all seeds and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=options.count(0), nargs="+", default=[0, 1, 2], help="(default: 0 1 2)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/table"), help="a folder for each seed in it (default: %(default)s)"
    )
    parser.add_argument("--figure", type=Path, metavar="SVG", help="where to draw the figure of the README")
    own, others = parser.parse_known_args(arguments)
    console, runs = Console(highlight=False), []
    for seed in own.seeds:
        folder = own.out / f"seed-{seed}"
        settings = options.parse("", "", [*others, "--seed", str(seed), "--out", str(folder)])
        with console.status(f"seed {seed}"):
            experiment = Experiment(settings, Console(quiet=True))
            cnn.run(experiment)
        console.print(f"seed {seed}: {report.best_sentence(report.read_sweep([experiment.results]))}")
        runs.append(experiment.results)
    sweep = report.read_sweep(runs)
    table = report.sweep_table(sweep)
    table.title, table.box = None, box.MARKDOWN
    console.print(f"\nMean of {len(runs)} seeds; dense: {sweep.dense.mean():.2%}\n", table)
    console.print(report.best_sentence(sweep))
    report.save_curve(sweep, own.out / "accuracy.png")
    if own.figure is not None:
        report.save_small_curve(sweep, own.figure)


if __name__ == "__main__":
    sys.exit(exit_code(tabulate))
