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
FULL: dict[str, Any] = {"epochs": 25, "fine_tune_epochs": 10, "ks": (0.5, 1.0, 1.5, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5)}
SMALL: dict[str, Any] = {"epochs": 2, "fine_tune_epochs": 1, "ks": (1.0, 2.0)}


def parse(description: str, out: str, arguments: Sequence[str] | None = None) -> Settings:
    """Read the command line; like every argparse program, print the usage and exit with code 2 if it is wrong.

    Args:
      description: what the program does, for --help.
      out: the default output folder.
      arguments: the words after the program's name; those of this process when None.

    Returns:
      The settings, complete and in range.
    """
    parser = argparse.ArgumentParser(description=description)
    add_options(parser, out)
    return settings(parser.parse_args(arguments))


def add_options(parser: argparse.ArgumentParser, out: str) -> None:
    """Add the options of a run to a parser, for `settings` to read."""
    add = parser.add_argument
    default = "(default: %(default)s)"
    add("--dataset", default="digits", help=f"digits, mnist, fashion_mnist, cifar10 or another of TFDS {default}")
    add("--data-dir", type=Path, help="folder of prepared data sets (default: the user's cache)")
    add("--out", type=Path, default=Path(out), help=f"folder for results, figures and checkpoints {default}")
    add("--resume", action="store_true", help="continue the run in --out; otherwise it is replaced")
    add("--small", action="store_true", help="few images, epochs and strengths, to see that everything runs")
    add("--seed", type=_count(0), default=0, help=f"of the first weights and the images' order {default}")
    add("--epochs", type=_count(1), help=f"of dense training {_presets('epochs')}")
    add("--fine-tune-epochs", type=_count(1), help=f"after each pruning {_presets('fine_tune_epochs')}")
    add("--batch-size", type=_count(1), default=32, help=f"images per step {default}")
    add("--learning-rate", type=_number(), default=0.01, help=f"of the gradient descent {default}")
    add("--momentum", type=_number(high=1), default=0.9, help=f"of the gradient descent {default}")
    add("--k", type=_number(), default=1.0, help=f"prune below k standard deviations of a layer {default}")
    add("--ks", type=_number(), nargs="+", metavar="K", help=f"of the sweep, rising {_presets('ks')}")
    add("--save-every", type=_count(1), default=10, metavar="EPOCHS", help=f"between checkpoints {default}")


def settings(options: argparse.Namespace) -> Settings:
    """Complete the options that `add_options` has read.

    Raises:
      UsageError: the strengths of the sweep do not rise.
    """
    preset = SMALL if options.small else FULL
    chosen = {field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)}
    chosen.update({name: value for name, value in preset.items() if chosen[name] is None})
    chosen["ks"] = tuple(chosen["ks"])
    if any(low >= high for low, high in zip(chosen["ks"], chosen["ks"][1:], strict=False)):
        raise UsageError(f"--ks must rise, since each prunes what the one before has left; got {chosen['ks']}")
    return Settings(**chosen)


def _presets(name: str) -> str:
    full, small = FULL[name], SMALL[name]
    if isinstance(full, tuple):
        full, small = (" ".join(map(str, strengths)) for strengths in (full, small))
    return f"(default: {full}, with --small {small})"


def _count(low: int) -> Any:
    def count(text: str) -> int:
        number = int(text)
        if number < low:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}")
        return number

    return count


def _number(high: float = math.inf) -> Any:
    def number(text: str) -> float:
        value = float(text)
        if not 0 <= value <= high or math.isinf(value):
            limit = "of at least 0" if math.isinf(high) else f"between 0 and {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is not a number {limit}")
        return value

    return number
