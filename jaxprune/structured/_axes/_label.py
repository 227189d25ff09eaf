"""Read a jaxpr once and find the terms of all axes: calls are opened, loops and branches are followed.

Terms are unified while the jaxpr is read and never afterwards; a term read early is seen as refined by all that follows.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._jaxpr import _equations, _records
from jaxprune._jaxpr._equations import Body, Equation
from jaxprune._jaxpr._primitives import COPIES, CUSTOM, LAYOUT, REMAT
from jaxprune.structured._axes import _elementwise, _indexing, _layout, _reductions
from jaxprune.structured._axes._choices import known_number, note_choice, note_compared, settle_choices
from jaxprune.structured._axes._dims import Dim, freeze, fresh, size, step_along, unify
from jaxprune.structured._axes._program import Node, Program, Rule, Value, free, opaque
from jaxprune.structured._axes._reasons import SCANNED

RULES: dict[str, Rule] = {
    **_elementwise.RULES,
    **_layout.RULES,
    **_reductions.RULES,
    **_indexing.RULES,
}


def label(body: Body, ins: Sequence[Value], *, differentiated: bool = False, caller: Equation | None = None) -> Program:
    """Give every axis in a jaxpr its term.

    Args:
        body: the jaxpr.
        ins: its arguments, with terms, which are refined.
        differentiated: whether it is a derivative already: functions with a derivative of their own are opened there,
            so that derivatives of the first order alone follow them.
        caller: the equation that it stands in.

    Returns:
        Its program.
    """
    nodes: list[Node] = []
    outs = _run(body, ins, nodes, differentiated, caller)
    program = Program(list(ins), nodes, outs)
    settle_choices(program)
    return program


def _run(
    body: Body, ins: Sequence[Value], nodes: list[Node], differentiated: bool, caller: Equation | None
) -> list[Value]:
    def step(number: int, equation: Equation, operands: list[Value]) -> list[Value]:
        del number
        equation = equation.called_by(caller)
        inner = _equations.call(equation)
        if inner is not None and equation.name not in REMAT and (differentiated or equation.name not in CUSTOM):
            return _run(inner, operands, nodes, differentiated, equation)
        node = Node(equation, operands)
        _label_node(node, inner, differentiated)
        nodes.append(node)
        return node.outs

    return _equations.interpret(body, ins, _constant, step)


def _constant(value: Any) -> Value:
    dims = tuple(free(np.shape(value)))
    return Value(np.shape(value), jnp.result_type(value), dims, const=value, uniform=known_number(value))


def _label_node(node: Node, inner: Body | None, differentiated: bool) -> None:
    if inner is not None:
        node.bodies = [label(inner, node.ins, differentiated=differentiated, caller=node.equation)]
        dims: Sequence[Sequence[Dim]] = [value.dims for value in node.bodies[0].outs]
    elif (scan := _equations.scan(node.equation)) is not None:
        dims = _scan(node, scan, differentiated)
    elif (loop := _equations.while_loop(node.equation)) is not None:
        dims = _while(node, loop, differentiated)
    elif (branches := _equations.branches(node.equation)) is not None:
        dims = _cond(node, branches, differentiated)
    else:
        node.notes.opaque = node.name not in RULES
        dims = RULES.get(node.name, opaque)(node)
    results = zip(node.shapes, node.equation.out_dtypes, dims, strict=True)
    node.outs = [Value(shape, dtype, tuple(terms)) for shape, dtype, terms in results]
    _note(node)
    if node.name in CUSTOM:
        assert inner is not None
        node.derivative = _pullback(node, inner) if "vjp" in node.name else _pushforward(node, inner)


def _same(values: Sequence[Value], others: Sequence[Value], reason: str) -> None:
    for value, other in zip(values, others, strict=True):
        for a, b in zip(value.dims, other.dims, strict=True):
            unify(a, b, reason)


# ---- loops and branches


def _scan(node: Node, scan: _equations.Scan, differentiated: bool) -> list[list[Dim]]:
    first, last = scan.consts, scan.consts + scan.carry
    consts, init, stacked = node.ins[:first], node.ins[first:last], node.ins[last:]
    steps = stacked[0].dims[0] if stacked else fresh(scan.length)
    for value in stacked[1:]:
        unify(steps, value.dims[0], node.because("a scan"))
    node.notes.steps = steps
    # Where a step is left out, what is carried passes by it: steps that take parameters are layers.
    if scan.carry and any(value.sources for value in stacked):
        step_along(steps)
    else:
        freeze(steps, node.because(SCANNED))
    slices = [Value(value.shape[1:], value.dtype, value.dims[1:], sources=value.sources) for value in stacked]
    moving = _plain(init)
    node.bodies = [
        label(scan.body, [*_plain(consts), *moving, *slices], differentiated=differentiated, caller=node.equation)
    ]
    outs = node.bodies[0].outs
    _same(outs[: scan.carry], init, node.because("what a scan carries"))
    return [*(list(v.dims) for v in init), *([steps, *v.dims] for v in outs[scan.carry :])]


def _while(node: Node, loop: _equations.While, differentiated: bool) -> list[list[Dim]]:
    first, last = loop.cond_consts, loop.cond_consts + loop.body_consts
    init = node.ins[last:]
    moving = _plain(init)
    node.bodies = [
        label(loop.cond, [*_plain(node.ins[:first]), *moving], differentiated=differentiated, caller=node.equation),
        label(loop.body, [*_plain(node.ins[first:last]), *moving], differentiated=differentiated, caller=node.equation),
    ]
    _same(node.bodies[1].outs, init, node.because("what a loop carries"))
    return [list(value.dims) for value in init]


def _cond(node: Node, branches: Sequence[Body], differentiated: bool) -> list[list[Dim]]:
    operands = _plain(node.ins[1:])
    node.bodies = [label(branch, operands, differentiated=differentiated, caller=node.equation) for branch in branches]
    for body in node.bodies[1:]:
        _same(node.bodies[0].outs, body.outs, node.because("the branches of a conditional"))
    return [list(value.dims) for value in node.bodies[0].outs]


def _plain(values: Sequence[Value]) -> list[Value]:
    """The same values as arguments of a body: what is constant outside need not be cut again inside, nor stay as it is at first."""
    return [dataclasses.replace(value, const=None, uniform=None, never=False, dealt=None) for value in values]


# ---- functions that bring a derivative of their own


def is_floating(value: Value) -> bool:
    """Whether a value has a derivative."""
    return bool(jnp.issubdtype(value.dtype, jnp.inexact))


def _evaluate(node: Node, inner: Body) -> Any:
    equation = node.equation.with_operands_of(inner)
    return lambda values: _equations.evaluate(equation, values)


def _shapes(values: Sequence[Value]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in values]


def _floats_only(node: Node, inner: Body, primals: Sequence[Any], wanted: Sequence[int]) -> Any:
    """The function of the floating-point operands alone, with the results that are `wanted`."""
    evaluate = _evaluate(node, inner)
    floating = [i for i, value in enumerate(node.ins) if is_floating(value)]

    def fn(*floats: Any) -> list[Any]:
        values = list(primals)
        for i, value in zip(floating, floats, strict=True):
            values[i] = value
        results = evaluate(values)
        return [results[i] for i in wanted]

    return fn, [primals[i] for i in floating]


def differentiable(node: Node) -> list[int]:
    """Return the results that have a derivative and are used."""
    used = zip(node.outs, node.equation.used, strict=True)
    return [i for i, (value, is_used) in enumerate(used) if is_floating(value) and is_used]


def _pushforward(node: Node, inner: Body) -> Program:
    """The program of operands and their tangents to results' tangents."""
    wanted = differentiable(node)
    moving = [value for value in node.ins if is_floating(value)]

    def jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
        fn, floats = _floats_only(node, inner, primals, wanted)
        return jax.jvp(fn, tuple(floats), tuple(tangents))[1]

    body, _ = _equations.trace(jvp, _shapes(node.ins), _shapes(moving))
    program = label(body, _plain([*node.ins, *moving]), differentiated=True, caller=node.equation)
    _same(program.outs, [node.outs[i] for i in wanted], node.because("a derivative"))
    return program


