"""Choose the channels that stay: a share of each group, or the least important of all groups within a budget."""

import functools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxprune.sites._calibrate import Grams
from jaxprune.structured._axes._dims import Var
from jaxprune.structured._count import count_macs
from jaxprune.structured._graph import Graph, require_graph
from jaxprune.structured._groups import ChannelGroup
from jaxprune.structured._importance import Importance, order_by
from jaxprune.structured._losses import repaired_readers
from jaxprune.structured._naming import as_list, by_group, groups_named
from jaxprune.structured._plan import Plan, plan_of
from jaxprune.structured._structures import structures

# What a function costs under a plan.
Cost = Callable[[Plan], float]


def select_channels(
    graph: Graph,
    params: Any,
    k: float | Mapping[str, float],
    *,
    grams: Grams | None = None,
    scores: Any = None,
    importance: Importance | None = None,
    round_to: int | Mapping[str, int] = 1,
    min_kept: int = 1,
) -> Plan:
    """Choose the channels that stay, a share of each group: by what is lost with them, where Gram matrices are given.

    Exactly ``floor(k * size + 1/2)`` channels of a group go, those of the least importance, among equals the later
    ones; then the number that stays is rounded. Where channels are part of others (the dimensions of attention heads, the
    channels inside experts), a number cuts the outer ones alone, so that k is the share of a layer's width; name both to cut both. Each layer of a scan
    over stacked parameters keeps its own channels, equally many, unless something that all layers share lies along them
    (what is carried, a constant, random bits).

    With `grams` channels go one after the other, each time the one without which the group's readers, solved for anew by
    least squares, lose least: of readers with weights W, inputs X and ``P = (X^T X)^-1`` where channels stay, the channel
    whose rows are g adds ``1/2 tr(W_g^T (P_gg)^-1 W_g)`` to the error ``1/2 ||X V - X W||^2``, and W and P are updated when it
    is gone. So one of two channels that say the same goes early, the other late. The choice counts on that solution:
    ``shrink(plan, repair(plan, params, grams))``, or it is worse than others; ``plan.to_repair`` names the weights, and
    `shrink` warns where they have not been repaired. Weights that `repair` leaves alone, as those of a table that is the
    output layer as well, are counted by what they lose as they are. Gram matrices are damped by a hundredth of their mean
    diagonal. Without `grams` the norms of weights choose, which for a language model is much worse.

    Args:
        graph: the function's channels, by `trace`.
        params: its parameters. Values are read: not under jit.
        k: the fraction removed of each group, at least 0 and below 1; or such fractions by names: of a group, of any
            parameter that computes the channels or the layer that holds it, of a module within which all are computed, or glob
            patterns of these: ``{"*/gate_proj": 0.25, "*/k_proj": 1 / 3}``, ``{"layers/0": 0.5}``; with an axis,
            ``"*/k_proj/kernel[1]"``, they mean what lies along it. Of several that fit, the last one counts. Groups that
            are not named stay whole.
        grams: from `calibrate_grams` of the function; computed with in float64 by NumPy.
        scores: a tree of scores like `params`, larger = keep, that importance is measured by, such as `scores.saliency`
            (Taylor) or `scores.wanda` (activation norms); parameters without a score (None, no leaf) count for
            nothing. None for the parameters themselves.
        importance: ``(weights, axis) -> importance of each channel``, called with a matrix ``[channels, weights]`` in
            float32 and 1, the axis to reduce: `scores.channel_norm`, ``functools.partial(scores.channel_norm, ord=1)``,
            `scores.fpgm`; what `rules.channels` takes as `norm`. A row holds the weights of a channel in all members
            of its group: its producer's, its bias's, its consumers'. None for the norm of parameters (Fang et al.,
            DepGraph, 2023), and the sum of scores (Molchanov et al., Importance Estimation, 2019).
        round_to: the width of a layer that stays is a multiple of it where the group is large enough; hardware is
            faster at multiples of 8 or 128. Of a head with a multiple of so many dimensions any number fits. By names as k, 1
            for groups that are not named.
        min_kept: channels that every group keeps; of what a top_k takes from, as many stay as it takes.

    Returns:
        The plan.

    Raises:
        ValueError: nothing can be cut; a name fits no group; k is out of range; trees do not fit the graph; a group that
            is cut by `grams` has no reader, or one that they have no Gram matrix of (choose such groups by scores, in another
            plan, and `combine` the two); `grams` are given beside `scores` or `importance`.

    >>> import jax.numpy as jnp, jaxprune
    >>> from jaxprune.structured import trace
    >>> params = {"up": jnp.array([[1.0, 4.0, 2.0, 3.0]]), "down": jnp.ones((4, 2))}
    >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    >>> graph = trace(fn, params, jnp.ones((5, 1)))
    >>> select_channels(graph, params, 0.5).kept
    {'down': {0: (1, 3)}, 'up': {1: (1, 3)}}
    >>> grams = jaxprune.calibrate_grams(fn, params, [jnp.linspace(-3, 3, 50)[:, None]])
    >>> plan = select_channels(graph, params, 0.5, grams=grams)  # tanh(2 x) and tanh(3 x) lie between the others
    >>> plan.kept["down"], plan.to_repair
    ({0: (0, 1)}, ('down',))

    Reference: for grams, Meng, Ibrahim, Behdin, Hazimeh, Ponomareva, Mazumder, "OSSCAR: One-Shot Structured Pruning in Vision
    and Language Models with Combinatorial Optimization", 2024, section 3: the
    objective, and the update of what is left; one channel at a time, without the local search.
    """
    require_graph(graph, "select_channels(graph, params, k)")
    steps = check_options(graph, round_to, min_kept)
    shares = by_group(graph, k, "k", 0.0, check_share)
    order = order_by(graph, params, grams, scores, importance)
    kept = {}
    for group in graph.groups:
        share = 0.0 if group.outer and not isinstance(k, Mapping) else float(shares[group.name])
        count = kept_count(group, share, steps[group.name], min_kept)
        if count < group.size:
            kept[group.var] = without(group, order(group, group.size - count)[0])
    return _planned(graph, kept, grams)


