"""Completion of words in a shell, by the library shtab, which is imported when it is needed.

A script that is written once: to ask this program at each press of a key would take the seconds that its imports take.
"""

import argparse
import importlib
from typing import Any


class FileName(argparse.Action):
    """A word that names a file or a folder."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Keep the word."""
        setattr(namespace, self.dest, values)

    @property
    def complete(self) -> Any:
        """What shtab asks an argument for."""
        return importlib.import_module("shtab").FILE


class PrintCompletion(argparse.Action):
    """An option that prints a shell's script and ends the program."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        """Print the script of the shell that is named."""
        try:
            shtab = importlib.import_module("shtab")
        except ModuleNotFoundError:
            parser.error("completion needs the library shtab: pip install 'jaxprune[completion]'")
        print(shtab.complete(parser, values))
        parser.exit()
