"""All that differs between versions of jax in how a jaxpr is read; nothing else looks at the insides of an equation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

# Primitives that only wrap a jaxpr: their body may stand in their place. Names changed over the versions.
_CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "eval_jaxpr", "remat", "remat2", "checkpoint"}
    | {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
)


class Body(NamedTuple):
    """A jaxpr inside an equation: its variables and equations, and the values of its constants."""

    jaxpr: Any
    consts: Sequence[Any]


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


def trace(fn: Any, *arguments: Any) -> tuple[Body, Any]:
    """Return the jaxpr of ``fn(*arguments)`` and the tree of its results' shapes."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*arguments)
    return _body(closed), shapes


def _body(jaxpr: Any) -> Body:
    # Since jax 0.11 a closed jaxpr is a jaxpr that has its constants; the body of remat never has any.
    return Body(getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ()))


def call(eqn: Any) -> Body | None:
    """Return the body of an equation that only wraps one, else None."""
    if eqn.primitive.name not in _CALLS:
        return None
    return _body(next(eqn.params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in eqn.params))


def scan(eqn: Any) -> Scan | None:
    """Return the parts of a scan, None of any other equation."""
    if eqn.primitive.name != "scan":
        return None
    params = eqn.params
    if "ft_in" in params:  # since jax 0.11
        consts, carry, _ = map(list, params["ft_in"].update(list(range(len(eqn.invars)))).unpack())
        counts = len(consts), len(carry)
    else:
        counts = params["num_consts"], params["num_carry"]
    return Scan(*counts, _body(params["jaxpr"]), params["length"], params["reverse"], params["unroll"])


def while_loop(eqn: Any) -> While | None:
    """Return the parts of a while loop, None of any other equation."""
    if eqn.primitive.name != "while":
        return None
    params = eqn.params
    counts = params["cond_nconsts"], params["body_nconsts"]
    return While(*counts, _body(params["cond_jaxpr"]), _body(params["body_jaxpr"]))


def branches(eqn: Any) -> list[Body] | None:
    """Return the branches of a cond (a switch), None of any other equation."""
    return [_body(branch) for branch in eqn.params["branches"]] if eqn.primitive.name == "cond" else None


def is_literal(atom: Any) -> bool:
    """Whether an operand is a constant written into the equation."""
    return isinstance(atom, core.Literal)


def is_dropped(var: Any) -> bool:
    """Whether a result is not used."""
    return type(var).__name__ == "DropVar"


def evaluate(jaxpr: Any, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluate one equation of `jaxpr`; results that are not used are None."""
    given = {id(atom): (atom, value) for atom, value in zip(eqn.invars, values, strict=True) if not is_literal(atom)}
    wanted = [var for var in eqn.outvars if not is_dropped(var)]
    single = jaxpr.replace(constvars=[], invars=[var for var, _ in given.values()], eqns=[eqn], outvars=wanted)
    results = iter(jax.core.eval_jaxpr(single, [], *(value for _, value in given.values())))
    return [None if is_dropped(var) else next(results) for var in eqn.outvars]


def evaluate_body(body: Body, values: Sequence[Any]) -> list[Any]:
    """Evaluate a whole jaxpr."""
    return list(jax.core.eval_jaxpr(body.jaxpr, body.consts, *values))


def last_uses(jaxpr: Any) -> dict[int, list[Any]]:
    """Say for each equation, by number, which variables are not needed behind it."""
    needed = {id(atom) for atom in jaxpr.outvars}
    last: dict[int, list[Any]] = {}
    for number, eqn in reversed(list(enumerate(jaxpr.eqns))):
        for atom in (*eqn.outvars, *eqn.invars):
            if not is_literal(atom) and id(atom) not in needed:
                needed.add(id(atom))
                last.setdefault(number, []).append(atom)
    return last


def enclosing(body: Body, place: Sequence[int]) -> list[str]:
    """Name the loops and conditionals around an equation, from the outside."""
    names, rest = [], list(place)
    while len(rest) > 1:
        eqn = body.jaxpr.eqns[rest.pop(0)]
        choices = branches(eqn)
        inner = call(eqn)
        if inner is not None:
            body = inner
            continue
        names.append(eqn.primitive.name)
        if choices is not None:
            body = choices[rest.pop(0)]
        else:
            loop = scan(eqn) or while_loop(eqn)
            assert loop is not None
            body = loop.body
    return names
