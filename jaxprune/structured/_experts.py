"""Choose the experts of mixtures that stay: how much each adds where the router chose it, measured on data."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._printing import some
from jaxprune._tree._sharding import through_compiler
from jaxprune.sites._calibrate import inputs_of, require_batches
from jaxprune.structured._axes._dims import Var
from jaxprune.structured._axes._program import walk
from jaxprune.structured._expert_meter import ExpertUse, Metered, choice, find_meter
from jaxprune.structured._graph import Graph, require_graph
from jaxprune.structured._groups import ChannelGroup
from jaxprune.structured._naming import by_group
from jaxprune.structured._plan import Plan, plan_of
from jaxprune.structured._rebuild import at_shapes, evaluate, whole_shapes
from jaxprune.structured._select_channels import check_share, check_whole, kept_count, without


def expert_use(graph: Graph, params: Any, batches: Iterable[Any]) -> dict[str, ExpertUse]:
    """Measure what each expert of a mixture adds, on batches of data.

    Experts are the channels among which the function chooses by ``lax.top_k`` or ``argmax``, and whose outputs, weighted, it
    sums: ``einsum("te,ted->td", weights, outputs)``, or a sum of products. Where tokens are sorted by expert for
    `jax.lax.ragged_dot`, the sum is that over the experts of a token, or the one that adds each row to its token. What an expert adds is
    read off in front of that sum, in float32.

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
        meters = {group.name: find_meter(here, here.group(group.name)) for group in groups}
        replay = Metered(meters={meter.sum.node: (name, meter) for name, meter in meters.items()})
        evaluate(here, replay, params, whole_shapes(here), inputs, {})
        return replay.use

    for group in groups:
        find_meter(graph, group)  # what cannot be measured is told now
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
    chosen = {var for node in walk(graph.program) for var in choice(node)}
    found = [group for group in graph.groups if group.var in chosen]
    if not found:
        raise ValueError(
            "The function chooses among no channels that can be cut: a mixture of experts takes some by lax.top_k or argmax, and by "
            "jax.nn.one_hot of their numbers. Print the graph to see what keeps its experts."
        )
    return found