def _pullback(node: Node, inner: Body) -> Program:
    """The program of operands and results' cotangents to operands' cotangents."""
    wanted = differentiable(node)
    moving = [value for value in node.ins if is_floating(value)]
    results = [node.outs[i] for i in wanted]

    def vjp(primals: Sequence[Any], cotangents: Sequence[Any]) -> Any:
        fn, floats = _floats_only(node, inner, primals, wanted)
        return jax.vjp(fn, *floats)[1](list(cotangents))

    body, _ = _equations.trace(vjp, _shapes(node.ins), _shapes(results))
    program = label(body, _plain([*node.ins, *results]), differentiated=True, caller=node.equation)
    _same(program.outs, moving, node.because("a derivative"))
    return program


# ---- what is worth remembering


def _note(node: Node) -> None:
    """Remember what was summed over, divisions of a sum by how many were summed (a mean), layouts, chosen numbers."""
    if node.name in ("reduce_sum", "psum"):
        node.outs[0].summed = tuple(node.ins[0].dims[axis] for axis in _records.axes(node.equation))
        node.outs[0].dealt = node.ins[0].dealt
    elif node.name in LAYOUT or node.name == "dynamic_slice":
        origins = node.ins if node.name in COPIES else node.ins[:1] * len(node.outs)
        for value, origin in zip(node.outs, origins, strict=True):
            value.summed, value.sources, value.numbering = origin.summed, origin.sources, origin.numbering
            value.dealt, value.uniform = origin.dealt, origin.uniform
    elif node.name in ("concatenate", "stack"):
        node.outs[0].sources = tuple(dict.fromkeys(source for value in node.ins for source in value.sources))
    elif node.name == "iota":
        (along,) = _records.axes(node.equation)
        node.outs[0].numbering = node.outs[0].dims[along]
    elif node.name == "eq":
        note_compared(node)
    elif node.name == "div" and node.ins[0].summed is not None:
        count = node.ins[1].const
        if count is not None and np.ndim(count) == 0 and float(count) == math.prod(map(size, node.ins[0].summed)):
            node.notes.count = node.ins[0].summed
    note_choice(node)
