"""Choose the channels that stay: a share of each group, or the least important of all groups within a budget."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxprune._tree._paths import Tree, flatten
from jaxprune.structured._count import count_macs
from jaxprune.structured._graph import Graph
from jaxprune.structured._groups import ChannelGroup
from jaxprune.structured._importance import Importance, l2, total
from jaxprune.structured._plan import Plan, plan_of


def select_channels(
    graph: Graph,
    params: Any,
    sparsity: float | Mapping[str, float],
    *,
    scores: Any = None,
    importance: Importance | None = None,
    round_to: int = 1,
    min_kept: int = 1,
) -> Plan:
    """Choose the channels that stay, a share of each group.

    Exactly ``floor(sparsity * size + 1/2)`` channels of a group go, those of the least importance, among equals the later
    ones; then the number that stays is rounded. Where channels are part of others (the dimensions of attention heads),
    a number cuts the outer ones alone, so that sparsity is the share of a layer's width; name both to cut both.

    Args:
        graph: the function's channels, by `trace`.
        params: its parameters. Values are read: not under jit.
        sparsity: the fraction removed of each group, at least 0 and below 1; or such fractions by the names of groups
            or by paths, or beginnings of paths, under which all parameters lie that compute the channels. Groups that
            are not named stay whole.
        scores: a tree of scores like `params`, larger = keep, that importance is measured by, such as `scores.saliency`
            (Taylor) or `scores.wanda` (activation norms); parameters without a score (None, no leaf) count for
            nothing. None for the parameters themselves.
        importance: a function of the weights of each channel ``[channels, weights]`` to ``[channels]``; None for the
            Euclidean norm of parameters, and the sum of scores.
        round_to: the width of a layer that stays is a multiple of it where the group is large enough; hardware is
            faster at multiples of 8 or 128. Of a head with a multiple of so many dimensions any number fits.
        min_kept: channels that every group keeps.

    Returns:
        The plan.

    Raises:
        ValueError: nothing can be cut; a name fits no group; a sparsity is out of range; trees do not fit the graph.

    >>> import jax.numpy as jnp
    >>> from jaxprune.structured._trace import trace
    >>> params = {"up": jnp.array([[1.0, 4.0, 2.0, 3.0]]), "down": jnp.ones((4, 2))}
    >>> graph = trace(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, jnp.ones((5, 1)))
    >>> select_channels(graph, params, 0.5).kept
    {'down': {0: (1, 3)}, 'up': {1: (1, 3)}}
    """
    _check_options(graph, round_to, min_kept)
    shares = _shares(graph, sparsity)
    rows = _rows(graph, params, scores)
    importance = importance or (l2 if scores is None else total)
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
    cost: Callable[[Graph, Plan | None], float] = count_macs,
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
        budget: the fraction of the cost that may stay, above 0 and at most 1.
        cost: of the function under a plan: `count_macs`, `count_parameters`, or your own.
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
    limit = _limit(graph, budget, cost)
    rows = _rows(graph, params, scores)
    importance = importance or (l2 if scores is None else total)
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

    return plan(_first(len(owners), plan, lambda found: cost(graph, found) <= limit, budget))


def sparsity_within(
    graph: Graph,
    budget: float,
    *,
    cost: Callable[[Graph, Plan | None], float] = count_macs,
    round_to: int = 1,
    min_kept: int = 1,
) -> float:
    """Return the least sparsity, the same for all groups, at which the function costs no more than a budget.

    Args:
        graph: the function's channels, by `trace`.
        budget: the fraction of the cost that may stay, above 0 and at most 1.
        cost: of the function under a plan: `count_macs`, `count_parameters`, or your own.
        round_to: as `select_channels` will be given.
        min_kept: as `select_channels` will be given.

    Returns:
        The sparsity, in steps of a thousandth.

    Raises:
        ValueError: the budget cannot be met, because of what must stay.

    >>> import jax.numpy as jnp
    >>> from jaxprune.structured._trace import trace
    >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
    >>> graph = trace(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, jnp.ones((5, 3)))
    >>> sparsity_within(graph, 0.5)  # 4 channels stay as soon as round(8 s) is 4
    0.438
    """
    _check_options(graph, round_to, min_kept)
    limit = _limit(graph, budget, cost)

    def plan(thousandths: int) -> Plan:
        counts = {
            group.var: kept_count(group, thousandths / 1000, round_to, min_kept)
            for group in graph.groups
            if not group.outer
        }
        return plan_of(graph, {var: np.arange(count) for var, count in counts.items()})

    return _first(999, plan, lambda found: cost(graph, found) <= limit, budget) / 1000


def kept_count(group: ChannelGroup, sparsity: float, round_to: int, min_kept: int) -> int:
    """Return how many channels of a group stay."""
    count = group.size - math.floor(sparsity * group.size + 0.5)
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


def _limit(graph: Graph, budget: float, cost: Callable[[Graph, Plan | None], float]) -> float:
    if not 0 < budget <= 1:
        raise ValueError(f"budget is the fraction of the cost that may stay, above 0 and at most 1, not {budget!r}.")
    return budget * cost(graph, None)


def _unmet(budget: float) -> ValueError:
    return ValueError(
        f"A budget of {budget:g} of the cost cannot be met: too much belongs to axes that stay. "
        "Print the graph to see which, or cut inner groups by name with select_channels."
    )


def _shares(graph: Graph, sparsity: float | Mapping[str, float]) -> dict[str, float]:
    if not isinstance(sparsity, Mapping):
        _check_share(sparsity, "sparsity")
        return {group.name: 0.0 if group.outer else float(sparsity) for group in graph.groups}
    shares = {group.name: 0.0 for group in graph.groups}
    for key, share in sparsity.items():
        _check_share(share, f"sparsity[{key!r}]")
        named = [group for group in graph.groups if _answers(group, key)]
        if not named:
            raise ValueError(f"sparsity names {key!r}, which computes no channels; groups are {list(shares)}.")
        exact = [group for group in named if group.name == key]
        shares.update((group.name, float(share)) for group in exact or [g for g in named if not g.outer] or named)
    return shares


def _answers(group: ChannelGroup, key: str) -> bool:
    produced = [member for member in group.members if member.produces] or group.members[:1]
    return group.name == key or all((member.path + "/").startswith(key + "/") for member in produced)


def _check_share(share: Any, name: str) -> None:
    if not isinstance(share, int | float | np.floating) or not 0 <= share < 1:
        raise ValueError(f"{name} is the fraction of channels removed, at least 0 and below 1, not {share!r}.")


def _rows(graph: Graph, params: Any, scores: Any) -> dict[str, np.ndarray]:
    """Return by path what importance is measured by; what has no score counts for nothing."""
    given = flatten(params, "params")
    _check_tree(graph, given, graph.paths)
    if scores is not None:
        given = flatten(scores, "scores")
        _check_tree(graph, given, given.paths)
    cut = {member.path for group in graph.groups for member in group.members}
    # Through float32: NumPy computes in bfloat16 slowly, and loses what it sums.
    return {
        path: np.asarray(leaf).astype(np.float32)
        for path, leaf in zip(given.paths, given.leaves, strict=True)
        if path in cut
    }


def _check_tree(graph: Graph, flat: Tree, paths: Sequence[str]) -> None:
    """Raise a ValueError unless the tree and the graph have parameters of the same shapes at these paths."""
    shapes = dict(zip(flat.paths, map(np.shape, flat.leaves), strict=True))
    traced = dict(zip(graph.paths, graph.shapes, strict=True))
    for path in paths:
        if path not in traced:
            raise ValueError(f"{path} is no parameter of the traced function; it has {list(traced)}.")
        if shapes.get(path) != traced[path]:
            found = f"has shape {shapes[path]}" if path in shapes else "is missing"
            raise ValueError(f"{path} {found}; the function was traced with shape {traced[path]}. Trace it anew.")


def _measure(group: ChannelGroup, rows: Mapping[str, np.ndarray], importance: Importance) -> np.ndarray:
    """Return the importance of each channel from the weights of all members."""
    found: list[np.ndarray] = []
    for member in (member for member in group.members if member.path in rows):
        weights = np.moveaxis(rows[member.path], member.axis, 0)
        found.append(weights[member.elements(group.size)].reshape(group.size, -1))
    if not found:
        raise ValueError(f"scores has nothing for {group.name}: no score for {[m.path for m in group.members]}.")
    values = np.asarray(importance(np.concatenate(found, 1)), np.float64)
    if values.shape != (group.size,):
        raise ValueError(f"importance returned shape {values.shape} for {group.size} channels of {group.name}.")
    return np.where(np.isnan(values), -np.inf, values)


def _best(values: np.ndarray, count: int) -> np.ndarray:
    return np.sort(np.argsort(-values, kind="stable")[:count])


def _relative(values: np.ndarray) -> np.ndarray:
    finite = values[np.isfinite(values)]
    mean = float(np.abs(finite).mean()) if len(finite) else 0.0
    return values / mean if mean > 0 else values


def _first(last: int, plan: Callable[[int], Plan], fits: Callable[[Plan], bool], budget: float) -> int:
    """Return the least number whose plan fits; more never costs more."""
    if not fits(plan(last)):
        raise _unmet(budget)
    low, high = 0, last
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(plan(middle)) else (middle + 1, high)
    return low