def select_channels_globally(
    graph: Graph,
    params: Any,
    budget: float,
    *,
    cost: Cost | None = None,
    among: str | Sequence[str] | None = None,
    alike: str | Sequence[str] = (),
    isomorphic: bool = False,
    grams: Grams | None = None,
    scores: Any = None,
    importance: Importance | None = None,
    round_to: int | Mapping[str, int] = 1,
    min_kept: int = 1,
) -> Plan:
    """Choose the channels that stay among those of all groups, until the function costs no more than a budget.

    The least important channels of all go first; the fewest go that meet the budget. Layers differ in scale: importance is
    divided by its mean over the group, and what is lost with a channel, where `grams` are given, by all that the group's readers
    compute. Channels that are part of others stay, as in `select_channels`.

    Args:
        graph: the function's channels, by `trace`.
        params: its parameters.
        budget: the most that the function may cost, above 0, in the cost's own unit: ``0.5 * count_macs(graph)``.
        cost: a plan to a number that falls as channels go: ``functools.partial(count_parameters, graph)``, or your own;
            None counts multiply-accumulates.
        among: the groups to choose from, by names or patterns as in `select_channels`; all others stay whole. None for all that
            are not part of others.
        alike: names or patterns, of which each means groups that keep the same number of channels: a configuration has
            often one width for all layers, ``("*/gate_proj", "*/k_proj")``. The channels that go are each layer's own, and of all
            layers at once, for the mean of what they cost.
        isomorphic: whether importance is compared among groups of the same structure alone: heads with heads, the inner channels of
            one residual block with those of others, whatever their sizes. The same share of each such class goes. Groups
            that are to be alike are of the class of the first of them.
        grams: as in `select_channels`; the plan needs `repair`.
        scores: as in `select_channels`.
        importance: as in `select_channels`.
        round_to: as in `select_channels`, but what stays is rounded up before the budget is applied.
        min_kept: channels that every group keeps.

    Returns:
        The plan.

    Raises:
        ValueError: the budget cannot be met, because of what must stay; groups that are to be alike are of different sizes; as in
            `select_channels`.

    Reference: `isomorphic`, Fang et al., "Isomorphic Pruning for Vision Models", 2024, section 3.
    """
    require_graph(graph, "select_channels_globally(graph, params, budget)")
    steps = check_options(graph, round_to, min_kept)
    together = families(graph, groups_among(graph, among), alike, steps)
    order = order_by(graph, params, grams, scores, importance)
    # A group's last channels are never counted.
    orders = {group.name: order(group, group.size - _least(group, min_kept)) for family in together for group in family}
    ranks = [np.mean([orders[group.name][1] for group in family], 0) for family in together]
    if isomorphic:
        known = structures(graph)
        ranks = _shares(ranks, [known[family[0].name] for family in together])
    owners = np.repeat(np.arange(len(together)), [len(rank) for rank in ranks])
    owners = owners[np.argsort(np.concatenate(ranks), kind="stable")]

    def plan(removed: int) -> Plan:
        kept = {}
        for family, gone in zip(together, np.bincount(owners[:removed], minlength=len(together)), strict=True):
            for group in family:
                step = _step(group, steps[group.name])
                count = min(group.size, -(-(group.size - int(gone)) // step) * step)
                if count < group.size:
                    kept[group.var] = without(group, orders[group.name][0][..., : group.size - count])
        return _planned(graph, kept, grams)

    return plan(_first(graph, len(owners), plan, cost, budget))


def _shares(ranks: Sequence[np.ndarray], classes: Sequence[Hashable]) -> list[np.ndarray]:
    """Return in place of importances which share of the channels of its class each is the last of."""
    found = [np.zeros(len(rank)) for rank in ranks]
    for each in dict.fromkeys(classes):
        members = [n for n, other in enumerate(classes) if other == each]
        order = np.argsort(np.concatenate([ranks[n] for n in members]), kind="stable")
        shares = np.empty(len(order))
        shares[order] = (np.arange(len(order)) + 1) / len(order)
        ends = np.cumsum([len(ranks[n]) for n in members])[:-1]
        for n, part in zip(members, np.split(shares, ends), strict=True):
            found[n] = part
    return found


def groups_among(graph: Graph, among: str | Sequence[str] | None) -> list[ChannelGroup]:
    """Return the groups that names or patterns mean, in the graph's order; None for all that are not part of others."""
    if among is None:
        return [group for group in graph.groups if not group.outer]
    named = {group.name for pattern in as_list(among) for group in groups_named(graph, pattern, "among")}
    return [group for group in graph.groups if group.name in named]


def families(
    graph: Graph, groups: Sequence[ChannelGroup], alike: str | Sequence[str], steps: Mapping[str, int]
) -> list[list[ChannelGroup]]:
    """Return the groups that keep the same number of channels together, each in one list."""
    family = {group.name: group.name for group in groups}
    for pattern in as_list(alike):
        same = [group for group in groups_named(graph, pattern, "alike") if group.name in family]
        if not same:
            raise ValueError(f"alike names {pattern!r}, of which among leaves no group to choose from.")
        for group in same:
            if (group.size, _step(group, steps[group.name])) != (same[0].size, _step(same[0], steps[same[0].name])):
                raise ValueError(
                    f"alike names {pattern!r}, but {same[0].name} has {same[0].size} channels in steps of "
                    f"{_step(same[0], steps[same[0].name])} and {group.name} has {group.size} in steps of "
                    f"{_step(group, steps[group.name])}. Let each pattern name groups of one size."
                )
        joined = {family[group.name] for group in same}
        family = {name: family[same[0].name] if owner in joined else owner for name, owner in family.items()}
    found: dict[str, list[ChannelGroup]] = {}
    for group in groups:
        found.setdefault(family[group.name], []).append(group)
    return list(found.values())


def sparsity_within(
    graph: Graph,
    budget: float,
    *,
    cost: Cost | None = None,
    round_to: int | Mapping[str, int] = 1,
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
    steps = check_options(graph, round_to, min_kept)

    def plan(thousandths: int) -> Plan:
        counts = {
            group.var: kept_count(group, thousandths / 1000, steps[group.name], min_kept)
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
    return min(max(count, _least(group, min_kept)), group.size)


def _step(group: ChannelGroup, round_to: int) -> int:
    return round_to // math.gcd(round_to, group.span)


def _least(group: ChannelGroup, min_kept: int) -> int:
    return min(max(min_kept, group.least), group.size)


def without(group: ChannelGroup, gone: np.ndarray) -> np.ndarray:
    stays = np.ones((*gone.shape[:-1], group.size), bool)
    np.put_along_axis(stays, gone, False, -1)
    return np.nonzero(stays)[-1].reshape(*gone.shape[:-1], -1)


def _planned(graph: Graph, kept: Mapping[Var, np.ndarray], grams: Grams | None) -> Plan:
    """Return a plan; chosen by Gram matrices, it counts on readers that are repaired."""
    cut = [group for group in graph.groups if group.var in kept]
    to_repair = {path for group in cut for path in repaired_readers(group, grams)} if grams is not None else set()
    return plan_of(graph, kept, to_repair=to_repair)


def check_options(graph: Graph, round_to: int | Mapping[str, int], min_kept: int) -> dict[str, int]:
    """Return what each group's width is rounded to."""
    if not graph.groups:
        first = {axis.reasons[0]: f"{axis.path}[{axis.axis}]: {axis.reasons[0]}" for axis in reversed(graph.frozen)}
        reasons = "; ".join(reversed(first.values()))
        hint = " Of results that are state, say so with prunable_outputs." if "an output" in first else ""
        raise ValueError(
            f"The function has no channels that can be cut. What keeps them: {reasons or 'no parameters'}.{hint}"
        )
    check_whole(min_kept, "min_kept")
    return by_group(graph, round_to, "round_to", 1, check_whole)


def check_whole(value: object, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is a whole number, at least 1, not {value!r}.")


def require_budget(budget: float) -> None:
    """Raise unless a budget is above 0."""
    if not budget > 0:
        raise ValueError(f"budget is the most that the function may cost, above 0, not {budget!r}.")


def check_share(share: object, name: str) -> None:
    if not isinstance(share, int | float | np.floating) or not 0 <= share < 1:
        raise ValueError(
            f"{name} is the fraction of channels removed, at least 0 and below 1, not {share!r}; 50 % is 0.5."
        )


def _first(graph: Graph, last: int, plan: Callable[[int], Plan], cost: Cost | None, budget: float) -> int:
    """Return the least number whose plan costs no more than the budget; more never costs more."""
    require_budget(budget)
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
