"""Choose the channels that stay: a share of each group, or the least important of all groups within a budget."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune._tree._leaves import is_complex
from jaxprune._tree._names import slashed
from jaxprune._tree._paths import flatten
from jaxprune._tree._shapes import require_shapes
from jaxprune.scores._channels import channel_norm
from jaxprune.structured._count import count_macs
from jaxprune.structured._graph import Graph
from jaxprune.structured._groups import ChannelGroup
from jaxprune.structured._plan import Plan, plan_of

# (weights [channels, weights], the axis of the weights) -> the importance of each channel, larger = keep.
Importance = Callable[[Any, int], Any]
# What a function costs under a plan.
Cost = Callable[[Plan], float]


def select_channels(
    graph: Graph,
    params: Any,
    k: float | Mapping[str, float],
    *,
    scores: Any = None,
    importance: Importance | None = None,
    round_to: int = 1,
    min_kept: int = 1,
) -> Plan:
    """Choose the channels that stay, a share of each group.

    Exactly ``floor(k * size + 1/2)`` channels of a group go, those of the least importance, among equals the later
    ones; then the number that stays is rounded. Where channels are part of others (the dimensions of attention heads),
    a number cuts the outer ones alone, so that k is the share of a layer's width; name both to cut both.

    Args:
        graph: the function's channels, by `trace`.
        params: its parameters. Values are read: not under jit.
        k: the fraction removed of each group, at least 0 and below 1; or such fractions by the names of groups
            or by paths, or beginnings of paths, under which all parameters lie that compute the channels. Groups that
            are not named stay whole.
        scores: a tree of scores like `params`, larger = keep, that importance is measured by, such as `scores.saliency`
            (Taylor) or `scores.wanda` (activation norms); parameters without a score (None, no leaf) count for
            nothing. None for the parameters themselves.
        importance: ``(weights, axis) -> importance of each channel``, called with a matrix ``[channels, weights]`` in
            float32 and 1, the axis to reduce: `scores.channel_norm`, ``functools.partial(scores.channel_norm, ord=1)``,
            `scores.fpgm`; what `rules.channels` takes as `norm`. A row holds the weights of a channel in all members
            of its group: its producer's, its bias's, its consumers'. None for the norm of parameters (Fang et al.,
            DepGraph, 2023), and the sum of scores (Molchanov et al., Importance Estimation, 2019).
        round_to: the width of a layer that stays is a multiple of it where the group is large enough; hardware is
            faster at multiples of 8 or 128. Of a head with a multiple of so many dimensions any number fits.
        min_kept: channels that every group keeps.

    Returns:
        The plan.

    Raises:
        ValueError: nothing can be cut; a name fits no group; k is out of range; trees do not fit the graph.

    >>> import jax.numpy as jnp
    >>> from jaxprune.structured import trace
    >>> params = {"up": jnp.array([[1.0, 4.0, 2.0, 3.0]]), "down": jnp.ones((4, 2))}
    >>> graph = trace(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, jnp.ones((5, 1)))
    >>> select_channels(graph, params, 0.5).kept
    {'down': {0: (1, 3)}, 'up': {1: (1, 3)}}
    """
    _check_options(graph, round_to, min_kept)
    shares = _shares(graph, k)
    rows = _rows(graph, params, scores)
    importance = importance or (channel_norm if scores is None else jnp.sum)
    kept = {}
    for group in graph.groups:
        share = shares[group.name]
        count = kept_count(group, share, round_to, min_kept)
        if count < group.size:
            kept[group.var] = _best(_measure(group, rows, importance), count)
    return plan_of(graph, kept)


def select_channels_globally(
    graph: Graph,
    params: Any,
    budget: float,
    *,
    cost: Cost | None = None,
    scores: Any = None,
    importance: Importance | None = None,
    round_to: int = 1,
    min_kept: int = 1,
) -> Plan:
    """Choose the channels that stay among those of all groups, until the function costs no more than a budget.

    Importance is divided by its mean over the group, since layers differ in scale. The least important channels of
    all go first; the fewest go that meet the budget. Channels that are part of others stay, as in `select_channels`.

    Args:
        graph: the function's channels, by `trace`.
        params: its parameters.
        budget: the most that the function may cost, above 0, in the cost's own unit: ``0.5 * count_macs(graph)``.
        cost: a plan to a number that falls as channels go: ``functools.partial(count_parameters, graph)``, or your own;
            None counts multiply-accumulates.
        scores: as in `select_channels`.
        importance: as in `select_channels`.
        round_to: as in `select_channels`, but what stays is rounded up before the budget is applied.
        min_kept: channels that every group keeps.

    Returns:
        The plan.

    Raises:
        ValueError: the budget cannot be met, because of what must stay.
    """
    _check_options(graph, round_to, min_kept)
    rows = _rows(graph, params, scores)
    importance = importance or (channel_norm if scores is None else jnp.sum)
    groups = [group for group in graph.groups if not group.outer]
    measured = [_measure(group, rows, importance) for group in groups]
    relative = [_relative(values) for values in measured]
    # Channels of a group go from the least important one; a group's last ones are never counted.
    owners = np.concatenate([np.full(group.size - _least(group, min_kept), i) for i, group in enumerate(groups)])
    ranks = np.concatenate(
        [
            np.sort(values)[: group.size - _least(group, min_kept)]
            for values, group in zip(relative, groups, strict=True)
        ]
    )
    owners = owners[np.argsort(ranks, kind="stable")]

    def plan(removed: int) -> Plan:
        gone = np.bincount(owners[:removed], minlength=len(groups))
        kept = {}
        for group, values, number in zip(groups, measured, gone, strict=True):
            count = min(group.size, -(-(group.size - int(number)) // _step(group, round_to)) * _step(group, round_to))
            if count < group.size:
                kept[group.var] = _best(values, count)
        return plan_of(graph, kept)

    return plan(_first(graph, len(owners), plan, cost, budget))


def sparsity_within(
    graph: Graph,
    budget: float,
    *,
    cost: Cost | None = None,
    round_to: int = 1,
    min_kept: int = 1,
) -> float:
    """Return the least k for `select_channels`, the same for all groups, at which the function costs no more than a budget.

    Args:
        graph: the function's channels, by `trace`.
        budget: the most that the function may cost, above 0, in the cost's own unit: ``0.5 * count_macs(graph)``.
        cost: a plan to a number that falls as channels go: ``functools.partial(count_parameters, graph)``, or your own;
            None counts multiply-accumulates.
        round_to: as `select_channels` will be given.
        min_kept: as `select_channels` will be given.

    Returns:
        The fraction removed, in steps of a thousandth.

    Raises:
        ValueError: the budget cannot be met, because of what must stay.

    >>> import jax.numpy as jnp
    >>> from jaxprune.structured import count_macs, trace
    >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
    >>> graph = trace(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, jnp.ones((5, 3)))
    >>> sparsity_within(graph, 0.5 * count_macs(graph))  # 4 channels stay as soon as round(8 s) is 4
    0.438
    """
    _check_options(graph, round_to, min_kept)

    def plan(thousandths: int) -> Plan:
        counts = {
            group.var: kept_count(group, thousandths / 1000, round_to, min_kept)
            for group in graph.groups
            if not group.outer
        }
        return plan_of(graph, {var: np.arange(count) for var, count in counts.items()})

    return _first(graph, 999, plan, cost, budget) / 1000


def kept_count(group: ChannelGroup, k: float, round_to: int, min_kept: int) -> int:
    """Return how many channels of a group stay."""
    count = group.size - math.floor(k * group.size + 0.5)
    step = _step(group, round_to)
    count = max(math.floor(count / step + 0.5), 1) * step if group.size >= step else group.size
    return min(max(count, min_kept, 1), group.size)


def _step(group: ChannelGroup, round_to: int) -> int:
    return round_to // math.gcd(round_to, group.span)


def _least(group: ChannelGroup, min_kept: int) -> int:
    return min(max(min_kept, 1), group.size)


def _check_options(graph: Graph, round_to: int, min_kept: int) -> None:
    if not graph.groups:
        first = {axis.reasons[0]: f"{axis.path}[{axis.axis}]: {axis.reasons[0]}" for axis in reversed(graph.frozen)}
        reasons = "; ".join(reversed(first.values()))
        hint = " Of results that are state, say so with prunable_outputs." if "an output" in first else ""
        raise ValueError(
            f"The function has no channels that can be cut. What keeps them: {reasons or 'no parameters'}.{hint}"
        )
    for name, value in (("round_to", round_to), ("min_kept", min_kept)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is a whole number, at least 1, not {value!r}.")


def _shares(graph: Graph, k: float | Mapping[str, float]) -> dict[str, float]:
    if not isinstance(k, Mapping):
        _check_share(k, "k")
        return {group.name: 0.0 if group.outer else float(k) for group in graph.groups}
    shares = {group.name: 0.0 for group in graph.groups}
    for key, share in k.items():
        _check_share(share, f"k[{key!r}]")
        named = [group for group in graph.groups if _answers(group, key)]
        if not named:
            raise ValueError(f"k names {key!r}, which computes no channels; groups are {list(shares)}.")
        exact = [group for group in named if group.name == key]
        shares.update((group.name, float(share)) for group in exact or [g for g in named if not g.outer] or named)
    return shares


def _answers(group: ChannelGroup, key: str) -> bool:
    produced = [member for member in group.members if member.produces] or group.members[:1]
    return group.name == key or all(slashed(member.path + "/").startswith(slashed(key + "/")) for member in produced)


def _check_share(share: Any, name: str) -> None:
    if not isinstance(share, int | float | np.floating) or not 0 <= share < 1:
        raise ValueError(f"{name} is the fraction of channels removed, at least 0 and below 1, not {share!r}.")


def _rows(graph: Graph, params: Any, scores: Any) -> dict[str, np.ndarray]:
    """Return by path what importance is measured by; what has no score counts for nothing."""
    given = flatten(params, "params")
    require_shapes("The function", graph.by_path, "params", given.shapes, "Trace it with these parameters.")
    if scores is not None:
        given = flatten(scores, "scores")
        remedy = "Make scores from the parameters that were traced."
        require_shapes("scores", given.shapes, "the function", graph.by_path, remedy)
    cut = {member.path for group in graph.groups for member in group.members}
    # Through float32: NumPy computes in bfloat16 slowly, and loses what it sums.
    return {
        path: np.asarray(leaf).astype(np.complex64 if is_complex(leaf) else np.float32)
        for path, leaf in zip(given.paths, given.leaves, strict=True)
        if path in cut
    }


def _measure(group: ChannelGroup, rows: Mapping[str, np.ndarray], importance: Importance) -> np.ndarray:
    """Return the importance of each channel from the weights of all members."""
    found: list[np.ndarray] = []
    for member in (member for member in group.members if member.path in rows):
        weights = np.moveaxis(rows[member.path], member.axis, 0)
        found.append(weights[member.elements(group.size)].reshape(group.size, -1))
    if not found:
        raise ValueError(f"scores has nothing for {group.name}: no score for {[m.path for m in group.members]}.")
    values = np.asarray(importance(np.concatenate(found, 1), 1), np.float64)
    if values.shape != (group.size,):
        raise ValueError(f"importance returned shape {values.shape} for {group.size} channels of {group.name}.")
    return np.where(np.isnan(values), -np.inf, values)


def _best(values: np.ndarray, count: int) -> np.ndarray:
    return np.sort(np.argsort(-values, kind="stable")[:count])


def _relative(values: np.ndarray) -> np.ndarray:
    finite = values[np.isfinite(values)]
    mean = float(np.abs(finite).mean()) if len(finite) else 0.0
    return values / mean if mean > 0 else values


def _first(graph: Graph, last: int, plan: Callable[[int], Plan], cost: Cost | None, budget: float) -> int:
    """Return the least number whose plan costs no more than the budget; more never costs more."""
    if not budget > 0:
        raise ValueError(f"budget is the most that the function may cost, above 0, not {budget!r}.")
    cost = cost or functools.partial(count_macs, graph)
    least = cost(plan(last))
    if least > budget:
        raise ValueError(
            f"A budget of {budget:,.6g} cannot be met: at the least the function costs {least:,.6g}, uncut "
            f"{cost(plan_of(graph, {})):,.6g}, since what belongs to axes that stay costs too much. Raise the budget, "
            "which is no fraction; print the graph to see which axes; or cut inner groups by name with select_channels."
        )
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cost(plan(middle)) <= budget else (middle + 1, high)
    return low
