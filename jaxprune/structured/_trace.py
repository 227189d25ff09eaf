"""Trace a function: find its channels, its layers, and what must stay."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune._jaxpr import _equations
from jaxprune._printing import some
from jaxprune._tree._given import called_on
from jaxprune._tree._paths import flatten
from jaxprune.structured._axes._dims import freeze
from jaxprune.structured._axes._label import label
from jaxprune.structured._axes._program import Value, free
from jaxprune.structured._axes._reasons import UNREAD, UNUSED, of_input, of_output
from jaxprune.structured._blocks import find_blocks
from jaxprune.structured._graph import Graph
from jaxprune.structured._groups import Member, find_frozen, find_groups, find_members


def trace(
    fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    prunable_inputs: Callable[[str], bool] | None = None,
    prunable_outputs: Callable[[str], bool] | None = None,
) -> Graph:
    """Read a function and find its channels: axes of parameters that can only be cut together; and its layers.

    Axes of inputs and outputs stay, and whatever the function does along an axis that no rule explains freezes it, with
    a reason that `Graph.frozen` tells. Values are not read: arrays may be `jax.ShapeDtypeStruct`.

    Args:
        fn: ``fn(params, *inputs)``, pure and traceable by JAX, of any framework or none.
        params: a pytree of arrays: all that is to be cut, batch statistics as well.
        *inputs: examples of the other arguments, pytrees of arrays.
        prunable_inputs: for the path of an input whether its axes may be cut: for state that is passed in, as a cache of keys
            and values. Paths begin with the input's number: ``2/0`` is the first entry of ``inputs[2]``.
        prunable_outputs: for the path of a result whether its axes may be cut: for state that is passed on, as new
            batch statistics, or the cache.

    Returns:
        The graph.

    Raises:
        TypeError: a leaf is no array, or the function cannot be traced.
        ValueError: `prunable_inputs` names no input.

    >>> import jax.numpy as jnp
    >>> def mlp(params, x):
    ...     return jnp.tanh(x @ params["up"] + params["bias"][None]) @ params["down"]
    >>> params = {"up": jnp.ones((3, 8)), "bias": jnp.ones(8), "down": jnp.ones((8, 2))}
    >>> graph = trace(mlp, params, jnp.ones((5, 3)))
    >>> [(group.name, group.size, [(m.path, m.axis) for m in group.members]) for group in graph.groups]
    [('up[1]', 8, [('bias', 0), ('down', 0), ('up', 1)])]
    >>> for axis in graph.frozen:
    ...     print(f"{axis.path}[{axis.axis}]: {axis.reasons[0]}")
    down[1]: an output: axis 1 of outputs lies along it and keeps its size; for passed-on state see prunable_outputs=
    up[0]: an input: axis 1 of inputs[0] lies along it and keeps its size; a parameter that maps the two frees it, and for state that is passed in see prunable_inputs=
    """
    flat, given = flatten(params, "params"), flatten(inputs, "inputs")
    for what in (flat, given):
        what.require_arrays()
    # Weak types make loops look as if their carry changed.
    shapes = [jax.ShapeDtypeStruct(np.shape(leaf), jax.dtypes.result_type(leaf)) for leaf in flat.leaves]
    try:
        with called_on(fn, params, inputs):
            body, outputs = _equations.trace(fn, flat.build(shapes), *inputs)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        raise TypeError(
            "The function cannot be traced: what it does depends on the values of its arguments "
            f"({str(error).splitlines()[0]}). Bind such arguments with functools.partial."
        ) from error
    # What nothing depends on would freeze axes along which it does things.
    body = _equations.without_dead_code(body)
    arguments = [Value(given.shape, given.dtype, tuple(free(given.shape))) for given in body.arguments]
    for number, value in enumerate(arguments[: len(flat.paths)]):
        value.sources = (number,)
    passed_in: dict[str, Value] = {}
    for path, name, value in zip(given.paths, given.names, arguments[len(flat.paths) :], strict=True):
        if prunable_inputs is not None and prunable_inputs(path):
            passed_in[path] = value
        else:
            _freeze_each(value, [of_input(name, axis) for axis in range(len(value.shape))])
    if prunable_inputs is not None and not passed_in:
        raise ValueError(f"prunable_inputs is true for none of the inputs, which are {some(given.paths)}.")
    program = label(body, arguments)
    results = flatten(outputs, "outputs")
    state = [n for n, path in enumerate(results.paths) if prunable_outputs is not None and prunable_outputs(path)]
    for number, value in enumerate(program.outs):
        if number not in state:
            _freeze_each(value, [of_output(results.names[number], axis) for axis in range(len(value.shape))])
    read = {id(value) for node in program.nodes for value in node.ins}
    for value in arguments[: len(flat.paths)]:
        if id(value) not in read:
            _freeze_each(value, [UNUSED] * len(value.shape))
    members = find_members(flat.paths, program)
    for var in [var for var, found in members.items() if not var.depth and _alone(found)]:
        freeze(var, UNREAD)
        del members[var]
    return Graph(
        find_groups(flat.paths, program, members), find_blocks(flat.paths, program, members, state, passed_in),
        find_frozen(flat.paths, program), tuple(flat.paths), tuple(shape.shape for shape in shapes),
        program, jax.eval_shape(lambda tree: tree, inputs), passed_in, outputs,
        functools.partial(
            trace, fn, flat.build(shapes), prunable_inputs=prunable_inputs, prunable_outputs=prunable_outputs
        ),
    )  # fmt: skip


def _alone(members: Sequence[Member]) -> bool:
    """Whether one parameter alone has channels, and neither computes nor reads them."""
    return len(members) == 1 and not (members[0].produces or members[0].reads)


def _freeze_each(value: Value, reasons: Sequence[str]) -> None:
    for dim, reason in zip(value.dims, reasons, strict=True):
        freeze(dim, reason)
