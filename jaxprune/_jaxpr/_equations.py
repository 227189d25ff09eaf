"""All that differs between versions of jax in how a jaxpr is read; with `_records`, what looks inside equations."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax
from jax import lax
from jax.extend import core
from jax.interpreters import partial_eval
from jax.sharding import AxisType, NamedSharding

from jaxprune._jaxpr._primitives import CALLS, COPIES, DEVICES, RESHAPES, SUMS

Held = TypeVar("Held")

# Whose code says nothing of where in the function an equation comes from.
_OURS = tuple(str(Path(module).parent) for module in (jax.__file__, __file__))


class Body(NamedTuple):
    """A jaxpr inside an equation: its variables and equations, and the values of its constants."""

    jaxpr: Any
    consts: Sequence[Any]

    @property
    def arguments(self) -> list[jax.ShapeDtypeStruct]:
        """The shapes and dtypes of its arguments."""
        return [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in self.jaxpr.invars]


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
    """An equation, the jaxpr that it stands in, and the equation that calls that one, if it is known."""

    eqn: Any
    jaxpr: Any
    caller: "Equation | None" = None

    @property
    def name(self) -> str:
        """The name of its primitive."""
        return self.eqn.primitive.name

    @property
    def in_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of its operands."""
        return [tuple(atom.aval.shape) for atom in self.eqn.invars]

    @property
    def out_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of its results."""
        return [tuple(var.aval.shape) for var in self.eqn.outvars]

    @property
    def out_dtypes(self) -> list[Any]:
        """The dtypes of its results."""
        return [var.aval.dtype for var in self.eqn.outvars]

    @property
    def in_dtypes(self) -> list[Any]:
        """The dtypes of its operands."""
        return [atom.aval.dtype for atom in self.eqn.invars]

    @property
    def used(self) -> list[bool]:
        """Of each result whether it is used."""
        return [not _is_dropped(var) for var in self.eqn.outvars]

    @property
    def params(self) -> dict[str, Any]:
        """Its parameters, by name."""
        return dict(self.eqn.params)

    @property
    def settings(self) -> str:
        """Its parameters as text, the same for equations that do the same."""
        return str(sorted(self.eqn.params.items(), key=lambda entry: entry[0]))

    @property
    def place(self) -> str:
        """Where the function makes it: file, line and function; inside of what jax jits, where that is called; else empty."""
        traceback = self.eqn.source_info.traceback
        for frame in traceback.frames if traceback is not None else ():
            if not frame.file_name.startswith(_OURS):
                return f"{Path(frame.file_name).name}:{frame.line_num}, {frame.function_name}"
        return self.caller.place if self.caller is not None else ""

    def surroundings(self) -> AbstractContextManager[Any]:
        """Return a context in which its operands can be computed with: where it was traced, the mesh may be another."""
        return self.eqn.ctx.manager

    def called_by(self, caller: "Equation | None") -> "Equation":
        """The equation, as one of a jaxpr that another one calls."""
        return dataclasses.replace(self, caller=caller)

    def with_params(self, **params: Any) -> "Equation":
        """The equation with some parameters changed."""
        return dataclasses.replace(self, eqn=self.eqn.replace(params={**self.eqn.params, **params}))

    def with_operands_of(self, body: Body) -> "Equation":
        """The equation with a body's arguments for operands: as many, all variables, and no two the same one."""
        return dataclasses.replace(self, eqn=self.eqn.replace(invars=body.jaxpr.invars))


class Scan(NamedTuple):
    """The parts of a scan: how many operands are constants, carry and sliced, and its settings."""

    consts: int
    carry: int
    body: Body
    length: int
    reverse: bool
    unroll: Any


class While(NamedTuple):
    """The parts of a while loop: how many operands belong to the condition and to the body alone."""

    cond_consts: int
    body_consts: int
    cond: Body
    body: Body


def per_device(name: str) -> str | None:
    """Say what to pass instead where a primitive deals work out to devices; None where it does not."""
    if name not in DEVICES:
        return None
    return (
        f"{name}, by which jax.pmap and jax.shard_map deal work out to devices, and which is not looked into; pass the function "
        "that they map, with one device's inputs"
    )


