"""Measure what a function takes at some widths of each group, and without each residual branch."""

import itertools
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from jaxprune._progress import tracked
from jaxprune.structured._blocks import Block
from jaxprune.structured._graph import Graph, require_graph
from jaxprune.structured._groups import ChannelGroup
from jaxprune.structured._naming import by_group
from jaxprune.structured._plan import Plan, require_plan
from jaxprune.structured._rebuild import at_shapes, rebuild
from jaxprune.structured._select_channels import check_whole, groups_among, kept_count
from jaxprune.structured._shrink import cut_inputs, cut_out
from jaxprune.structured._structures import structures
from jaxprune.structured._widths._price_widths import widths_of
from jaxprune.structured._widths._times import Part, Times, cut

P = TypeVar("P", bound=Part)
# (a function, its arguments) -> the seconds that one call takes.
Timer = Callable[..., float]


def seconds(fn: Callable[..., Any], *arguments: Any) -> float:
    """Return the seconds that a call of a compiled function takes, once the call before it has fetched what it needs."""
    jax.block_until_ready(fn(*arguments))
    start = time.perf_counter()
    jax.block_until_ready(fn(*arguments))
    return time.perf_counter() - start


class Prediction(NamedTuple):
    """What was expected of a smaller function, and what was measured: seconds (`check_times`), or a rise of the loss.

    Attributes:
        predicted: by `Times`, or by `Allocation.price`.
        measured: in the same unit.

    >>> round(Prediction(predicted=1.1, measured=1.0).error, 3)
    0.1
    """

    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """The share by which the prediction is too high; below 0, too low."""
        return self.predicted / self.measured - 1


