"""Imports run one way: from what users call down to the ground it stands on, without a cycle."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import jaxprune

ROOT = Path(jaxprune.__file__).parent
# From the ground up: each unit may import those before it.
ORDER = [
    "_interrupt", "_dtypes", "_printing", "_html", "_tables", "_rows", "_progress", "_tree", "_selection", "_jaxpr", "sites", "scores", "rules", "_masks", "algebra", "_iterate",
    "_recalibrate", "distill", "learned", "transforms", "oneshot", "structured", "storage", "export", "_summary", "choose", "plot", "_report", "__init__",
    "_cli", "__main__",
]  # fmt: skip
# Libraries that few parts may use at all, and those that may only be imported when something is called.
ALLOWED = {"optax": {"transforms"}, "flax": set(), "tensorflow_datasets": set(), "haiku": set(), "equinox": set()}
WHEN_CALLED = {"rich", "matplotlib", "zstandard", "torch", "safetensors", "onnx", "gguf", "keras", "jax2onnx"}


def modules() -> dict[str, ast.Module]:
    """The syntax trees by dotted name, ``rules._layers``; a folder's ``__init__`` goes by the folder's name."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        found[name] = ast.parse(path.read_text())
    return found


MODULES = modules()


def imported(tree: ast.AST) -> Iterator[str]:
    """What is imported from the package, as dotted names of modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jaxprune":
            inside = node.module.partition(".")[2]
            for alias in node.names:
                full = f"{inside}.{alias.name}".lstrip(".")
                yield full if full in MODULES else inside or "__init__"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "jaxprune":
                    yield alias.name.partition(".")[2] or "__init__"


def test_units_import_only_what_lies_below_them() -> None:
    units = {name.split(".")[0] for name in MODULES}
    assert units == set(ORDER)
    rank = {unit: place for place, unit in enumerate(ORDER)}
    for name, tree in MODULES.items():
        own = name.split(".")[0]
        for other in imported(tree):
            unit = other.split(".")[0]
            assert unit == own or rank[unit] < rank[own], f"{name} imports {other}"


def test_there_is_no_cycle_between_files() -> None:
    graph = {name: set(imported(tree)) - {name} for name, tree in MODULES.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


def test_libraries_stay_where_they_belong() -> None:
    for name, tree in MODULES.items():
        unit = name.split(".")[0]
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        for node in ast.walk(tree):
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for library in (module.split(".")[0] for module in named):
                assert unit in ALLOWED.get(library, {unit}), f"{name} imports {library}"
                if library in WHEN_CALLED and unit not in ("_cli", "_tables"):  # which are imported when called
                    assert node not in top, f"{name} imports {library} at its top"


def test_no_file_has_two_jobs() -> None:
    for path in ROOT.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path.name
