"""What is particular to jaxprune's own documentation: links in docstrings, fields written once, the help of the command.

In docstrings a name in single backticks, ``make_masks`` or ``scores.wanda`` or ``Plan.to_json``, is a link where it is public: each
public name has one home, so the short name is enough. What is no public name is shown as code.
"""

import contextlib
import importlib
import inspect
import io
import os
import re
from typing import Any
from unittest import mock

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.domains.python import PyXRefRole
from sphinx.util.docutils import SphinxDirective, SphinxRole

import jaxprune
from jaxprune.__main__ import main

# Short words that are more often an argument than the figure of that name; `plot.mask` is still a link.
_QUALIFIED = "plot"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def _targets() -> dict[str, str]:
    """Full names by every name that a docstring may use for them."""
    found = {}
    for home in ("", *(name for name, thing in vars(jaxprune).items() if inspect.ismodule(thing) and name[0] != "_")):
        module = importlib.import_module(f"jaxprune.{home}".rstrip("."))
        found[module.__name__] = module.__name__
        for name, thing in vars(module).items():
            if name.startswith("_") or inspect.ismodule(thing):
                continue
            members = [member for member in vars(thing) if member[0] != "_"] if inspect.isclass(thing) else []
            for path in (name, *(f"{name}.{member}" for member in members if _is_listed(thing, member))):
                full = f"{module.__name__}.{path}"
                found |= {full: full, full.removeprefix("jaxprune."): full}
                if home != _QUALIFIED:
                    found[path] = full
    return found


def _is_listed(thing: type, member: str) -> bool:
    what = vars(thing)[member]
    return isinstance(what, property | classmethod) or inspect.isfunction(what)


_TARGETS = _targets()


class _Name(SphinxRole):
    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        full = _TARGETS.get(self.text.removesuffix("()"))
        if full is None:
            return [nodes.literal(self.rawtext, self.text)], []
        link = PyXRefRole(warn_dangling=True)
        text = f"{self.text} <{full}>"
        return link("py:obj", f":py:obj:`{text}`", text, self.lineno, self.inliner)


class _Help(SphinxDirective):
    """The help of a command, as the command prints it."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        words = [*self.arguments, "--help"]
        text = io.StringIO()
        with (
            mock.patch.dict(os.environ, {"COLUMNS": "88", "NO_COLOR": "1"}),
            contextlib.redirect_stdout(text),
            contextlib.suppress(SystemExit),
        ):
            main(words)
        block = nodes.literal_block(text.getvalue(), text.getvalue(), language="text")
        return [block]


def _own_arguments(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Show a function's own arguments as code, also those that are called as something public is."""
    with contextlib.suppress(TypeError, ValueError):
        own = "|".join(map(re.escape, inspect.signature(thing).parameters))
        pattern = re.compile(rf"(?<![`:])`({own})`(?!`)")
        lines[:] = [pattern.sub(r"``\1``", line) for line in lines] if own else lines


def _skip_fields(app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of tuples and dataclasses as members: the section Attributes has them."""
    is_field = type(thing).__name__ in ("_tuplegetter", "member_descriptor") or not (
        isinstance(thing, property | classmethod | staticmethod) or inspect.isroutine(thing) or inspect.isclass(thing)
    )
    return True if what == "class" and is_field else None


def _signature(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str | None, result: str | None
) -> tuple[str | None, str | None]:
    """Write functions as defaults without where they are in memory."""
    return _ADDRESS.sub("", signature or "") or signature, result


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_role("public", _Name())
    app.add_directive("command-help", _Help)
    app.connect("autodoc-process-docstring", _own_arguments)
    app.connect("autodoc-skip-member", _skip_fields)
    app.connect("autodoc-process-signature", _signature)
    return {"parallel_read_safe": True}
