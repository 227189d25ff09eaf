"""Evaluate a jaxpr for several batches in lockstep, twice: with the parameters as given, and as they become.

Values of parameters and constants alone are made when they are needed, so that a parameter that was replaced meanwhile
is seen as it is now. Equations are evaluated one by one; compiled pieces (a jitted softmax, a scan) stay compiled.
"""

import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxprune._jaxpr import _equations
from jaxprune._jaxpr._equations import Body, Equation
from jaxprune.sites._walk import Place


class Weights:
    """The leaves of the parameters, as given (`dense`) and as they are now (`current`)."""

    def __init__(self, dense: list[Any], current: list[Any]) -> None:
        self.dense = dense
        self.current = current
        self._versions = [int(new is not old) for new, old in zip(current, dense, strict=True)]

    def leaf(self, position: int, dense: bool) -> Any:
        """Return a leaf, as given or as it is now."""
        return (self.dense if dense else self.current)[position]

    def replace(self, position: int, leaf: Any) -> None:
        """Replace a leaf."""
        self.current[position] = leaf
        self._versions[position] += 1

    def version(self, leaves: frozenset[int]) -> tuple[int, ...]:
        """Return a number for each leaf that changes when it is replaced; zeros are the leaf as given."""
        return tuple(self._versions[i] for i in sorted(leaves))


@dataclasses.dataclass(frozen=True, eq=False)
class Lane:
    """A value that depends on data: one array for each batch; where nothing differs yet, both are the same list."""

    current: list[Any]
    dense: list[Any]


class Made:
    """A value of parameters and constants alone, made when it is needed."""

    def __init__(self, leaves: frozenset[int], make: Callable[[bool], Any]) -> None:
        self.leaves = leaves
        self._make = make
        self._kept: dict[tuple[int, ...], Any] = {}

    def value(self, weights: Weights, dense: bool) -> Any:
        """Return the value, dense or as it is now; it is kept until a leaf it is made of changes."""
        version = (0,) * len(self.leaves) if dense else weights.version(self.leaves)
        if version not in self._kept:
            original = {key: kept for key, kept in self._kept.items() if not any(key)}
            self._kept = {**original, version: self._make(dense)}
        return self._kept[version]


Lanes = tuple[Lane, ...]


@dataclasses.dataclass(eq=False)
class Stop:
    """A planned use of a parameter that is about to be evaluated.

    Attributes:
        place: of the equation.
        number: of the use there.
        layers: of the scans around it.
        equation: the equation.
        data: those of its operands that were asked for.
        stream: what its result is added to, where that is known by now; else None.
        result: its result, None before it is known.
        total: the sum with the stream, None before it is known.
    """

    place: Place
    number: int
    layers: tuple[int, ...]
    equation: Equation
    data: Lanes
    stream: Lane | None
    result: Lane | None = None
    total: Lane | None = None


_Stops = Generator[Stop, None, list[Any]]


