"""Evaluate a jaxpr equation by equation, and take a measurement wherever data meets a parameter."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._jaxpr import _equations
from jaxprune._jaxpr._equations import Body, Equation
from jaxprune._jaxpr._primitives import LAYOUT
from jaxprune.sites._contractions import Contraction, Use, recognise
from jaxprune.sites._origins import CONSTANT, DATA, Origin, Uses, as_data, propagate
from jaxprune.sites._pieces import Frame

# Where an equation stands: its number, and those of the equations around it.
Place = tuple[int, ...]
# (contraction, the operands that are data) -> a tree of arrays whose leading axis numbers the matrices.
Measure = Callable[[Contraction, Sequence[Any]], Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Tracked:
    """A value at run time, and where it comes from."""

    value: Any
    origin: Origin


@dataclasses.dataclass
class Log:
    """What was seen on the way; places are the same in every run, so that a second run changes nothing.

    Attributes:
        found: for each place, and each parameter there, the use and the place where its input was first met.
        uses: what became of the parameters besides.
    """

    found: dict[tuple[Place, int], tuple[Use, Place]] = dataclasses.field(default_factory=dict)
    uses: Uses = dataclasses.field(default_factory=Uses)


@dataclasses.dataclass
class _Scope:
    """One level of tracing: the top, or the body of a loop or a branch.

    Attributes:
        inputs: where each input was first met, by the identity of the data, the contraction and the frames.
        layouts: results of layout operations on data, so that the same cast of the same input stays one input.
        measured: the measurements so far, each with the frames it has yet to leave.
        held: keeps alive what is known by its identity.
    """

    inputs: dict[Any, Place] = dataclasses.field(default_factory=dict)
    layouts: dict[Any, list[Tracked]] = dataclasses.field(default_factory=dict)
    measured: dict[Place, tuple[Any, tuple[Frame, ...]]] = dataclasses.field(default_factory=dict)
    held: list[Any] = dataclasses.field(default_factory=list)


class Walk:
    """An evaluation of jaxprs with a measurement at every place where data meets a parameter for the first time.

    Args:
        measure: takes the measurement; sums of what it returns are kept.
        wanted: whether to measure at a place.
        log: takes note of what is seen.
    """

    def __init__(self, measure: Measure, wanted: Callable[[Place], bool], log: Log) -> None:
        self._measure = measure
        self._wanted = wanted
        self._log = log

    def run(self, body: Body, arguments: Sequence[Tracked]) -> tuple[list[Tracked], dict[Place, Any]]:
        """Evaluate a jaxpr; return its results, and the measurements by place.

        A measurement has one leading axis for each `Each` of the parameter's view, then what `measure` returned.
        """
        scope = _Scope()
        results = self._body(body, arguments, scope, ())
        return results, {place: found for place, (found, _) in scope.measured.items()}

    def _body(self, body: Body, arguments: Sequence[Tracked], scope: _Scope, place: Place) -> list[Tracked]:
        def step(number: int, equation: Equation, operands: list[Tracked]) -> list[Tracked]:
            return self._equation(equation, operands, scope, (*place, number))

        return _equations.interpret(body, arguments, lambda array: Tracked(array, CONSTANT), step)

    def _equation(self, equation: Equation, operands: list[Tracked], scope: _Scope, place: Place) -> list[Tracked]:
        if (inner := _equations.call(equation)) is not None:
            return self._body(inner, operands, scope, place)
        if (scan := _equations.scan(equation)) is not None and scan.length > 0:
            return self._scan(scan, operands, scope, place)
        if (loop := _equations.while_loop(equation)) is not None:
            return self._while(loop, operands, scope, place)
        if (branches := _equations.branches(equation)) is not None:
            return self._cond(branches, operands, scope, place)
        key = _layout_key(equation, operands)
        if key is not None and key in scope.layouts:
            return scope.layouts[key]
        origins = as_data(equation, [operand.origin for operand in operands], self._log.uses)
        uses = recognise(equation, origins)
        for number, use in enumerate(uses):
            self._site(use, [operands[i] for i in use.operands], scope, place, number)
        results = _equations.evaluate(equation, [operand.value for operand in operands])
        if uses:
            known = _contracted(len(results), origins, uses)
            if any(origin.one_hot for origin in origins):
                self._log.uses.reads(frozenset(use.piece.view.leaf for use in uses))
        else:
            known = propagate(equation, origins, [operand.value for operand in operands], self._log.uses)
        found = [Tracked(result, origin) for result, origin in zip(results, known, strict=True)]
        if key is not None:
            scope.layouts[key] = found
            scope.held += operands
        return found

    def _site(self, use: Use, data: list[Tracked], scope: _Scope, place: Place, number: int) -> None:
        key = (tuple(map(id, data)), use.contraction, use.piece.frames)
        scope.held += data
        # The first place of an input is told apart where one equation has several.
        first = scope.inputs.setdefault(key, (*place, number))
        self._log.found[place, number] = use, first
        if first in scope.measured or not self._wanted(first):
            return
        measured = self._measure(use.contraction, [value.value for value in data])
        _add(scope, first, measured, use.piece.frames)

    def _scan(self, scan: _equations.Scan, operands: list[Tracked], scope: _Scope, place: Place) -> list[Tracked]:
        consts, init, stacked = _split(operands, scan.consts, scan.carry)
        frame = Frame(scan.length)
        frames: dict[Place, tuple[Frame, ...]] = {}

        def step(carry: Sequence[Any], slices: Sequence[Any], known: Sequence[Origin]) -> tuple[Any, Any, Any, Any]:
            inner = _Scope()
            arguments = [
                *consts,
                *(Tracked(value, origin) for value, origin in zip(carry, known, strict=True)),
                *(Tracked(value, _sliced(whole.origin, frame)) for value, whole in zip(slices, stacked, strict=True)),
            ]
            results = self._body(scan.body, arguments, inner, place)
            frames.update({at: left for at, (_, left) in inner.measured.items()})
            here = {at: m for at, (m, left) in inner.measured.items() if left and left[-1] is frame}
            summed = {at: m for at, (m, _) in inner.measured.items() if at not in here}
            return results, [arguments[scan.consts + i] for i in range(scan.carry)], summed, here

        values = [operand.value for operand in stacked]
        slices = [jax.eval_shape(lambda x: jax.lax.index_in_dim(x, 0, keepdims=False), value) for value in values]
        known, dry, sums = _settle(step, init, slices, scan.carry)

        def body(state: Any, slices: Any) -> tuple[Any, Any]:
            carry, total = state
            results, _, summed, here = step(carry, slices, known)
            outputs = [result.value for result in results]
            return (outputs[: scan.carry], _plus(total, summed)), (outputs[scan.carry :], here)

        state = ([operand.value for operand in init], _zeros(sums))
        (carry, total), (ys, per_step) = jax.lax.scan(
            body, state, values, scan.length, reverse=scan.reverse, unroll=scan.unroll
        )
        for at, measured in total.items():
            _add(scope, at, measured, frames[at])
        for at, measured in per_step.items():
            _add(scope, at, measured, frames[at][:-1])
        origins = [*known, *(_stacked(origin) for origin in dry[scan.carry :])]
        return [Tracked(value, origin) for value, origin in zip([*carry, *ys], origins, strict=True)]

    def _while(self, loop: _equations.While, operands: list[Tracked], scope: _Scope, place: Place) -> list[Tracked]:
        cond_consts, body_consts, init = _split(operands, loop.cond_consts, loop.body_consts)
        for operand in cond_consts:
            self._log.uses.unknown(operand.origin.leaves, "it enters the condition of a while loop")
        frames: dict[Place, tuple[Frame, ...]] = {}

        def step(carry: Sequence[Any], _: Sequence[Any], known: Sequence[Origin]) -> tuple[Any, Any, Any, Any]:
            inner = _Scope()
            moving = [Tracked(value, origin) for value, origin in zip(carry, known, strict=True)]
            results = self._body(loop.body, [*body_consts, *moving], inner, place)
            frames.update({at: left for at, (_, left) in inner.measured.items()})
            return results, moving, {at: m for at, (m, _) in inner.measured.items()}, {}

        known, _, sums = _settle(step, init, [], len(init))

        def condition(state: Any) -> Any:
            values = [*(const.value for const in cond_consts), *state[0]]
            return _equations.evaluate_body(loop.cond, values)[0]

        def body(state: Any) -> Any:
            carry, total = state
            results, _, summed, _ = step(carry, [], known)
            return [result.value for result in results], _plus(total, summed)

        start = ([operand.value for operand in init], _zeros(sums))
        carry, total = jax.lax.while_loop(condition, body, start)
        for at, measured in total.items():
            _add(scope, at, measured, frames[at])
        return [Tracked(value, origin) for value, origin in zip(carry, known, strict=True)]

    def _cond(self, branches: list[Body], operands: list[Tracked], scope: _Scope, place: Place) -> list[Tracked]:
        index, *rest = operands
        frames: dict[Place, tuple[Frame, ...]] = {}
        origins: list[list[Origin]] = []

        def run(number: int, body: Body, values: Sequence[Any]) -> tuple[list[Any], dict[Place, Any]]:
            inner = _Scope()
            arguments = [Tracked(value, operand.origin) for value, operand in zip(values, rest, strict=True)]
            results = self._body(body, arguments, inner, (*place, number))
            frames.update({at: left for at, (_, left) in inner.measured.items()})
            origins.append([result.origin for result in results])
            return [r.value for r in results], {at: m for at, (m, _) in inner.measured.items()}

        values = [operand.value for operand in rest]
        sums: dict[Place, Any] = {}
        for number, body in enumerate(branches):
            sums.update(jax.eval_shape(lambda *v, n=number, b=body: run(n, b, v), *values)[1])
        known = [_either(choices, index.origin) for choices in zip(*origins, strict=True)]

        def branch(number: int, body: Body) -> Callable[..., Any]:
            def taken(*values: Any) -> tuple[list[Any], dict[Place, Any]]:
                results, summed = run(number, body, values)
                return results, {at: summed.get(at, zero) for at, zero in _zeros(sums).items()}

            return taken

        results, total = jax.lax.switch(index.value, [branch(*entry) for entry in enumerate(branches)], *values)
        for at, measured in total.items():
            _add(scope, at, measured, frames[at])
        return [Tracked(value, origin) for value, origin in zip(results, known, strict=True)]


def _contracted(count: int, origins: Sequence[Origin], uses: Sequence[Use]) -> list[Origin]:
    """The origins of the results of a site: data; of a table, rows of it."""
    rows = origins[0].leaves if uses[0].operation == "gather" else frozenset[int]()
    return [dataclasses.replace(DATA, rows=rows)] * count


def _layout_key(equation: Equation, operands: Sequence[Tracked]) -> Any:
    if equation.name not in LAYOUT or not any(operand.origin.data for operand in operands):
        return None
    return equation.name, equation.settings, tuple(map(id, operands))


def _split(operands: Sequence[Tracked], first: int, second: int) -> tuple[list[Tracked], list[Tracked], list[Tracked]]:
    cut = first + second
    return list(operands[:first]), list(operands[first:cut]), list(operands[cut:])


def _settle(
    step: Callable[..., Any], init: Sequence[Tracked], slices: Sequence[Any], count: int
) -> tuple[list[Origin], list[Origin], dict[Place, Any]]:
    """Find the origins of a loop's carry, which may depend on what the loop does; and the shapes of its sums.

    Starts from the initial values and repeats while a step makes an origin worse; there are few steps to fall.
    """
    known = [operand.origin for operand in init]
    while True:
        found, worse, sums = _dry(step, init, slices, known, count)
        if worse == known:
            return known, found, sums
        known = worse


def _dry(
    step: Callable[..., Any], init: Sequence[Tracked], slices: Sequence[Any], known: list[Origin], count: int
) -> tuple[list[Origin], list[Origin], dict[Place, Any]]:
    """Trace one step of a loop: the origins of its results, those of its carry afterwards, and its sums' shapes."""
    found: list[Origin] = []
    after: list[Origin] = []

    def trace(carry: Sequence[Any], slices: Sequence[Any]) -> Any:
        results, moving, summed, _ = step(carry, slices, known)
        found.extend(result.origin for result in results)
        for old, before, result in zip(known, moving, results[:count], strict=True):
            after.append(old if result is before else _joined(old, result.origin))
        return summed

    sums = jax.eval_shape(trace, [operand.value for operand in init], list(slices))
    return found, after, sums


