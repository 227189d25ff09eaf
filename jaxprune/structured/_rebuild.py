"""The function again: on smaller parameters, or on whole ones under masks."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._tree._paths import Tree, flatten
from jaxprune._tree._shapes import require_shapes
from jaxprune._tree._sharding import through_compiler, whole
from jaxprune.structured._axes._dims import Cat, Var, kept_size, leaves, resolve, size
from jaxprune.structured._axes._program import Node, Value, walk
from jaxprune.structured._axes._replay import Masks, Replay
from jaxprune.structured._graph import Graph, require_graph
from jaxprune.structured._groups import Member
from jaxprune.structured._inputs import Uncut
from jaxprune.structured._plan import Plan, layered_groups, require_plan, shallower, solve

# What a mean over channels divides by: how many there were, or how many stay.
Counts = Literal["kept", "rescaled"]


def rebuild(graph: Graph, plan: Plan, *, counts: Counts = "kept") -> Callable[..., Any]:
    """Return the function for parameters that a plan has cut: ``small_fn(shrink(plan, params), *inputs)``.

    It is jitted, and can be differentiated, vmapped and exported; derivatives that the function defines itself
    (``custom_jvp``, ``custom_vjp``) are kept, to the first order. Inputs may have other shapes than when the function was
    traced, as longer sequences or another batch: it is traced once more for each (`Graph.at`). Of symbolic shapes, for
    ``jax.export``, the leading axis alone may be another than was traced, and not one that is tied to a parameter; means
    follow it, any other number that the function computes from its size (``/ x.shape[0]``, a variance with ``ddof``) is the
    traced one.

    Args:
        graph: the function, by `trace`.
        plan: what stays. Where it drops a residual branch, ``x + f(x)`` becomes ``x``, and nothing of f is computed; of
            results that are state, those that are made in f become None, and inputs that are state and read in f alone
            are to be None. Inputs that may be cut (``prunable_inputs=`` of `trace`) are to be cut as `shrink` does.
        counts: what normalisation layers divide by where they average over channels. ``"kept"``, the number before
            anything was cut: the function then equals the original one in which the channels are masked.
            ``"rescaled"``, the number that stays: it then equals a module built at the smaller width, for which fine-
            tuning and export to a module are easier, but differs from the original before it is fine-tuned.

    Returns:
        The function.

    Raises:
        ValueError: the plan does not fit the graph; later, parameters or inputs of other shapes or structure.

    >>> from jaxprune.structured import shrink, trace
    >>> params = {"up": jnp.array([[1.0, 2.0, 3.0]]), "down": jnp.array([[1.0], [1.0], [1.0]])}
    >>> graph = trace(lambda p, x: (x @ p["up"]) @ p["down"], params, jnp.ones((2, 1)))
    >>> plan = Plan({"up": {1: (0, 2)}, "down": {0: (0, 2)}}, {"up": (1, 3), "down": (3, 1)})
    >>> rebuild(graph, plan)(shrink(plan, params), jnp.ones((2, 1))).tolist()
    [[4.0], [4.0]]
    """
    if counts not in ("kept", "rescaled"):
        raise ValueError(f"counts is 'kept' or 'rescaled', not {counts!r}.")
    require_graph(graph, "rebuild(graph, plan)")
    require_plan(plan, "rebuild(graph, plan)")
    uncut = Uncut(graph, plan)  # a plan that does not fit is told now

    def small_fn(params: Any, *inputs: Any) -> Any:
        here = at_shapes(graph, uncut(inputs))
        kept = solve(here, plan)
        sizes = {var: indices.shape[-1] for var, indices in kept.items()}
        shapes = [
            None if gone else tuple(kept_size(dim, sizes) for dim in value.dims)
            for gone, value in zip(uncut.gone, here.program.ins, strict=True)
        ]
        replay = Replay(kept, sizes, rescaled=counts == "rescaled")
        return evaluate(shallower(here, plan), replay, params, shapes, inputs, {})

    return jax.jit(small_fn)


def at_shapes(graph: Graph, inputs: tuple[Any, ...]) -> Graph:
    """Return the function's graph at the shapes of these inputs; at symbolic ones, as it was traced."""
    given, traced = jax.tree.leaves(inputs), jax.tree.leaves(graph.inputs)
    structures: list[Any] = [jax.tree.structure(inputs), jax.tree.structure(graph.inputs)]
    if structures[0] != structures[1]:
        return graph
    shapes = [tuple(np.shape(leaf)) if isinstance(leaf, int | float) else tuple(leaf.shape) for leaf in given]
    same = all(shape == tuple(leaf.shape) for shape, leaf in zip(shapes, traced, strict=True))
    symbolic = any(not isinstance(n, int) for shape in shapes for n in shape)
    return graph if same or symbolic else graph.at(*inputs)