class Lockstep:
    """An evaluation that stops at planned uses of parameters, with the data of all batches at hand.

    Args:
        weights: the parameters, which may be replaced at every stop.
        planned: (place, number) of the uses to stop at, and which operands are their data; scans around them are gone
            through layer by layer.
        dense: whether to evaluate with the parameters as given as well; else both are as they become.
    """

    def __init__(self, weights: Weights, planned: Mapping[tuple[Place, int], Sequence[int]], *, dense: bool) -> None:
        self._weights = weights
        self._dense = dense
        self._planned: dict[Place, dict[int, Sequence[int]]] = {}
        for place, number in sorted(planned):
            self._planned.setdefault(place, {})[number] = planned[place, number]
        self._around = {place[:n] for place in self._planned for n in range(len(place))}

    def stops(self, body: Body, inputs: Sequence[list[Any]]) -> Iterator[Stop]:
        """Evaluate a jaxpr of all leaves, then the inputs, of which each is a list with an array for each batch."""
        self._batches = len(inputs[0])
        leaves = [
            Made(frozenset([i]), functools.partial(self._weights.leaf, i)) for i in range(len(self._weights.dense))
        ]
        return self._body(body, [*leaves, *(Lane(arrays, arrays) for arrays in inputs)], (), ())

    def _body(self, body: Body, arguments: Sequence[Any], place: Place, layers: tuple[int, ...]) -> _Stops:
        values = _equations.Values(body, arguments, _constant)
        waiting: dict[int, list[Stop]] = {}
        for number, equation, operands in values.steps():
            at, stops = (*place, number), []
            for use, wanted in self._planned.get(at, {}).items():
                ahead, stream = values.stream(number, lambda value: isinstance(value, Lane)) or (number, None)
                data = tuple(self._as_lane(operands[i]) for i in wanted)
                stop = Stop(at, use, layers, equation, data, stream)
                yield stop
                stops.append(stop)
                if stream is not None:
                    waiting.setdefault(ahead, []).append(stop)
            results = yield from self._opened(equation, operands, at, layers)
            for stop in stops:
                stop.result = results[0]
            for stop in waiting.pop(number, ()):
                stop.total = results[0]
            values.put(number, results)
        return values.results()

    def _opened(self, equation: Equation, operands: list[Any], place: Place, layers: tuple[int, ...]) -> _Stops:
        if place in self._around:
            if (inner := _equations.call(equation)) is not None:
                return (yield from self._body(inner, operands, place, layers))
            if (scan := _equations.scan(equation)) is not None:
                return (yield from self._scan(scan, operands, place, layers))
        return self._equation(equation, operands)

    def _equation(self, equation: Equation, operands: list[Any]) -> list[Any]:
        if not any(isinstance(operand, Lane) for operand in operands):
            return self._later(equation, operands)
        current = self._evaluate(equation, operands, dense=False)
        moved = self._dense and any(
            operand.current is not operand.dense
            if isinstance(operand, Lane)
            else any(self._weights.version(operand.leaves))
            for operand in operands
        )
        dense = self._evaluate(equation, operands, dense=True) if moved else current
        return [Lane(*arrays) for arrays in zip(current, dense, strict=True)]

    def _as_lane(self, operand: Lane | Made) -> Lane:
        """A value as data; what parameters alone make (a learned query) is the same for every batch."""
        if isinstance(operand, Lane):
            return operand
        current = [operand.value(self._weights, False)] * self._batches
        moved = self._dense and any(self._weights.version(operand.leaves))
        return Lane(current, [operand.value(self._weights, True)] * self._batches if moved else current)

    def _evaluate(self, equation: Equation, operands: list[Any], *, dense: bool) -> list[list[Any]]:
        count = next(len(operand.current) for operand in operands if isinstance(operand, Lane))
        fixed = [None if isinstance(o, Lane) else o.value(self._weights, dense) for o in operands]
        results = []
        for batch in range(count):
            values = [
                (o.dense if dense else o.current)[batch] if isinstance(o, Lane) else value
                for o, value in zip(operands, fixed, strict=True)
            ]
            results.append(_equations.evaluate(equation, values))
        return list(map(list, zip(*results, strict=True)))

    def _scan(self, scan: _equations.Scan, operands: list[Any], place: Place, layers: tuple[int, ...]) -> _Stops:
        cut = scan.consts + scan.carry
        consts, carry, stacked = operands[: scan.consts], operands[scan.consts : cut], operands[cut:]
        steps = range(scan.length)
        outputs: list[list[Any]] = []
        for i in reversed(steps) if scan.reverse else steps:
            slices = [self._entry(operand, i) for operand in stacked]
            results = yield from self._body(scan.body, [*consts, *carry, *slices], place, (*layers, i))
            carry = results[: scan.carry]
            outputs.append(results[scan.carry :])
        if scan.reverse:
            outputs.reverse()
        return carry + [self._stack(parts) for parts in zip(*outputs, strict=True)]

    def _later(self, equation: Equation, operands: list[Made]) -> list[Made]:
        """The results of an equation without data, made all at once when one of them is needed."""
        leaves = frozenset[int]().union(*(operand.leaves for operand in operands))
        weights = self._weights
        made = Made(
            leaves,
            lambda dense: _equations.evaluate(equation, [operand.value(weights, dense) for operand in operands]),
        )
        return [self._entry(made, i) for i in range(len(equation.out_shapes))]

    def _entry(self, operand: Any, i: int) -> Any:
        if isinstance(operand, Made):
            return Made(operand.leaves, lambda dense: operand.value(self._weights, dense)[i])
        return _mapped(lambda x: x[i], operand)

    def _stack(self, parts: Sequence[Any]) -> Any:
        lanes = [part for part in parts if isinstance(part, Lane)]
        weights = self._weights
        if not lanes:
            leaves = frozenset[int]().union(*(part.leaves for part in parts))
            return Made(leaves, lambda dense: jnp.stack([part.value(weights, dense) for part in parts]))
        batches = range(len(lanes[0].current))

        def stacked(dense: bool) -> list[Any]:
            arrays = [
                (part.dense if dense else part.current)
                if isinstance(part, Lane)
                else [part.value(weights, dense)] * len(batches)
                for part in parts
            ]
            return [jnp.stack([layer[batch] for layer in arrays]) for batch in batches]

        current = stacked(False)
        moved = any(lane.current is not lane.dense for lane in lanes)
        return Lane(current, stacked(True) if moved else current)


def _constant(value: Any) -> Made:
    return Made(frozenset(), lambda _: value)


def _mapped(function: Callable[[Any], Any], lane: Lane) -> Lane:
    current = list(map(function, lane.current))
    return Lane(current, current if lane.dense is lane.current else list(map(function, lane.dense)))