def measure_times(
    graph: Graph,
    params: Any,
    *inputs: Any,
    among: str | Sequence[str] | None = None,
    options: int = 4,
    round_to: int | Mapping[str, int] = 1,
    min_kept: int = 1,
    repeats: int = 20,
    timer: Timer = seconds,
    progress: bool = False,
) -> Times:
    """Measure what a function takes, compiled, at some widths of each group, and without each residual branch and layer of a scan.

    Groups that are alike in structure and size, as those of equal layers, are cut at once, and each is given its share:
    one program for each such kind and width, and a larger difference than any one of them would make. Of a scan's layers half are
    dropped, as each takes the same. All programs are timed in turns, and the lower quartile of each counts: other programs on the
    machine make times longer, and a clock that is set right makes few of them shorter. Noise decides nothing: what a group takes
    is made to rise with its width, by isotonic regression. Where groups share matrices, as convolutions one after the other do, all
    are cut at once as well.

    Times are those of the device and the shapes that they are measured with; keep them by `Times.to_json`.

    Args:
        graph: the function, by `trace`.
        params: its parameters, on the device.
        *inputs: its other arguments, of the shapes that it is to be fast at.
        among: the groups, by names or patterns as in `select_channels`; None for all that are not part of others.
        options: widths of a group that are measured, evenly spaced, its own among them; beside the least one that it may have.
        round_to: as in `select_channels`.
        min_kept: the least width.
        repeats: how often everything is timed, at least 1.
        timer: ``timer(fn, *arguments) -> seconds`` of one call. The default is a clock around a call on this machine, after
            one that is not timed; yours may run the function elsewhere.
        progress: whether to show a progress bar on stderr.

    Returns:
        The times: a cost for `allocate_widths` and others, ``cost=times``.

    Raises:
        ValueError: a name fits no group; numbers out of range.

    >>> import jax.numpy as jnp
    >>> from jaxprune.structured import trace
    >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
    >>> graph = trace(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, jnp.ones((5, 3)))
    >>> count = lambda fn, params, x: 2.0 + params["up"].size  # of a device that takes a second for each weight of "up"
    >>> times = measure_times(graph, params, jnp.ones((5, 3)), timer=count)
    >>> times.whole, times.widths
    (26.0, {'up[1]': {1: 5.0, 2: 8.0, 4: 14.0, 6: 20.0, 8: 26.0}})

    Reference: times in place of counts, Yang et al., "NetAdapt: Platform-Aware Neural Network Adaptation for Mobile
    Applications", 2018, section 3.3.
    """
    require_graph(graph, "measure_times(graph, params, *inputs)")
    for number, name in ((options, "options"), (repeats, "repeats"), (min_kept, "min_kept")):
        check_whole(number, name)
    steps = by_group(graph, round_to, "round_to", 1, check_whole)
    names = [group.name for group in groups_among(graph, among)]
    graph = at_shapes(graph, inputs)
    times = Times(graph, _device(params), 0.0, {}, {}, 1.0)
    groups, blocks = _kinds(times, [graph.group(name) for name in names])
    widths = {}
    for group in (kind[0] for kind in groups):
        step, last = steps[group.name], 1 - 1 / group.size
        asked = {*widths_of(group, options, step, min_kept), kept_count(group, last, step, min_kept)}
        widths[group.name] = sorted(asked - {group.size})
    cuts: list[tuple[Sequence[Part], int]] = [(kind, width) for kind in groups for width in widths[kind[0].name]]
    cuts += [(kind, 0) for kind in blocks]
    # Half of a scan's layers: of one alone it would be no loop any more.
    cuts += [([block], (block.size + 1) // 2) for block in graph.blocks if block.size > 1]
    alone = [[(part, width) for part in kind] for kind, width in cuts]
    joint = _joint(times, groups, widths)
    plans = [cut(graph, each) for each in ([], *alone, *joint)]
    whole, *taken = _measure(graph, plans, params, inputs, repeats, timer, progress)
    found: dict[str, dict[int, float]] = {name: {} for name in names}
    dropped: dict[str, float] = {}
    for _, rows in itertools.groupby(zip(cuts, taken, strict=False), key=lambda row: id(row[0][0])):
        kind_widths, times_taken = zip(*rows, strict=True)
        for (kind, width), rising in zip(kind_widths, _rising([*times_taken, whole]), strict=False):
            saved = whole - float(rising)
            for part in kind:
                gone = part.size - width if isinstance(part, Block) else 1  # layers of a scan
                each = whole - saved / len(kind) / gone
                if isinstance(part, Block):
                    dropped[part.name] = each
                else:
                    found[part.name][width] = each
    for name, table in found.items():
        table[graph.group(name).size] = whole
    dropped = {block.name: dropped[block.name] for block in graph.blocks if block.name in dropped}
    overlap = _overlap(times, whole, found, joint, plans[-len(joint) :] if joint else [], taken[len(alone) :])
    return Times(graph, times.device, whole, found, dropped, overlap)


def _joint(
    times: Times, kinds: Sequence[Sequence[ChannelGroup]], widths: Mapping[str, Sequence[int]]
) -> list[list[tuple[Part, int]]]:
    """Return cuts of all groups at once, to the least width of each, the next one and so on; none where what they save adds up."""
    found: list[list[tuple[Part, int]]] = []
    for level in range(max((len(each) for each in widths.values()), default=0)):
        tables = [(kind, widths[kind[0].name]) for kind in kinds if widths[kind[0].name]]
        parts: list[tuple[Part, int]] = [(group, w[min(level, len(w) - 1)]) for kind, w in tables for group in kind]
        if times.had_twice(parts, cut(times.graph, parts)) > 0:
            found.append(parts)
    return found


def _overlap(
    times: Times,
    whole: float,
    found: Mapping[str, Mapping[int, float]],
    joint: Sequence[Sequence[tuple[Part, int]]],
    plans: Sequence[Plan],
    taken: Sequence[float],
) -> float:
    """Return the overlap by which times of cuts of all groups are predicted best, by least squares, from 0 to 1; 1 where none is known."""
    sums = np.array([sum(whole - found[part.name][width] for part, width in parts) for parts in joint])
    expected = sums * np.array([times.had_twice(parts, plan) for parts, plan in zip(joint, plans, strict=True)])
    missing = sums - (whole - np.array(taken))
    return float(np.clip(expected @ missing / (expected @ expected), 0.0, 1.0)) if expected.any() else 1.0


def check_times(
    times: Times, plan: Plan, params: Any, *inputs: Any, repeats: int = 20, timer: Timer = seconds
) -> Prediction:
    """Compare what times say of a smaller function with what it takes.

    The smaller and the whole function are timed in turns, and lower quartiles count. A machine that is slower now than when the
    times were measured is no error of theirs: the smaller function's share of the whole one's time is what is compared.

    Args:
        times: by `measure_times`.
        plan: what stays.
        params: the parameters before they are cut.
        *inputs: the function's other arguments, of the shapes that times were measured with.
        repeats: how often both are timed, at least 1.
        timer: as in `measure_times`.

    Returns:
        What was predicted, and the smaller function's share of the whole one's time now, times what the whole one took then, in
        seconds.

    Raises:
        ValueError: the plan does not fit, or cuts what was not measured; repeats is below 1.

    >>> import jax.numpy as jnp
    >>> from jaxprune.structured import select_channels, trace
    >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
    >>> graph = trace(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, jnp.ones((5, 3)))
    >>> steps = lambda fn, params, x: 4.0 * -(-params["up"].size // 4)  # a device that takes four at once
    >>> times = measure_times(graph, params, jnp.ones((5, 3)), timer=steps)
    >>> check_times(times, select_channels(graph, params, 3 / 8), params, jnp.ones((5, 3)), timer=steps)  # 4: 12, 6: 20
    Prediction(predicted=16.0, measured=16.0)
    """
    require_plan(plan, "check_times(times, plan, params, *inputs)")
    check_whole(repeats, "repeats")
    predicted = times(plan)
    whole, small = _measure(times.graph, [cut(times.graph, []), plan], params, inputs, repeats, timer, False)
    return Prediction(predicted, times.whole * small / whole)


def _measure(
    graph: Graph,
    plans: Sequence[Plan],
    params: Any,
    inputs: tuple[Any, ...],
    repeats: int,
    timer: Timer,
    progress: bool,
) -> list[float]:
    """Return the seconds of each smaller function; its parameters are cut anew each time, not to be held for all."""
    functions = [rebuild(graph, plan) for plan in plans]
    taken = np.zeros((repeats, len(plans)))
    for row in tracked(taken, "rounds", progress):
        for n, (fn, plan) in enumerate(zip(functions, plans, strict=True)):
            row[n] = timer(fn, cut_out(plan, params), *cut_inputs(graph, plan, inputs))
    return np.quantile(taken, 0.25, axis=0, method="lower").tolist()


def _kinds(times: Times, groups: Iterable[ChannelGroup]) -> tuple[list[list[ChannelGroup]], list[list[Block]]]:
    """Return groups, and branches, that are alike in structure, sizes and multiply-accumulates, in one list each.

    Where what they save does not add up, as of channels of convolutions one after the other, each is alone.
    """
    graph = times.graph
    structure = structures(graph)

    def of_group(group: ChannelGroup) -> Hashable:
        shapes = sorted((graph.by_path[member.path], member.axis) for member in group.members)
        return structure[group.name], group.size, tuple(shapes), times.macs_saved(group, 1)

    def of_block(block: Block) -> Hashable:
        return tuple(sorted(graph.by_path[path] for path in block.paths)), times.macs_saved(block, 0)

    branches = [block for block in graph.blocks if not block.members]
    return _apart(times, _together(groups, of_group), 1), _apart(times, _together(branches, of_block), 0)


def _together(parts: Iterable[P], key: Callable[[P], Hashable]) -> list[list[P]]:
    found: dict[Hashable, list[P]] = {}
    for part in parts:
        found.setdefault(key(part), []).append(part)
    return list(found.values())


def _apart(times: Times, kinds: Iterable[list[P]], width: int) -> list[list[P]]:
    found = []
    for kind in kinds:
        parts = [(part, width) for part in kind]
        adds_up = times.had_twice(parts, cut(times.graph, parts)) == 0
        found += [kind] if adds_up else [[part] for part in kind]
    return found


def _rising(taken: Sequence[float]) -> np.ndarray:
    """Return the closest seconds that never fall, nor rise above the last one."""
    from scipy import optimize  # takes longer to import than all of this package

    return np.minimum(optimize.isotonic_regression(taken).x, taken[-1])


def _device(params: Any) -> str:
    found = {device for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array) for device in leaf.devices()}
    kinds = sorted({device.device_kind for device in found or jax.devices()[:1]})
    return f"{max(len(found), 1)} x {', '.join(kinds)}"