def trace(fn: Any, *arguments: Any) -> tuple[Body, Any]:
    """Return the jaxpr of ``fn(*arguments)`` and the tree of its results' shapes."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*arguments)
    return _body(closed), shapes


def _body(jaxpr: Any) -> Body:
    # Since jax 0.11 a closed jaxpr is a jaxpr that has its constants; the body of remat never has any.
    return Body(getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ()))


def without_dead_code(body: Body) -> Body:
    """Return a jaxpr without what no result depends on, inside of loops, branches and calls too; arguments all stay."""
    jaxpr, _ = partial_eval.dce_jaxpr(body.jaxpr, [True] * len(body.jaxpr.outvars), instantiate=True)
    return Body(jaxpr, body.consts)


def call(equation: Equation) -> Body | None:
    """Return the body of an equation that only wraps one, else None."""
    if equation.name not in CALLS:
        return None
    params = equation.eqn.params
    return _body(next(params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in params))


def scan(equation: Equation) -> Scan | None:
    """Return the parts of a scan, None of any other equation."""
    if equation.name != "scan":
        return None
    params = equation.eqn.params
    if "ft_in" in params:  # since jax 0.11
        consts, carry, _ = map(list, params["ft_in"].update(list(range(len(equation.eqn.invars)))).unpack())
        counts = len(consts), len(carry)
    else:
        counts = params["num_consts"], params["num_carry"]
    return Scan(*counts, _body(params["jaxpr"]), int(params["length"]), params["reverse"], params["unroll"])


def while_loop(equation: Equation) -> While | None:
    """Return the parts of a while loop, None of any other equation."""
    if equation.name != "while":
        return None
    params = equation.eqn.params
    counts = params["cond_nconsts"], params["body_nconsts"]
    return While(*counts, _body(params["cond_jaxpr"]), _body(params["body_jaxpr"]))


def branches(equation: Equation) -> list[Body] | None:
    """Return the branches of a cond (a switch), None of any other equation."""
    return [_body(branch) for branch in equation.eqn.params["branches"]] if equation.name == "cond" else None


def everywhere(jaxpr: Any, caller: Equation | None = None) -> Iterator[Equation]:
    """Yield the equations of a jaxpr, as ``jax.jit(fn).trace(...)`` has it, and those of every jaxpr inside of one."""
    for eqn in _body(jaxpr).jaxpr.eqns:
        equation = Equation(eqn, jaxpr, caller)
        yield equation
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from everywhere(value, equation)


def _is_jaxpr(value: Any) -> bool:
    return hasattr(value, "eqns")


def _is_dropped(var: Any) -> bool:
    return type(var).__name__ == "DropVar"


class Values(Generic[Held]):
    """The values of a jaxpr, of any kind, as they become known; each is forgotten as soon as nothing needs it any more.

    Args:
        body: the jaxpr.
        arguments: the values of its arguments.
        constant: makes a value of a constant array.
    """

    def __init__(self, body: Body, arguments: Sequence[Held], constant: Callable[[Any], Held]) -> None:
        self._jaxpr = body.jaxpr
        self._constant = constant
        self._known = dict(zip(body.jaxpr.constvars, map(constant, body.consts), strict=True))
        self._known.update(zip(body.jaxpr.invars, arguments, strict=True))
        self._last = _last_uses(body.jaxpr)

    def steps(self) -> Iterator[tuple[int, Equation, list[Held]]]:
        """Yield the number of each equation, the equation and its operands; `put` its results before the next one."""
        for number, eqn in enumerate(self._jaxpr.eqns):
            yield number, Equation(eqn, self._jaxpr), [self._read(atom) for atom in eqn.invars]

    def put(self, number: int, results: Sequence[Held]) -> None:
        """Take note of an equation's results."""
        self._known.update(zip(self._jaxpr.eqns[number].outvars, results, strict=True))
        for var in self._last.get(number, ()):
            del self._known[var]

    def results(self) -> list[Held]:
        """Return the jaxpr's results."""
        return [self._read(atom) for atom in self._jaxpr.outvars]

    def stream(self, number: int, is_data: Callable[[Held], bool]) -> tuple[int, Held] | None:
        """Return which equation adds the one result of another to data that is known already, and that data.

        Copies, reshapes and sums with what is no data (a bias) may come first. None where the result goes elsewhere.

        Args:
            number: of the equation that has the result.
            is_data: whether a value is data, or made of parameters and constants alone.
        """
        (result,) = self._jaxpr.eqns[number].outvars
        later: dict[Any, bool] = {}

        def of_data(atom: Any) -> bool:
            if isinstance(atom, core.Literal):
                return False
            return is_data(self._known[atom]) if atom in self._known else later.get(atom, True)

        for at, eqn in enumerate(self._jaxpr.eqns[number + 1 :], number + 1):
            name, others = eqn.primitive.name, [atom for atom in eqn.invars if atom is not result]
            if len(others) == len(eqn.invars):
                later.update((var, any(map(of_data, others))) for var in eqn.outvars)
            elif name in SUMS and len(others) == 1 and of_data(others[0]):
                return (at, self._known[others[0]]) if others[0] in self._known else None
            elif name in COPIES | RESHAPES | SUMS and eqn.outvars[0].aval.size == result.aval.size:
                result = eqn.outvars[0]
            else:
                return None
        return None

    def _read(self, atom: Any) -> Held:
        return self._constant(atom.val) if isinstance(atom, core.Literal) else self._known[atom]


