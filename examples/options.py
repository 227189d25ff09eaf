"""The examples' command line: what can be chosen, the small preset, and what is refused before any work begins."""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class UsageError(Exception):
    """Something the user asked for cannot be done; the message is one line and says what to do."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run depends on; `k` and `ks` are thresholds in standard deviations of a layer."""

    dataset: str
    data_dir: Path | None
    out: Path
    resume: bool
    small: bool
    seed: int
    epochs: int
    fine_tune_epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    k: float
    ks: tuple[float, ...]
    save_every: int

    def to_dict(self) -> dict[str, Any]:
        """Return what decides the results, as JSON can hold it: not where files lie or how often they are saved."""
        free = ("data_dir", "out", "resume", "save_every")
        chosen = {name: value for name, value in dataclasses.asdict(self).items() if name not in free}
        return {**chosen, "ks": list(self.ks)}


# Defaults that --small changes; a number given on the command line wins over both.
FULL = {"epochs": 30, "fine_tune_epochs": 15, "ks": (0.5, 1.0, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0)}
SMALL = {"epochs": 2, "fine_tune_epochs": 1, "ks": (1.0, 2.0)}


def parse(description: str, out: str, arguments: Sequence[str] | None = None) -> Settings:
    """Read the command line; like every argparse program, print the usage and exit with code 2 if it is wrong.

    Args:
      description: what the program does, for --help.
      out: the default output folder.
      arguments: the words after the program's name; those of this process when None.

    Returns:
      The settings, complete and in range.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_options(parser, out)
    return settings(parser.parse_args(arguments))


def add_options(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the options of a run to a parser, for `settings` to read."""
    add = parser.add_argument
    add("--dataset", default="digits", help="digits, mnist, fashion_mnist, cifar10 or another of TFDS")
    add("--data-dir", type=Path, help="folder of prepared data sets (default: the user's cache)")
    add("--out", type=Path, default=Path(out), help="folder for results, figures and checkpoints")
    add("--resume", action="store_true", help="continue the run in --out; otherwise it is replaced")
    add("--small", action="store_true", help="a few images and epochs, to see that everything runs")
    add("--seed", type=_count(0), default=0, help="of the initial weights and the order of the images")
    add("--epochs", type=_count(1), default=argparse.SUPPRESS, help=_help("of dense training", "epochs"))
    add(
        "--fine-tune-epochs", type=_count(1), default=argparse.SUPPRESS,
        help=_help("after each pruning", "fine_tune_epochs"),
    )  # fmt: skip
    add("--batch-size", type=_count(1), default=32, help="images per step")
    add("--learning-rate", type=_number(low=0), default=0.01, help="of stochastic gradient descent")
    add("--momentum", type=_number(low=0, high=1), default=0.9, help="of stochastic gradient descent")
    add("--k", type=_number(low=0), default=1.0, help="prune weights below k standard deviations of their layer")
    add(
        "--ks", type=_number(low=0), nargs="+", default=argparse.SUPPRESS, metavar="K",
        help=_help("of the sweep, rising", "ks"),
    )  # fmt: skip
    add("--save-every", type=_count(1), default=10, help="epochs between checkpoints")


def settings(options: argparse.Namespace) -> Settings:
    """Complete the options that `add_options` has read.

    Raises:
      UsageError: the strengths of the sweep do not rise.
    """
    chosen = {**(SMALL if options.small else FULL), **vars(options)}
    chosen = {field.name: chosen[field.name] for field in dataclasses.fields(Settings)}
    chosen["ks"] = tuple(chosen["ks"])
    if any(low >= high for low, high in zip(chosen["ks"], chosen["ks"][1:], strict=False)):
        raise UsageError(f"--ks must rise, since each prunes what the one before has left; got {chosen['ks']}")
    return Settings(**chosen)


def _help(text: str, name: str) -> str:
    full, small = (" ".join(map(str, value)) if isinstance(value, tuple) else value
                   for value in (FULL[name], SMALL[name]))  # fmt: skip
    return f"{text} (default: {full}; with --small: {small})"


def _count(low: int) -> Any:
    def count(text: str) -> int:
        number = int(text)
        if number < low:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}")
        return number

    return count


def _number(*, low: float, high: float = math.inf) -> Any:
    def number(text: str) -> float:
        value = float(text)
        if not low <= value <= high or math.isinf(value):
            raise argparse.ArgumentTypeError(
                f"{text} is not a number between {low} and {high}" if high < math.inf
                else f"{text} is not a finite number of at least {low}"
            )  # fmt: skip
        return value

    return number
