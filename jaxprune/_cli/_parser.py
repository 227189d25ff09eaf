"""The command ``jaxprune``: its arguments, its errors, its exit codes."""

import argparse
import difflib
import functools
import os
import re
import sys
import warnings
from collections.abc import Collection, Sequence
from typing import NoReturn, TextIO

from jaxprune._cli import _actions as actions
from jaxprune._cli._completion import FileName, PrintCompletion
from jaxprune._interrupt import INTERRUPTED
from jaxprune._printing import printable
from jaxprune.storage._coding import DTYPES
from jaxprune.storage._trees import version

OK, DIFFERENT, MISUSED = 0, 1, 2

_DESCRIPTION = """Prune, convert and compare models on disk: safetensors files, or folders of shards with their index.

No model class is needed, and one tensor at a time is in memory. Tables go to the standard output, progress and errors to
the standard error. Tables are as wide as the terminal, or as COLUMNS says; in a pipe no name is broken. Exit codes: 0, 1
for models that differ (diff), 2 for what cannot be done.
"""

# In messages of functions: a leaf of a tree of tensors, and keywords that are options here.
_LEAF = re.compile(r"""params\[(['"])(.*?)\1\]""")
_KEYWORD = re.compile(r"\b(group_size\b|(?:prunable|force|dense|quantize|quantize_tables)(?==))=?(True\b|\.\.\.|\d*)")

_RULES = "Rules, and what k is:\n" + "\n".join(f"  {name}: {strength}" for name, strength in actions.RULES.items())


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one line and where to read more, rather than the whole usage."""
        self.exit(MISUSED, f"{self.prog}: error: {printable(message)}\nMore: {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: the words after the command's name; None takes the process's own.

    Returns:
        The exit code: 0, 1 where ``diff`` found differences, 2 for what cannot be done (one line on the standard error
        says why), 130 when interrupted.

    Raises:
        SystemExit: by ``--help``, ``--version`` and ``--print-completion``, and for words that cannot be understood.
    """
    try:
        options = _parse(sys.argv[1:] if arguments is None else list(arguments))
        with warnings.catch_warnings():
            # Each tensor is masked twice, and would warn twice.
            warnings.simplefilter("once")
            warnings.showwarning = _show_warning
            same = options.action(options)
            sys.stdout.flush()
    except BrokenPipeError:
        # Who read the output has seen enough; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        print("jaxprune: interrupted; nothing half-written is left under the file's name", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"jaxprune {options.command}: error: {_in_words(error)}", file=sys.stderr)
        return MISUSED
    return OK if same else DIFFERENT


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return printable(f"{error.filename}: {error.strerror}")
    return _for_shell(" ".join(str(error).split()))


def _for_shell(text: str) -> str:
    """Say what a function says to its caller to a user of the command: tensors by their names, keywords as options.

    >>> _for_shell("params['a.0.weight'] is large; leave it dense with prunable=..., or give quantize= as well.")
    'a.0.weight is large; leave it dense with --skip, or give --quantize as well.'
    """
    by_name = _LEAF.sub(lambda found: found[2], text)
    return printable(_KEYWORD.sub(_option, by_name))


def _option(found: re.Match[str]) -> str:
    name = "skip" if found[1] == "prunable" else found[1].replace("_", "-")
    return f"--{name} {found[2]}" if found[2].isdigit() else f"--{name}"


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"jaxprune: warning: {_for_shell(str(message))}", file=sys.stderr)


def _parse(words: list[str]) -> argparse.Namespace:
    parser, commands = _parsers()
    if words and not words[0].startswith("-") and words[0] not in commands:
        parser.error(_unknown("command", words[0], commands))
    return parser.parse_args(words or ["--help"])


