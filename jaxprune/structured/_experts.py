"""Choose the experts of mixtures that stay: how much each adds where the router chose it, measured on data."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._dtypes import widen
from jaxprune._jaxpr import _equations
from jaxprune._jaxpr._primitives import ARG_REDUCTIONS
from jaxprune._jaxpr._records import Dot, axes
from jaxprune._printing import some
from jaxprune._tree._sharding import through_compiler
from jaxprune.sites._calibrate import inputs_of, require_batches
from jaxprune.structured._axes._dims import Var, leaves, resolve
from jaxprune.structured._axes._program import Node, Program, walk
from jaxprune.structured._axes._replay import Masks, Replay
from jaxprune.structured._graph import Graph, require_graph
from jaxprune.structured._groups import ChannelGroup
from jaxprune.structured._naming import by_group
from jaxprune.structured._plan import Plan, plan_of
from jaxprune.structured._rebuild import at_shapes, evaluate, whole_shapes
from jaxprune.structured._select_channels import check_share, check_whole, kept_count, without


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


def expert_use(graph: Graph, params: Any, batches: Iterable[Any]) -> dict[str, ExpertUse]:
    """Measure what each expert of a mixture adds, on batches of data.

    Experts are the channels among which the function chooses by ``lax.top_k`` or ``argmax``, and whose outputs, weighted, it
    sums: ``einsum("te,ted->td", weights, outputs)``, or a sum of products. What an expert adds is read off in front of that
    sum, in float32.

    Args:
        graph: the function, by `trace`.
        params: its parameters.
        batches: inputs, as in `calibrate_grams`; of any lengths.

    Returns:
        The use of each mixture's experts, by the name of their group.

    Raises:
        ValueError: the function has no such experts; it sums their outputs nowhere, at several places, or within a loop or a
            branch; there is no batch.

    >>> import jax, jax.numpy as jnp
    >>> from jaxprune.structured import trace
    >>> def mixture(params, x):
    ...     weight, expert = jax.lax.top_k(jax.nn.softmax(x @ params["router"]), 1)
    ...     weights = jnp.sum(jax.nn.one_hot(expert, 3) * weight[..., None], 1)
    ...     return jnp.einsum("te,td,edf->tf", weights, x, params["experts"])
    >>> params = {"router": 100 * jnp.eye(3), "experts": jnp.stack([3 * jnp.eye(3), jnp.eye(3), jnp.eye(3)])}
    >>> graph = trace(mixture, params, jnp.eye(3))
    >>> use = expert_use(graph, params, [jnp.eye(3)[:2]])["router[1]"]
    >>> use.tokens.tolist(), use.reap.tolist()
    ([1.0, 1.0, 0.0], [3.0, 1.0, 0.0])

    Reference: Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", 2025.
    """
    require_graph(graph, "expert_use(graph, params, batches)")
    groups = _mixtures(graph)

    def measure(params: Any, inputs: tuple[Any, ...]) -> dict[str, ExpertUse]:
        here = at_shapes(graph, inputs)
        meters = {group.name: _meter(here, here.group(group.name)) for group in groups}
        replay = _Metered(meters={meter.node: (name, meter) for name, meter in meters.items()})
        evaluate(here, replay, params, whole_shapes(here), inputs, {})
        return replay.use

    for group in groups:
        _meter(graph, group)  # what cannot be measured is told now
    run = jax.jit(lambda params, inputs: through_compiler(measure, params, inputs))
    total: dict[str, ExpertUse] = {}
    require_batches(batches)
    for batch in batches:
        found = run(params, inputs_of(batch))
        total = jax.tree.map(jnp.add, total, found) if total else found
    if not total:
        raise ValueError("There is no batch; an iterator that was read before is empty.")
    return total


def select_experts(
    graph: Graph,
    scores: Mapping[str, Any],
    k: float | Mapping[str, float],
    *,
    round_to: int = 1,
) -> Plan:
    """Choose the experts that stay: those of the largest scores, equally many in every layer of a scan.

    The router's outputs are cut with what the experts have: kernels, biases. The router then chooses among those that
    stay, and where it normalises its weights, they share what the others had: `verify` compares with the function whose router
    never chooses the others.

    Args:
        graph: the function, by `trace`.
        scores: by the name of a mixture's group a score for each expert, larger = keep, ``[experts]`` or ``[layers, experts]``:
            ``{name: use.reap for name, use in expert_use(...).items()}``, or ``use.tokens`` (frequency), or random numbers.
            Mixtures that are not named stay whole.
        k: the fraction removed, at least 0 and below 1, or such fractions by name.
        round_to: the number of experts that stay is a multiple of it.

    Returns:
        The plan. Join it with others by `combine`.

    Raises:
        ValueError: fewer experts would stay than the router chooses; a name is that of no mixture; scores are of another shape or hold
            NaN.

    >>> import jax, jax.numpy as jnp
    >>> from jaxprune.structured import trace
    >>> def mixture(params, x):
    ...     weight, expert = jax.lax.top_k(jax.nn.softmax(x @ params["router"]), 2)
    ...     weights = jnp.sum(jax.nn.one_hot(expert, 4) * weight[..., None], 1)
    ...     return jnp.einsum("te,td,edf->tf", weights, x, params["experts"])
    >>> params = {"router": jnp.ones((3, 4)), "experts": jnp.ones((4, 3, 5))}
    >>> graph = trace(mixture, params, jnp.ones((6, 3)))
    >>> select_experts(graph, {"router[1]": jnp.array([0.0, 2.0, 1.0, 3.0])}, 0.25).kept
    {'experts': {0: (1, 2, 3)}, 'router': {1: (1, 2, 3)}}
    """
    require_graph(graph, "select_experts(graph, scores, k)")
    check_whole(round_to, "round_to")
    mixtures = {group.name: group for group in _mixtures(graph)}
    shares = by_group(graph, k, "k", 0.0, check_share)
    kept: dict[Var, np.ndarray] = {}
    for name, given in scores.items():
        if name not in mixtures:
            raise ValueError(f"scores names {name!r}, which is no mixture of experts; there are {some(mixtures)}.")
        group = mixtures[name]
        values = np.asarray(given, np.float64)
        shape = (group.size,) if group.layers is None else (group.layers.size, group.size)
        if values.shape != shape or np.isnan(values).any():
            raise ValueError(
                f"scores of {name} are a number for each expert, {list(shape)}; got {list(values.shape)} or NaN."
            )
        wanted = group.size - math.floor(float(shares[name]) * group.size + 0.5)
        if wanted < group.least:
            raise ValueError(
                f"Of the {group.size} experts of {name} {wanted} would stay, but the router chooses {group.least} for each "
                "token. Remove fewer, or let the function choose fewer."
            )
        count = kept_count(group, float(shares[name]), round_to, 1)
        if count < group.size:
            order = np.argsort(-values, axis=-1, kind="stable")
            kept[group.var] = without(group, order[..., count:])
    return plan_of(graph, kept)


def _mixtures(graph: Graph) -> list[ChannelGroup]:
    """Return the groups among whose channels the function chooses."""
    chosen = {var for node in walk(graph.program) for var in _choice(node)}
    found = [group for group in graph.groups if group.var in chosen]
    if not found:
        raise ValueError(
            "The function chooses among no channels that can be cut: a mixture of experts takes some by lax.top_k or argmax, and by "
            "jax.nn.one_hot of their numbers. Print the graph to see what keeps its experts."
        )
    return found


def _choice(node: Node) -> Iterator[Var]:
    if node.name == "top_k" or node.name in ARG_REDUCTIONS:
        (along,) = axes(node.equation)
        yield from leaves(node.ins[0].dims[along])


@dataclasses.dataclass(frozen=True)
class _Meter:
    """Where the outputs of a mixture's experts are summed.

    Attributes:
        node: the sum.
        operands: the axes of its operands along which the experts lie.
        features: the axes of its result that number what an expert gives to one token.
        layers: the axis of layers of which each may keep its own experts.
    """

    node: Node
    operands: tuple[int, ...]
    features: tuple[int, ...]
    layers: Var | None


def _meter(graph: Graph, group: ChannelGroup) -> _Meter:
    tokens = {
        leaf
        for node in walk(graph.program)
        if group.var in set(_choice(node))
        for axis, dim in enumerate(node.ins[0].dims)
        if axis != axes(node.equation)[0]
        for leaf in leaves(dim)
    }
    found = []
    for node in _straight(graph.program):
        operands = _summed(node, group.var)
        features = [n for n, dim in enumerate(node.outs[0].dims) if set(leaves(dim)) - tokens] if operands else []
        if features:
            found.append(_Meter(node, operands, tuple(features), group.layers))
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


def _summed(node: Node, var: Var) -> tuple[int, ...]:
    """Return along which axis of each operand a sum over an axis runs; none where it is no such sum."""
    contract: Sequence[Sequence[int]] = ()
    if node.name == "dot_general":
        contract = Dot.of(node.equation).contract
    elif node.name == "reduce_sum":
        contract = (axes(node.equation),)
    found = [
        [axis for axis in summed if resolve(value.dims[axis]) is var]
        for value, summed in zip(node.ins, contract, strict=False)
    ]
    return tuple(axis[0] for axis in found) if found and all(len(axis) == 1 for axis in found) else ()


@dataclasses.dataclass(eq=False)
class _Metered(Replay):
    """An evaluation that measures on the way.

    Attributes:
        meters: what is measured, by the sum, with the name of its group.
        use: what was found.
    """

    meters: Mapping[Node, tuple[str, _Meter]] = dataclasses.field(default_factory=dict)
    use: dict[str, ExpertUse] = dataclasses.field(default_factory=dict)

    def _node(self, node: Node, values: list[Any], masks: Masks) -> list[Any]:
        if node in self.meters:
            name, meter = self.meters[node]
            self.use[name] = _read(meter, values)
        return super()._node(node, values, masks)

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


def _read(meter: _Meter, values: Sequence[Any]) -> ExpertUse:
    """Take a sum over experts apart, and measure what each adds, token by token."""
    if meter.node.name == "dot_general":
        (left, right), (left_batch, right_batch) = Dot.of(meter.node.equation)
        a, b = meter.operands
        rest = tuple(x for x in left if x != a), tuple(x for x in right if x != b)
        first, second = map(widen, values)
        added = jax.lax.dot_general(
            first,
            second,
            (rest, ((*left_batch, a), (*right_batch, b))),
            precision=jax.lax.Precision.HIGHEST,
        )
        added = jnp.moveaxis(added, len(left_batch), 0)
    else:
        gone = axes(meter.node.equation)
        others = tuple(axis for axis in gone if axis != meter.operands[0])
        added = jnp.sum(
            jnp.moveaxis(widen(values[0]), meter.operands[0], 0), tuple(x + (x < meter.operands[0]) for x in others)
        )
    norms = jnp.sqrt(jnp.sum(jnp.square(jnp.abs(added)), tuple(axis + 1 for axis in meter.features)))
    tokens = tuple(range(1, norms.ndim))
    return ExpertUse(jnp.sum(norms > 0, tokens, dtype=jnp.float32), jnp.sum(norms, tokens, dtype=jnp.float32))