def _joined(before: Origin, after: Origin) -> Origin:
    """The origin of a value that is now one, now the other."""
    if before == after:
        return before
    if before.data or after.data:
        return DATA
    leaves = before.leaves | after.leaves
    return Origin(leaves=leaves, lost=(before.lost or after.lost or "a loop") if leaves else "")


def _either(choices: Sequence[Origin], index: Origin) -> Origin:
    """The origin of a conditional's result."""
    if any(choice.data for choice in choices):
        return DATA
    if all(choice == choices[0] for choice in choices):
        return choices[0]
    leaves = frozenset[int]().union(*(choice.leaves for choice in choices))
    return Origin(data=index.data and not leaves, leaves=leaves, lost="cond" if leaves else "")


def _sliced(origin: Origin, frame: Frame) -> Origin:
    """The origin of one step's slice of what is scanned over."""
    if origin.data:
        return DATA
    return origin.laid_out("concatenate and scan", lambda piece: piece.each(frame))


def _stacked(origin: Origin) -> Origin:
    """The origin of what a scan stacks up."""
    return DATA if origin.data else origin.without_view("scan") if origin.leaves else CONSTANT


def _zeros(shapes: dict[Place, Any]) -> dict[Place, Any]:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def _plus(total: dict[Place, Any], new: dict[Place, Any]) -> dict[Place, Any]:
    return jax.tree.map(jnp.add, total, new)


def _add(scope: _Scope, place: Place, measured: Any, frames: tuple[Frame, ...]) -> None:
    """Keep a measurement; where a layer was chosen by an index, give it its place among all layers."""
    while frames and frames[-1].index is not None:
        measured = jax.tree.map(functools.partial(_placed, frames[-1]), measured)
        frames = frames[:-1]
    scope.measured[place] = measured, frames


def _placed(frame: Frame, measured: jax.Array) -> jax.Array:
    index = jnp.clip(frame.index, 0, frame.size - 1)
    return jnp.zeros((frame.size, *measured.shape), measured.dtype).at[index].set(measured)
