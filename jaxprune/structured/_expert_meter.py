"""Where the outputs of a mixture's experts are summed, and what each adds there: measured while the function is evaluated."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._dtypes import widen
from jaxprune._jaxpr import _equations
from jaxprune._jaxpr._primitives import ARG_REDUCTIONS, COPIES, ELEMENTWISE, RESHAPES
from jaxprune._jaxpr._records import Dot, RaggedDot, Scatter, axes
from jaxprune.structured._axes._dims import Dim, Var, leaves, resolve
from jaxprune.structured._axes._program import Node, Program, Value, walk
from jaxprune.structured._axes._replay import Masks, Replay
from jaxprune.structured._graph import Graph
from jaxprune.structured._groups import ChannelGroup


class ExpertUse(NamedTuple):
    """What the experts of a mixture did for the tokens that the router sent to them.

    Attributes:
        tokens: how many tokens an expert added something to, float32 ``[experts]``; ``[layers, experts]`` where each layer of a
            scan may keep its own.
        added: the sum of the norms of what it added to them: of the router's weight times the expert's output.
    """

    tokens: jax.Array
    added: jax.Array

    @property
    def reap(self) -> jax.Array:
        """The mean norm of what an expert added, over the tokens that were sent to it; 0 where none was."""
        return jnp.where(self.tokens > 0, self.added / jnp.maximum(self.tokens, 1), 0)


def choice(node: Node) -> Iterator[Var]:
    """Yield the axes along which an equation chooses."""
    if node.name == "top_k" or node.name in ARG_REDUCTIONS:
        (along,) = axes(node.equation)
        yield from leaves(node.ins[0].dims[along])


@dataclasses.dataclass(frozen=True)
class Sum:
    """A sum over what experts add.

    Attributes:
        node: the equation.
        along: the axes of its operands along which it sums: those of the experts, or of the rows that were dealt out to them.
        dims: the other axes of what is added.
        rows: where rows are dealt out, what they pass on their way from `ragged_dot` to the sum.
    """

    node: Node
    along: tuple[int, ...]
    dims: Sequence[Dim]
    rows: tuple[Node, ...] = ()

    def features(self, tokens: set[Var]) -> tuple[int, ...]:
        """Return which axes of what is added are not those of tokens, where the axis that is summed over comes first."""
        return tuple(n for n, dim in enumerate(self.dims, 1) if set(leaves(dim)) - tokens)


@dataclasses.dataclass(frozen=True)
class Meter:
    """What is measured of a mixture, and where.

    Attributes:
        sum: the sum of what its experts add.
        features: the axes of what is added that number what an expert gives to one token.
        layers: the axis of layers of which each may keep its own experts.
        experts: how many there are.
    """

    sum: Sum
    features: tuple[int, ...]
    layers: Var | None
    experts: int


def find_meter(graph: Graph, group: ChannelGroup) -> Meter:
    """Find the one place where the outputs of a group of experts are summed.

    Raises:
        ValueError: there is no such place, or there are several.
    """
    choices = [node for node in walk(graph.program) if group.var in set(choice(node))]
    tokens, slots = set[Var](), list[Var]()
    for node in choices:
        (chosen,) = axes(node.equation)
        tokens.update(leaf for axis, dim in enumerate(node.ins[0].dims) if axis != chosen for leaf in leaves(dim))
        if node.name == "top_k":
            slots.extend(leaves(node.outs[0].dims[chosen]))

    nodes = list(_straight(graph.program))
    sums = [Sum(node, along, node.outs[0].dims) for node in nodes if (along := _summed(node, {group.var}))]
    if not any(each.features(tokens) for each in sums):
        dealt = _Rows({id(value): node for node in nodes for value in node.outs}, group.var)
        sums = [each for node in nodes for each in dealt.sums(node, slots)]
    found = [Meter(each, features, group.layers, group.size) for each in sums if (features := each.features(tokens))]
    if len(found) != 1:
        raise ValueError(
            f"The outputs of the experts of {group.name} are summed at {len(found)} places outside of loops and branches, so what each adds "
            "is not known; sum them, weighted, at one place."
        )
    return found[0]


def _straight(program: Program) -> Iterator[Node]:
    """Yield the nodes that are evaluated once, or once for each step of a scan."""
    for node in program.nodes:
        yield node
        if node.name != "cond" and _equations.while_loop(node.equation) is None:
            for body in node.bodies:
                yield from _straight(body)


def _summed(node: Node, over: set[Var]) -> tuple[int, ...]:
    """Return along which axis of each operand a sum over these axes runs; none where it is no such sum."""
    contract: Sequence[Sequence[int]] = ()
    if node.name == "dot_general":
        contract = Dot.of(node.equation).contract
    elif node.name == "reduce_sum":
        contract = (axes(node.equation),)
    found = [
        [axis for axis in summed if set(leaves(value.dims[axis])) == over]
        for value, summed in zip(node.ins, contract, strict=False)
    ]
    return tuple(axis[0] for axis in found) if found and all(len(axis) == 1 for axis in found) else ()


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Finds where rows go that a product deals out to experts.

    Attributes:
        makers: what makes a value, by its identity.
        var: the axis of the experts.
        known: what the rows of a value have passed, as far as was looked.
    """

    makers: Mapping[int, Node]
    var: Var
    known: dict[int, tuple[Node, ...]] = dataclasses.field(default_factory=dict)

    def sums(self, node: Node, slots: Sequence[Var]) -> Iterator[Sum]:
        """Yield the equation if it sums rows, those of a token: over what the router chose for it, or where they are added up."""
        if node.name == "scatter-add":
            updates, windows = node.ins[2], Scatter.of(node.equation).window
            places = tuple(axis for axis in range(len(updates.shape)) if axis not in windows)
            if len(places) == 1 and (rows := self.path(updates)):
                yield Sum(node, places, [updates.dims[axis] for axis in windows], rows)
            return
        for slot in slots:
            if along := _summed(node, {slot}):
                yield from (
                    Sum(node, along, node.outs[0].dims, rows) for value in node.ins if (rows := self.path(value))
                )

    def path(self, value: Value) -> tuple[Node, ...]:
        """Return what the rows of a value have passed, from the product on; nothing where it has no such rows."""
        if id(value) not in self.known:
            self.known[id(value)] = ()
            self.known[id(value)] = self._path(value)
        return self.known[id(value)]

    def _path(self, value: Value) -> tuple[Node, ...]:
        node = self.makers.get(id(value))
        if node is None:
            return ()
        if node.name == "ragged_dot_general":
            group = RaggedDot.of(node.equation).groups[0]
            return (node,) if resolve(node.ins[1].dims[group]) is self.var else ()
        if node.name in ELEMENTWISE:
            origins = [origin for origin in node.ins if origin.shape == value.shape]
        else:
            origins = node.ins[:1] if node.name in COPIES | RESHAPES | {"transpose", "gather"} else []
        return next(((*path, node) for origin in origins if (path := self.path(origin))), ())


