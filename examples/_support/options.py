"""The examples' command line: what can be chosen, the small preset, and what is refused before any work begins."""

import argparse
import dataclasses
import importlib.util
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar


class UsageError(Exception):
    """Something the user asked for cannot be done; the message is one line and says what to do."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What every run depends on."""

    dataset: str
    data_dir: Path | None
    out: Path
    resume: bool
    small: bool
    seed: int
    epochs: int
    batch_size: int
    learning_rate: float
    momentum: float
    save_every: int

    def to_dict(self) -> dict[str, Any]:
        """Return what decides the results, as JSON can hold it: not where files lie or how often they are saved."""
        free = ("data_dir", "out", "resume", "save_every")
        chosen = {name: value for name, value in dataclasses.asdict(self).items() if name not in free}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()}


@dataclasses.dataclass(frozen=True)
class SweepSettings(Settings):
    """What the run of `cnn.py` depends on; `k` and `ks` are thresholds in standard deviations of a layer."""

    fine_tune_epochs: int
    k: float
    ks: tuple[float, ...]


SettingsOf = TypeVar("SettingsOf", bound=Settings)


class Presets(NamedTuple):
    """Defaults that --small changes; what is given on the command line wins over both."""

    full: dict[str, Any]
    small: dict[str, Any]

    def help(self, name: str) -> str:
        """Return both defaults of an option, for its help."""
        shown = (" ".join(map(str, x)) if isinstance(x, tuple) else x for x in (self.full[name], self.small[name]))
        return "(default: {}, with --small {})".format(*shown)


SWEEP = Presets(
    full={"epochs": 25, "fine_tune_epochs": 10, "ks": (0.5, 1.0, 1.5, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5)},
    small={"epochs": 2, "fine_tune_epochs": 1, "ks": (1.0, 2.0)},
)


def parse(description: str, out: str, arguments: Sequence[str] | None = None) -> SweepSettings:
    """Read the command line of `cnn.py`; like every argparse program, print the usage and exit with code 2 if wrong.

    Args:
      description: what the program does, for --help.
      out: the default output folder.
      arguments: the words after the program's name; those of this process when None.

    Returns:
      The settings, complete and in range.

    Raises:
      UsageError: the strengths of the sweep do not rise.
    """
    options = parser(description, out, SWEEP)
    add = options.add_argument
    add("--fine-tune-epochs", type=count(1), help=f"after each pruning {SWEEP.help('fine_tune_epochs')}")
    add("--k", type=number(), default=1.0, help="prune below k standard deviations of a layer (default: %(default)s)")
    add("--ks", type=number(), nargs="+", metavar="K", help=f"of the sweep, rising {SWEEP.help('ks')}")
    chosen = complete(SweepSettings, options.parse_args(arguments), SWEEP)
    require_rising("--ks", chosen.ks)
    return chosen


def parser(description: str, out: str, presets: Presets) -> argparse.ArgumentParser:
    """Return a parser of the options that all runs share; a program adds its own."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = options.add_argument
    default = "(default: %(default)s)"
    add("--dataset", default="digits", help=f"digits, mnist, fashion_mnist, cifar10 or another of TFDS {default}")
    add("--data-dir", type=Path, help="folder of prepared data sets (default: the user's cache)")
    add("--out", type=Path, default=Path(out), help=f"folder for results, figures and checkpoints {default}")
    add("--resume", action="store_true", help="continue the run in --out; otherwise it is replaced")
    add("--small", action="store_true", help="few images, epochs and strengths, to see that everything runs")
    add("--seed", type=count(0), default=0, help=f"of the first weights and the images' order {default}")
    add("--epochs", type=count(1), help=f"of each network's training {presets.help('epochs')}")
    add("--batch-size", type=count(1), default=32, help=f"images per step {default}")
    add("--learning-rate", type=number(), default=0.01, help=f"of the gradient descent {default}")
    add("--momentum", type=number(high=1), default=0.9, help=f"of the gradient descent {default}")
    add("--save-every", type=count(1), default=10, metavar="EPOCHS", help=f"between checkpoints {default}")
    return options


def complete(kind: type[SettingsOf], options: argparse.Namespace, presets: Presets) -> SettingsOf:
    """Return the settings that a parser has read, with the preset for what was not given."""
    preset = presets.small if options.small else presets.full
    chosen = {field.name: getattr(options, field.name) for field in dataclasses.fields(kind)}
    chosen.update({name: value for name, value in preset.items() if chosen[name] is None})
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in chosen.items()})


def require_rising(option: str, strengths: Sequence[float]) -> None:
    """Raise a UsageError unless each strength is above the one before."""
    if any(low >= high for low, high in zip(strengths, strengths[1:], strict=False)):
        raise UsageError(f"{option} must rise, since each prunes what the one before has left; got {tuple(strengths)}")


def require_package(name: str, purpose: str) -> None:
    """Raise a UsageError unless a package is there that is imported late, when hours of training may have passed."""
    if importlib.util.find_spec(name) is None:
        raise UsageError(f"{purpose} needs the package {name}: pip install {name}")


def count(low: int) -> Any:
    """Return a type of option: a whole number of at least `low`."""

    def count(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}")
        return value

    return count


def number(high: float = math.inf) -> Any:
    """Return a type of option: a finite number between 0 and `high`."""

    def number(text: str) -> float:
        value = float(text)
        if not 0 <= value <= high or math.isinf(value):
            limit = "of at least 0" if math.isinf(high) else f"between 0 and {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is not a number {limit}")
        return value

    return number


def add_names(
    parser: argparse.ArgumentParser, option: str, names: Iterable[str], default: Sequence[str] | None = None
) -> None:
    """Add an option that takes some of these names, all by default; typed as `spelled` writes them, or in full."""
    names = tuple(names)
    shown = f"{spelled(names)} (default: {'all' if default is None else spelled(default)})".replace("%", "%%")
    chosen = list(names if default is None else default)
    parser.add_argument(option, type=named(names), nargs="+", default=chosen, metavar="NAME", help=shown)


def named(names: Iterable[str]) -> Any:
    """Return a type of option: one of these names, whatever its capitals and punctuation."""
    known = {_letters(name): name for name in names}

    def named(text: str) -> str:
        if _letters(text) not in known:
            raise argparse.ArgumentTypeError(f"{text!r} is none of {spelled(known.values())}")
        return known[_letters(text)]

    return named


def spelled(names: Iterable[str]) -> str:
    """Return names as they are typed without quotes: `SparseGPT, published` as sparsegpt-published."""
    return ", ".join("-".join(re.findall("[a-z0-9:%]+", name.lower())).replace("-%", "%") for name in names)


def _letters(name: str) -> str:
    return "".join(re.findall("[a-z0-9:]+", name.lower()))
