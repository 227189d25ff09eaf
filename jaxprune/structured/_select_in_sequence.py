"""Choose channels where they are read, one layer after the other, on what the layers that are cut already give."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._dtypes import wide
from jaxprune._printing import some
from jaxprune._progress import tracked
from jaxprune._tree._leaves import own
from jaxprune._tree._paths import flatten
from jaxprune.sites._calibrate import all_inputs
from jaxprune.sites._find import Reading, read
from jaxprune.sites._lanes import Lane, Lockstep, Stop, Weights
from jaxprune.structured._graph import Graph
from jaxprune.structured._groups import ChannelGroup
from jaxprune.structured._naming import by_group
from jaxprune.structured._plan import Plan, combine, plan_of, solve
from jaxprune.structured._readers import Readers
from jaxprune.structured._rebuild import rebuild
from jaxprune.structured._select_channels import check_options, check_share, kept_count
from jaxprune.structured._shrink import shrink

Target = Literal["dense", "current"]


def select_in_sequence(
    graph: Graph,
    params: Any,
    k: float | Mapping[str, float],
    batches: Iterable[Any],
    *,
    blocks: Plan | None = None,
    target: Target = "dense",
    round_to: int | Mapping[str, int] = 1,
    min_kept: int = 1,
    progress: bool = False,
) -> tuple[Plan, Any]:
    """Choose the channels that stay and repair what reads them, layer by layer, each on what the layers before now give.

    The function is evaluated for all batches in lockstep. Where a parameter W sums over channels of a group, the Gram
    matrix of its inputs X' is taken, as the layers that are cut by then make them; the channels go that are missed least, as
    in `select_channels` with ``grams``; W is replaced by its least-squares solution without them, and evaluation goes on with
    that. So each layer makes up for the errors of those before, and `repair` has nothing left to do.

    With ``target="dense"`` the function is evaluated as it was as well, and W is solved towards outputs T of that:
    ``(X'^T X' + d I)^-1 (X'^T T + d W)``, on the rows that stay. Where W adds to a residual stream, T is what brings the
    stream to where it is in the dense function; where layers follow that ``blocks`` drops, to where it is behind those: the
    layers that stay make up for the layers that do not. Elsewhere T is what W computes in the dense function. The ridge d
    is chosen for each matrix by generalised cross-validation; of several side by side, as experts, a hundredth of H's mean diagonal.

    For groups that are read at one place: channels of a perceptron or of a convolution, heads with their keys and values.
    What several layers read, as a residual stream, is to be cut by `select_channels`. A norm across the channels that
    stands before the place counts as it was. Each layer of a scan keeps its own channels, equally many.

    Kept in memory are, of all batches, what the function still needs where it stands (of a transformer the residual stream,
    twice and once more between two layers with a dense target; within a layer its activations), one matrix of inputs by
    inputs, and a copy of the parameters. Computes in float64 by NumPy. Not for use under jit.

    Args:
        graph: the function's channels, by `trace`.
        params: its parameters.
        k: as in `select_channels`. Groups that are named with 0 lose nothing, but what reads them is solved for.
        batches: an iterable of inputs of equal shapes, as in `calibrate_grams`; all are kept.
        blocks: which layers and residual branches go, by `select_blocks`; None for none.
        target: what a layer imitates: the dense function, or its own outputs before it was cut, on its new inputs.
        round_to: as in `select_channels`.
        min_kept: as in `select_channels`.
        progress: whether to show a progress bar on stderr.

    Returns:
        The plan of channels, and of `blocks`; and parameters of the treedef, shapes and dtypes of `params`, repaired: cut
        them by ``shrink(plan, params)``.

    Raises:
        ValueError: a group that is to be cut is not read at one place alone, or `blocks` cuts channels; k is out of range, a
            name fits no group; there is no batch, or one has another shape than the first, or is not finite.
        TypeError: what reads the channels, or the channels, are complex.

    >>> import jax.numpy as jnp
    >>> from jaxprune.structured import trace
    >>> params = {"up": jnp.array([[1.0, 4.0, 2.0, 3.0]]), "down": jnp.ones((4, 2))}
    >>> fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    >>> x = jnp.linspace(-3, 3, 50)[:, None]
    >>> plan, repaired = select_in_sequence(trace(fn, params, x), params, 0.5, [x])
    >>> plan.kept["down"], plan.to_repair, [round(float(w), 1) for w in repaired["down"][:, 0]]
    ({0: (0, 1)}, (), [1.6, 2.4, 0.0, 0.0])

    Reference: the choice as in `select_channels`; layer by layer, Frantar, Alistarh, "SparseGPT: Massive Language Models Can
    be Accurately Pruned in One-Shot", 2023, section 3.
    """
    if target not in ("dense", "current"):
        raise ValueError(f'select_in_sequence takes target="dense" or "current", not {target!r}.')
    steps = check_options(graph, round_to, min_kept)
    shares = by_group(graph, k, "k", None, check_share)
    asked = {group: share for group in graph.groups if (share := shares[group.name]) is not None}
    if not isinstance(k, Mapping):
        asked = {group: share for group, share in asked.items() if not group.outer}
    counts = {group.name: kept_count(group, k, steps[group.name], min_kept) for group, k in asked.items()}
    held = all_inputs(batches)
    shallow = _Shallow(graph, blocks or Plan({}, graph.by_path), params, held)
    reading = shallow.reading
    readers = Readers(reading, [group for group in asked if not shallow.lacks(group)], counts)
    weights = Weights(list(reading.flat.leaves), list(reading.flat.leaves))
    whole = read(rebuild(graph, Plan({}, graph.by_path)), params, held[0]) if target == "dense" else None
    dense = None if whole is None else _ahead(_stops(whole, held), shallow.lost)
    position = {path: number for number, path in enumerate(reading.flat.paths)}

    def leaf(path: str) -> Any:
        return weights.current[position[path]]

    lockstep = Lockstep(weights, {at: use.operands for at, (_, use) in readers.planned.items()}, dense=False)
    number = sum(site.layers for site, _ in readers.planned.values())
    # Nothing is evaluated behind the last one.
    stops = itertools.islice(lockstep.stops(reading.body, _by_input(held)), number)
    for stop in tracked(stops, "choosing channels", progress, number):
        site, _ = readers.planned[stop.place, stop.number]
        key = shallow.key(site.path, stop.layers)
        outputs = None if dense is None else _outputs(stop, *next(twin for other, twin in dense if other == key))
        weights.replace(position[site.path], readers.solve(stop, leaf, outputs))
    kept = {group.var: shallow.whole(group, readers.kept[group.name]) for group in asked if group.name in readers.kept}
    plan = plan_of(graph, {var: rows for var, rows in kept.items() if rows.shape[-1] < var.size})
    changed = {site.path: leaf(site.path) for site, _ in readers.planned.values()}
    return combine(plan, shallow.plan), shallow.put_back(params, changed)


# A parameter, and the layer of the whole function that it is read in.
_Key = tuple[str, tuple[int, ...]]


class _Shallow:
    """The function without the layers and branches that go.

    Args:
        graph: the whole function.
        plan: which go.
        params: the parameters of the whole function.
        held: the inputs of all batches.

    Attributes:
        plan: which go.
        reading: where its parameters meet data.
    """

    def __init__(self, graph: Graph, plan: Plan, params: Any, held: Sequence[tuple[Any, ...]]) -> None:
        self._layers = solve(graph, plan)
        channels = [group.name for group in graph.groups if group.var in self._layers]
        if channels:
            raise ValueError(f"blocks is to drop layers or branches, but it cuts channels: {some(channels)}.")
        self.plan = plan
        smaller = shrink(plan, params) if plan.kept or plan.dropped else params
        self.reading = read(rebuild(graph, plan), smaller, held[0])

    def lacks(self, group: ChannelGroup) -> bool:
        """Whether what reads a group's channels is gone."""
        readers = [member.path for member in group.members if member.reads]
        return bool(readers) and set(readers) <= set(self.plan.dropped)

    def key(self, path: str, layers: tuple[int, ...]) -> _Key:
        """Return where a parameter of some layer was in the whole function."""
        for stay in self.plan.kept.get(path, {}).values():
            return path, tuple(stay[layer] for layer in layers)
        return path, layers

    def lost(self, key: _Key) -> bool:
        """Whether a parameter of the whole function is gone, or the layer that it is read in."""
        path, layers = key
        stay = [layer for kept in self.plan.kept.get(path, {}).values() for layer in kept]
        return path in self.plan.dropped or bool(stay and layers and layers[0] not in stay)

    def whole(self, group: ChannelGroup, kept: Mapping[int, np.ndarray]) -> np.ndarray:
        """Return what stays of a group in all layers of the whole function; of those that go, the first channels."""
        if group.layers is None:
            return kept[0]
        rows = np.tile(np.arange(len(kept[0])), (group.layers.size, 1))
        for layer, number in enumerate(self._layers.get(group.layers, range(group.layers.size))):
            rows[number] = kept[layer]
        return rows

    def put_back(self, params: Any, changed: Mapping[str, Any]) -> Any:
        """Return the parameters of the whole function with those that changed."""
        flat = flatten(params, "params")
        found = []
        for path, leaf in zip(flat.paths, flat.leaves, strict=True):
            new = changed.get(path, leaf)
            for axis, stay in self.plan.kept.get(path, {}).items() if path in changed else ():
                new = jnp.asarray(leaf).at[(slice(None),) * axis + (np.asarray(stay),)].set(new)
            found.append(own(leaf) if new is leaf else new)
        return flat.build(found)


def _by_input(held: Sequence[tuple[Any, ...]]) -> list[list[Any]]:
    return [list(arrays) for arrays in zip(*map(jax.tree.leaves, held), strict=True)]


def _stops(reading: Reading, held: Sequence[tuple[Any, ...]]) -> Iterator[tuple[_Key, Stop]]:
    """Evaluate a function as it is, and yield every place where a parameter meets data."""
    weights = Weights(list(reading.flat.leaves), list(reading.flat.leaves))
    planned = reading.in_order(reading.flat.paths)
    lockstep = Lockstep(weights, dict.fromkeys(planned, ()), dense=False)
    for stop in lockstep.stops(reading.body, _by_input(held)):
        yield (planned[stop.place, stop.number][0].path, stop.layers), stop


def _ahead(
    stops: Iterator[tuple[_Key, Stop]], lost: Callable[[_Key], bool]
) -> Iterator[tuple[_Key, tuple[Stop, Lane | None]]]:
    """Yield the stops that are in the smaller function, too, and the stream that each adds to, as it is when the next one comes."""
    held: tuple[_Key, Stop] | None = None
    after: list[Stop] = []
    for key, stop in stops:
        if lost(key):
            after += [stop] if stop.stream is not None else []
            continue
        if held is not None:
            yield held[0], (held[1], _end(held[1], after))
        held, after = (key, stop), []
    if held is not None:
        yield held[0], (held[1], _end(held[1], after))


def _end(stop: Stop, after: Sequence[Stop]) -> Lane | None:
    """Return the stream behind a stop, and behind those that add to it on."""
    end = stop.total
    for other in after:
        if other.stream is end:
            end = other.total
    return end


def _outputs(stop: Stop, twin: Stop, end: Lane | None) -> Iterator[jax.Array]:
    """Yield for each batch what a parameter is to compute, in float32 at least.

    Args:
        stop: where it is read.
        twin: the same place in the whole function.
        end: where the stream is to be that both add to.
    """
    assert twin.result is not None
    for batch, result in enumerate(twin.result.current):
        wanted = result.astype(wide(result.dtype))
        if stop.stream is not None and twin.stream is not None and twin.total is not None and end is not None:
            ahead, missing = (
                new.current[batch].astype(wanted.dtype) - old.current[batch].astype(wanted.dtype)
                for new, old in ((end, twin.total), (twin.stream, stop.stream))
            )
            wanted += (ahead + missing).reshape(wanted.shape)
        yield wanted