@dataclasses.dataclass(eq=False)
class Metered(Replay):
    """An evaluation that measures on the way.

    Attributes:
        meters: what is measured, by the sum, with the name of its group.
        use: what was found.
        owners: of values with rows that were dealt out, the expert that each element is of, by the value's identity.
    """

    meters: Mapping[Node, tuple[str, Meter]] = dataclasses.field(default_factory=dict)
    use: dict[str, ExpertUse] = dataclasses.field(default_factory=dict)
    owners: dict[int, jax.Array] = dataclasses.field(default_factory=dict)

    def _node(self, node: Node, values: list[Any], masks: Masks) -> list[Any]:
        if node in self.meters:
            name, meter = self.meters[node]
            self.use[name] = _read(meter, values, [self.owners.get(id(value)) for value in node.ins])
        results = super()._node(node, values, masks)
        if any(node in meter.sum.rows for _, meter in self.meters.values()):
            self.owners[id(node.outs[0])] = self._owners(node, values, results[0].shape)
        return results

    def _owners(self, node: Node, values: list[Any], shape: tuple[int, ...]) -> jax.Array:
        """Return the expert that each element of a result is of, int32 of the result's shape."""
        if node.name == "ragged_dot_general":
            ragged = RaggedDot.of(node.equation)
            places = [axis for axis in range(values[0].ndim) if axis not in ragged.contract[0]]
            (at,) = (places.index(axis) for axis in ragged.rows)
            experts = jnp.arange(values[2].shape[0], dtype=jnp.int32)
            found = jnp.repeat(experts, values[2], total_repeat_length=shape[at])
            return jnp.broadcast_to(jnp.expand_dims(found, [n for n in range(len(shape)) if n != at]), shape)
        known = next(self.owners[id(value)] for value in node.ins if id(value) in self.owners)
        if node.name in ELEMENTWISE | COPIES:
            return known
        return _equations.evaluate(node.equation, [known, *values[1:]])[0]

    def _scan(self, node: Node, scan: _equations.Scan, values: list[Any], masks: Masks) -> list[Any]:
        first, last = scan.consts, scan.consts + scan.carry
        outer = self.use

        def step(carry: Sequence[Any], slices: Sequence[Any]) -> tuple[list[Any], Any]:
            self.use = {}
            results = self.run(node.bodies[0], [*values[:first], *carry, *slices], masks)
            return results[: scan.carry], (results[scan.carry :], self.use)

        length = None if values[last:] else scan.length
        carry, (outs, use) = jax.lax.scan(step, values[first:last], values[last:], length, reverse=scan.reverse)
        assert node.notes.steps is not None
        own = {name for name, meter in self.meters.values() if meter.layers is resolve(node.notes.steps)}
        self.use = outer | {
            name: each if name in own else jax.tree.map(lambda x: jnp.sum(x, 0), each) for name, each in use.items()
        }
        return [*carry, *outs]

    def _remat(self, node: Node, values: list[Any], masks: Masks) -> list[Any]:
        return self.run(node.bodies[0], values, masks)

    def _custom(self, node: Node, values: list[Any], masks: Masks) -> list[Any]:
        return self.run(node.bodies[0], values, masks)