def masked(graph: Graph) -> Callable[..., Any]:
    """Return the function in which channels are masked: ``masked_fn(params, channel_masks(plan, params), *inputs)``.

    Channels whose masks are False count for nothing wherever the function sums or takes a maximum over them, so that
    the result is that of the smaller function exactly. (Zeroing parameters alone is not always: a normalisation layer
    sees the mean of a zeroed channel.) A layer or a residual branch whose masks are all False passes on what it is given.
    Masks are arguments: new ones compile nothing. Inputs may have other shapes than when the function was traced, as in
    `rebuild`.

    Args:
        graph: the function, by `trace`.

    Returns:
        The function, jitted.
    """

    def masked_fn(params: Any, masks: Any, *inputs: Any) -> Any:
        here = at_shapes(graph, inputs)
        return evaluate(here, Replay(), params, whole_shapes(here), inputs, _read_masks(here, flatten(masks, "masks")))

    return jax.jit(masked_fn)


def _read_masks(graph: Graph, flat: Tree) -> Masks:
    """Read off what the masks keep: channels and layers of which a weight stays in each member, branches likewise."""
    masks = dict(zip(flat.paths, map(jnp.asarray, flat.leaves), strict=True))
    read = {path for block in graph.blocks for path in block.paths}
    read |= {member.path for group in graph.groups for member in group.members}
    wanted = {path: shape for path, shape in graph.by_path.items() if path in read}
    require_shapes("The function", wanted, "masks", flat.shapes, "Make masks by channel_masks(plan, params).")
    branches = [block for block in graph.blocks if not block.members]
    # Branches inside of each other: parameters are a branch's own that are in the fewest.
    inside = {path: [block.name for block in branches if path in block.paths] for path in graph.paths}
    found: Masks = {}
    for block in branches:
        own = min(block.paths, key=lambda path: len(inside[path]))
        found[block.place] = jnp.any(masks[own])
    coupled: list[tuple[Var | Node, int, tuple[Member, ...]]] = [
        *((group.var, group.size, group.members) for group in graph.groups),
        *((block.place, block.size, block.members) for block in graph.blocks if block.members),
    ]
    for place, count, members in coupled:
        # Members in a branch that is dropped say nothing; one that is in none says it all.
        telling: dict[tuple[str, ...], jax.Array] = {}
        for member in members:
            alive = _alive(member, count, masks[member.path])
            where = tuple(inside[member.path])
            telling[where] = telling[where] & alive if where in telling else alive
        stays = telling[()] if () in telling else functools.reduce(jnp.logical_or, telling.values())
        found[place] = stays | ~jnp.any(stays, -1, keepdims=True)
    return found


def _alive(member: Member, count: int, mask: jax.Array) -> jax.Array:
    """Whether any weight of each channel stays in a member; of layers that keep their own, ``[layers, channels]``."""
    own = (member.axis,) if member.layers is None else (member.layers, member.axis)
    alive = jnp.any(mask, tuple(axis for axis in range(mask.ndim) if axis not in own))
    if member.layers is not None and member.layers > member.axis:
        alive = alive.T
    return jnp.any(whole(alive)[..., member.elements(count)], -1)


