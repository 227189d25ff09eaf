"""What is public: one home for each name, nothing beside it, everything documented."""

import importlib
import inspect
import pkgutil
import pydoc
import re
import typing
from pathlib import Path

import pytest

import jaxprune

NAMESPACES = (
    "algebra",
    "choose",
    "distill",
    "export",
    "learned",
    "oneshot",
    "plot",
    "rules",
    "scores",
    "sites",
    "storage",
    "structured",
    "transforms",
)
# The names of the tour, by home.
TOUR = {
    "": "make_masks apply_masks summarize keep_pruned find_sites prune masks_in rigl calibrate_norms calibrate_grams "
    "sensitivity search_k save_sparse load_sparse",
    "rules": "layer_sparsity global_sparsity erk_sparsity row_sparsity n_m channels blocks",
    "scores": "saliency wanda",
    "oneshot": "reconstruct sparsegpt admm",
    "structured": "trace select_channels channel_masks shrink rebuild verify",
}


def homes() -> dict[str, list[str]]:
    """Every public name with the modules that have it: the package, its namespaces, no private module."""
    found: dict[str, list[str]] = {}
    for home in ("", *NAMESPACES):
        module = importlib.import_module(f"jaxprune.{home}".rstrip("."))
        for name in vars(module):
            if not name.startswith("_"):
                found.setdefault(name, []).append(home)
    return found


def public() -> dict[str, typing.Any]:
    """Every public object but the namespaces themselves, by its full name."""
    return {
        f"jaxprune.{home}.{name}".replace("..", "."): getattr(
            importlib.import_module(f"jaxprune.{home}".rstrip(".")), name
        )
        for name, (home, *_) in homes().items()
        if not inspect.ismodule(getattr(importlib.import_module(f"jaxprune.{home}".rstrip(".")), name))
    }


@pytest.mark.parametrize(("home", "name"), [(home, name) for home, names in TOUR.items() for name in names.split()])
def test_a_name_of_the_tour_has_one_home(home: str, name: str) -> None:
    assert homes()[name] == [home]


def test_no_name_has_two_homes() -> None:
    assert {name: where for name, where in homes().items() if len(where) > 1} == {}


def test_namespaces_leak_nothing_that_they_import() -> None:
    for home in ("", *NAMESPACES):
        module = importlib.import_module(f"jaxprune.{home}".rstrip("."))
        assert sorted(module.__all__) == sorted(name for name in vars(module) if not name.startswith("_"))
        for name in set(module.__all__) - {"jaxtyping"}:  # which the hook that checks shapes puts there
            thing = getattr(module, name)
            where = thing.__name__ if inspect.ismodule(thing) else getattr(thing, "__module__", "jaxprune")
            assert where.startswith("jaxprune"), f"{module.__name__}.{name} is of {where}"


def test_modules_are_public_namespaces_or_have_an_underscore() -> None:
    found = {module.name for module in pkgutil.walk_packages(jaxprune.__path__, "jaxprune.")}
    bare = {name for name in found if not any(part.startswith("_") for part in name.split(".")[1:])}
    assert bare == {*(f"jaxprune.{home}" for home in NAMESPACES), "jaxprune.plot.style"}


@pytest.mark.parametrize("name", sorted(public()))
def test_everything_public_is_documented(name: str) -> None:
    thing = public()[name]
    text = inspect.getdoc(thing)
    assert text, name
    assert not re.fullmatch(r"\w+\(.*\)", text), f"{name} has only the signature that dataclasses write"
    if inspect.isclass(thing):
        for attribute, member in vars(thing).items():
            if (not attribute.startswith("_") and isinstance(member, property)) or inspect.isfunction(member):
                assert inspect.getdoc(member) or attribute.startswith("_"), f"{name}.{attribute}"


def test_help_lists_the_functions() -> None:
    text = pydoc.plain(pydoc.render_doc(jaxprune))
    functions = text[text.index("\nFUNCTIONS\n") :]
    for name, thing in vars(jaxprune).items():
        if inspect.isfunction(thing) and not name.startswith("_"):
            assert re.search(rf"^    {name}\(", functions, re.MULTILINE), name


def test_the_version_is_that_of_the_project() -> None:
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert re.search(rf'^version = "{re.escape(jaxprune.__version__)}"$', text, re.MULTILINE)


@pytest.mark.parametrize(
    "name", [name for name, thing in public().items() if inspect.isfunction(inspect.unwrap(thing))]
)
def test_types_in_public_signatures_are_public(name: str) -> None:
    def classes(hint: typing.Any) -> typing.Iterator[type]:
        if inspect.isclass(hint) and not typing.get_args(hint):
            yield hint
        for part in typing.get_args(hint):
            yield from classes(part) if not isinstance(part, list) else (c for p in part for c in classes(p))

    known = set(map(id, public().values()))
    for argument, hint in inspect.get_annotations(inspect.unwrap(public()[name])).items():
        for found in classes(hint):
            if found.__module__.startswith("jaxprune"):
                assert id(found) in known, (
                    f"{name}({argument}) takes or gives {found.__qualname__}, which is not public"
                )


# Besides the first operands, what may be left out is named: these are operands that may be left out.
OPERANDS = {("save_sparse", "masks"), ("count_parameters", "plan"), ("count_bytes", "plan"), ("count_macs", "plan")}
# Where to draw, the last of what a figure is made of, as all who draw with matplotlib have it.
OPERANDS |= {
    (name, "ax") for name in ("accuracy", "churn", "mask", "sensitivity_curves", "sparsity_by_layer", "weights")
}


@pytest.mark.parametrize(
    "name", [name for name, thing in public().items() if inspect.isfunction(inspect.unwrap(thing))]
)
def test_optional_arguments_are_keyword_only(name: str) -> None:
    for parameter in inspect.signature(inspect.unwrap(public()[name])).parameters.values():
        if parameter.default is not inspect.Parameter.empty and (name.split(".")[-1], parameter.name) not in OPERANDS:
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, f"{name}({parameter.name}=...)"


@pytest.mark.parametrize("name", sorted(public()))
def test_one_word_for_one_thing(name: str) -> None:
    thing = inspect.unwrap(public()[name])
    if inspect.isfunction(thing) and not name.startswith("jaxprune.plot."):  # which draws what was measured
        # A strength is k, a function to look into is fn.
        assert not {"sparsity", "total", "amount", "ratio", "apply"} & set(inspect.signature(thing).parameters), name