def _read(meter: Meter, values: Sequence[Any], owners: Sequence[Any]) -> ExpertUse:
    """Take a sum over experts apart, and measure what each adds, token by token."""
    norms = jnp.sqrt(jnp.sum(jnp.square(jnp.abs(_apart(meter.sum, values))), meter.features))
    if not meter.sum.rows:
        tokens = tuple(range(1, norms.ndim))
        return ExpertUse(jnp.sum(norms > 0, tokens, dtype=jnp.float32), jnp.sum(norms, tokens, dtype=jnp.float32))
    # The expert of each row, laid out as what it adds is.
    numbered = [
        np.ones(value.shape, np.float32) if owner is None else owner
        for value, owner in zip(values, owners, strict=True)
    ]
    experts = jnp.max(_apart(meter.sum, numbered), meter.features).astype(jnp.int32)

    def by_expert(numbers: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(numbers.reshape(-1), experts.reshape(-1), meter.experts)

    return ExpertUse(by_expert(jnp.float32(norms > 0)), by_expert(norms))


def _apart(sum_: Sum, values: Sequence[Any]) -> jax.Array:
    """Return what is summed, float32; the axis that is summed over comes first."""
    node, along = sum_.node, sum_.along
    if node.name == "dot_general":
        (left, right), (left_batch, right_batch) = Dot.of(node.equation)
        a, b = along
        rest = tuple(x for x in left if x != a), tuple(x for x in right if x != b)
        first, second = map(widen, map(jnp.asarray, values))
        added = jax.lax.dot_general(
            first,
            second,
            (rest, ((*left_batch, a), (*right_batch, b))),
            precision=jax.lax.Precision.HIGHEST,
        )
        return jnp.moveaxis(added, len(left_batch), 0)
    if node.name == "scatter-add":
        return jnp.moveaxis(widen(values[2]), along[0], 0)
    others = tuple(axis for axis in axes(node.equation) if axis != along[0])
    moved = jnp.moveaxis(widen(values[0]), along[0], 0)
    return jnp.sum(moved, tuple(x + (x < along[0]) for x in others))