def evaluate(
    graph: Graph,
    replay: Replay,
    params: Any,
    shapes: Sequence[tuple[Any, ...] | None],
    inputs: tuple[Any, ...],
    masks: Masks,
) -> Any:
    """Evaluate the function once, on parameters and inputs of the given shapes; those that were dropped have none."""
    flat = flatten(params, "params")
    shapes, of_inputs = shapes[: len(graph.paths)], shapes[len(graph.paths) :]
    present = [path for path, shape in zip(graph.paths, shapes, strict=True) if shape is not None]
    found = Tree("the traced function", present, present, present, flat.treedef).aligned(flat)
    by_path = dict(zip(present, found, strict=True))
    wanted = {path: shape for path, shape in zip(graph.paths, shapes, strict=True) if shape is not None}
    actual = {path: tuple(np.shape(leaf)) for path, leaf in by_path.items()}
    remedy = "A rebuilt function takes what shrink cut by its plan, a masked one what was traced."
    require_shapes("The function", wanted, "params", actual, remedy)
    given = _bind_inputs(graph, replay, inputs, of_inputs)
    replay.layers = layered_groups(graph)

    # Read without shardings, the program says nothing of how products of sharded arrays are to be sharded.
    def run(arguments: list[Any], kept: list[Any]) -> list[Any]:
        return replay.run(graph.program, arguments, dict(zip(masks, kept, strict=True)))

    results = through_compiler(run, [*map(by_path.get, graph.paths), *given], list(masks.values()))
    return jax.tree.unflatten(jax.tree.structure(graph.outputs), results)


def whole_shapes(graph: Graph) -> list[tuple[int, ...] | None]:
    """Return the shapes of the parameters and inputs as the function was traced."""
    return [value.shape for value in graph.program.ins]


def _bind_inputs(
    graph: Graph, replay: Replay, inputs: tuple[Any, ...], shapes: Sequence[tuple[Any, ...] | None]
) -> list[Any]:
    """Return the leaves of the inputs, None where there is none; their leading axes may have symbolic sizes."""
    stays = [None if shape is None else 0 for shape in shapes]
    traced_as: Any = jax.tree.structure(jax.tree.unflatten(jax.tree.structure(graph.inputs), stays))
    structure: Any = jax.tree.structure(inputs)
    if structure != traced_as:
        raise ValueError(f"The function was traced with inputs of structure {traced_as}, not {structure}.")
    leaves_given = iter(jax.tree.leaves(inputs))
    given = [None if shape is None else next(leaves_given) for shape in shapes]
    fixed = {leaf for value in _constants(graph) for dim in value.dims for leaf in leaves(dim)}
    values = graph.program.ins[len(graph.paths) :]
    lengths: dict[Var, tuple[int, Any]] = {}
    for number, (leaf, traced, value) in enumerate(zip(given, shapes, values, strict=True)):
        if leaf is None or traced is None:
            continue
        shape = tuple(np.shape(leaf)) if isinstance(leaf, int | float) else tuple(leaf.shape)
        if len(shape) != len(traced) or shape[1:] != traced[1:]:
            raise ValueError(
                f"Input {number} has shape {shape}; the function was traced with {traced}, of which the leading "
                "axis alone may be symbolic. Trace it with the sizes that the others are to have."
            )
        if not shape:
            continue
        dim = resolve(value.dims[0])
        outer = next(leaves(dim), None)
        if shape != traced:
            if outer is None:
                raise ValueError(f"Input {number} was traced with a batch of 1, which fits no other; trace with 2.")
            if outer in fixed or isinstance(dim, Cat):
                raise ValueError(
                    f"Input {number} has a leading axis of {shape[0]}, traced with {traced[0]}; it is tied to a "
                    "parameter or a constant of the function and cannot change."
                )
        if outer is not None:
            length = shape[0] // (size(dim) // outer.size)
            other, known = lengths.setdefault(outer, (number, length))
            if known != length:
                raise ValueError(f"Inputs {other} and {number} differ in the batch: {known} and {length}.")
        replay.bind(value.dims, shape)
    return given


def _constants(graph: Graph) -> Iterator[Value]:
    """Yield what has one size alone: parameters and constants."""
    yield from graph.params
    for node in walk(graph.program):
        yield from (value for value in node.ins if value.const is not None)