def interpret(
    body: Body,
    arguments: Sequence[Held],
    constant: Callable[[Any], Held],
    step: Callable[[int, Equation, list[Held]], Sequence[Held]],
) -> list[Held]:
    """Go through a jaxpr with `Values`, whose arguments are the first three, and return its results.

    `step` takes the number of an equation, the equation and its operands; returns its results.
    """
    values = Values(body, arguments, constant)
    for number, equation, operands in values.steps():
        values.put(number, step(number, equation, operands))
    return values.results()


def _last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    """Say for each equation, by number, which variables are not needed behind it."""
    needed = {id(atom) for atom in jaxpr.outvars}
    last: dict[int, list[Any]] = {}
    for number, eqn in reversed(list(enumerate(jaxpr.eqns))):
        for atom in (*eqn.outvars, *eqn.invars):
            if not isinstance(atom, core.Literal) and id(atom) not in needed:
                needed.add(id(atom))
                last.setdefault(number, []).append(atom)
    return last


def evaluate(equation: Equation, values: Sequence[Any]) -> list[Any]:
    """Evaluate one equation; results that are not used are None."""
    eqn = equation.eqn
    variables = [pair for pair in zip(eqn.invars, values, strict=True) if not isinstance(pair[0], core.Literal)]
    given = {id(atom): (atom, value) for atom, value in variables}
    wanted = [var for var in eqn.outvars if not _is_dropped(var)]
    invars = [var for var, _ in given.values()]
    single = equation.jaxpr.replace(constvars=[], invars=invars, eqns=[_in_this_mesh(eqn)], outvars=wanted)
    results = iter(jax.core.eval_jaxpr(single, [], *(value for _, value in given.values())))
    return [None if _is_dropped(var) else next(results) for var in eqn.outvars]


def _in_this_mesh(eqn: Any) -> Any:
    """An equation that was traced where a mesh with explicit axes was set, as if traced where it is evaluated."""
    here = jax.sharding.get_abstract_mesh()
    before = eqn.ctx.cur_abstract_mesh
    if before == here or AxisType.Explicit not in before.axis_types:
        return eqn
    # What is made from nothing (iota) says how it is sharded there.
    params = {
        name: None if isinstance(value, NamedSharding) and AxisType.Explicit in value.mesh.axis_types else value
        for name, value in eqn.params.items()
    }
    return eqn.replace(ctx=jax.make_jaxpr(lax.neg)(0.0).eqns[0].ctx, params=params)


def evaluate_body(body: Body, values: Sequence[Any]) -> list[Any]:
    """Evaluate a whole jaxpr."""
    return list(jax.core.eval_jaxpr(body.jaxpr, body.consts, *values))


def part(body: Body, result: int) -> Body:
    """Return the jaxpr of one of the results, with the equations that it needs and all arguments."""
    wanted = body.jaxpr.outvars[result]
    needed, equations = {id(wanted)}, []
    for eqn in reversed(body.jaxpr.eqns):
        if any(id(var) in needed for var in eqn.outvars):
            needed.update(map(id, eqn.invars))
            equations.append(eqn)
    return body._replace(jaxpr=body.jaxpr.replace(eqns=equations[::-1], outvars=[wanted]))


def enclosing(body: Body, place: Sequence[int]) -> list[str]:
    """Name the loops and conditionals around an equation, from the outside."""
    names, rest = [], list(place)
    while len(rest) > 1:
        equation = Equation(body.jaxpr.eqns[rest.pop(0)], body.jaxpr)
        choices = branches(equation)
        inner = call(equation)
        if inner is not None:
            body = inner
            continue
        names.append(equation.name)
        if choices is not None:
            body = choices[rest.pop(0)]
        else:
            loop = scan(equation) or while_loop(equation)
            assert loop is not None
            body = loop.body
    return names
