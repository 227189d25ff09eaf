"""The seam: nothing outside of `jaxprune/_jaxpr` looks inside the equations of a jaxpr, and kinds of primitives are apart."""

import ast
from pathlib import Path

import jaxprune
from jaxprune._jaxpr import _primitives as kinds

ROOT = Path(jaxprune.__file__).parent
INSIDE = {"eqn", "eqns", "primitive", "aval", "invars", "outvars", "constvars"}


def test_nothing_else_looks_inside_an_equation():
    looks = [
        f"{path.relative_to(ROOT)}:{node.lineno} .{node.attr}"
        for path in ROOT.rglob("*.py")
        if path.parent.name != "_jaxpr"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in INSIDE
    ]
    assert not looks


def test_a_primitive_is_of_one_kind():
    groups = [
        kinds.CALLS, kinds.LAYOUT, kinds.JOINS, kinds.ELEMENTWISE, kinds.CONTRACTIONS, kinds.REDUCTIONS,
        kinds.ARG_REDUCTIONS, kinds.CUMULATIVE, kinds.WINDOWED, kinds.GENERATED,
    ]  # fmt: skip
    assert len(frozenset().union(*groups)) == sum(map(len, groups))