def _unknown(kind: str, name: str, known: Collection[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    meant = f"did you mean {nearest[0]}? " if nearest else ""
    return f"there is no {kind} {name!r}; {meant}The {kind}s are {', '.join(known)}."


def _parsers() -> tuple[argparse.ArgumentParser, Collection[str]]:
    """Make the parser; return the names of its commands, too."""
    parser = _Parser(prog="jaxprune", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"jaxprune {version() or 'of unknown version'}")
    parser.add_argument(
        "--print-completion", action=PrintCompletion, choices=("bash", "zsh", "fish"), metavar="SHELL",
        help="print what completes words in bash, zsh or fish; needs jaxprune[completion]",
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    add = functools.partial(commands.add_parser, formatter_class=argparse.RawDescriptionHelpFormatter)

    summarize = add(
        "summarize", help="show what a model holds", description="Show what each tensor keeps, and its bytes."
    )
    summarize.set_defaults(action=actions.summarize)
    summarize.add_argument("model", action=FileName, help="a safetensors file, or a folder of shards")

    prune = add(
        "prune", help="prune a model by magnitude", epilog=_RULES,
        description="Prune a model by the magnitude of its weights, and store what is kept.",
    )  # fmt: skip
    prune.set_defaults(action=actions.prune)
    _add_paths(prune)
    prune.add_argument(
        "--rule", type=_rule, choices=actions.RULES, required=True, metavar="NAME", help="what decides; see below"
    )
    prune.add_argument("--k", type=float, required=True, help="the rule's strength")
    prune.add_argument("--m", type=int, help="the size of a group, for n_m")
    prune.add_argument("--scores", choices=("magnitude",), default="magnitude", help="what ranks the weights")
    prune.add_argument(
        "--only", nargs="+", metavar="GLOB", help="prune the tensors of these names; default: kernels, no embeddings"
    )
    prune.add_argument("--skip", nargs="+", metavar="GLOB", default=[], help="but not the tensors of these names")

    convert = add(
        "convert", help="store a model in another way",
        description="Store a model sparse, dense, quantised or compressed. In a plain file the zeros of kernels count as "
        "pruned.",
    )  # fmt: skip
    convert.set_defaults(action=actions.convert)
    _add_paths(convert)

    diff = add("diff", help="compare two models", description="Compare two models, in whatever way each is stored.")
    diff.set_defaults(action=actions.diff)
    diff.add_argument("a", action=FileName, help="a safetensors file, or a folder of shards")
    diff.add_argument("b", action=FileName, help="another")

    report = add("report", help="write a page about a model", description="Write one HTML page about a model.")
    report.set_defaults(action=actions.report)
    report.add_argument("model", action=FileName, help="a safetensors file, or a folder of shards")
    report.add_argument("out", action=FileName, help="the page to write")
    report.add_argument("--force", action="store_true", help="replace the file that is there; never the model itself")

    for command in (summarize, prune, convert, diff):
        command.add_argument("--json", action="store_true", help="print JSON instead of a table")
        command.add_argument(
            "--full", action="store_true", help="a row for each layer, not one for many that are alike"
        )
    return parser, commands.choices


def _add_paths(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", action=FileName, help="a safetensors file, or a folder of shards")
    command.add_argument("out", action=FileName, help="the file or folder to write")
    command.add_argument("--dense", action="store_true", help="write zeros: a plain file that anything reads")
    command.add_argument("--quantize", type=int, choices=(8, 4), help="store kernels as integers of so many bits")
    command.add_argument("--quantize-tables", type=int, choices=(8, 4), help="the same for tables of embeddings")
    command.add_argument("--group-size", type=int, metavar="N", help="how many inputs share a scale; default: all")
    command.add_argument(
        "--dtype", choices=DTYPES, metavar="NAME", help=f"what stays floating-point becomes {' or '.join(DTYPES)}"
    )
    command.add_argument("--compress", action="store_true", help="pass the file through zstd")
    command.add_argument("--force", action="store_true", help="replace the file that is there; never the model itself")
    command.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")


def _rule(name: str) -> str:
    if name not in actions.RULES:
        raise argparse.ArgumentTypeError(_unknown("rule", name, actions.RULES))
    return name
