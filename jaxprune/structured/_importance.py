"""In which order the channels of a group go: by the importance of their weights, or by what their readers lose."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune._printing import some
from jaxprune._tree._given import described
from jaxprune._tree._leaves import is_complex
from jaxprune._tree._paths import flatten
from jaxprune._tree._shapes import require_shapes
from jaxprune.scores._channels import channel_norm
from jaxprune.scores._evidence import require_scores
from jaxprune.sites._calibrate import Grams, require_grams
from jaxprune.structured._graph import Graph
from jaxprune.structured._groups import ChannelGroup
from jaxprune.structured._losses import removal_order

# (weights [channels, weights], the axis of the weights) -> the importance of each channel, larger = keep.
Importance = Callable[[Any, int], Any]
# (a group, how many of its channels go) -> those channels, the first to go first, of layers that choose for themselves in a
# row for each; what each costs, in the mean of layers, never less than the one before, on a scale that groups share.
Order = Callable[[ChannelGroup, int], tuple[np.ndarray, np.ndarray]]


def order_by(graph: Graph, params: Any, grams: Grams | None, scores: Any, importance: Importance | None) -> Order:
    """Return what says which channels of a group go, from the arguments of `select_channels`."""
    flat = flatten(params, "params")
    require_shapes("The function", graph.by_path, "params", flat.shapes, "Trace it with these parameters.")
    if grams is not None:
        if scores is not None or importance is not None:
            raise ValueError("grams say what is lost with a channel; give grams, or scores and importance, not both.")
        require_grams(grams, "select_channels(graph, params, k, grams=...)")
        grams.sites.require_params(params)

        def by_losses(group: ChannelGroup, number: int) -> tuple[np.ndarray, np.ndarray]:
            found = removal_order(group, flat.by_path, grams, number)
            whole = np.where(found.whole > 0, found.whole, 1.0)[..., None]
            prices = np.maximum.accumulate(found.losses / whole, -1)
            return found.order, prices if prices.ndim == 1 else prices.mean(0)

        return by_losses

    if importance is not None and not callable(importance):
        raise TypeError(
            f"importance is {described(importance)}, not a function (weights, axis) -> importance of each channel, such as "
            "scores.channel_norm, functools.partial(scores.channel_norm, ord=1) or scores.fpgm."
        )
    rows = _rows(graph, params, scores)
    measure = importance or (channel_norm if scores is None else jnp.sum)

    def by_importance(group: ChannelGroup, number: int) -> tuple[np.ndarray, np.ndarray]:
        values = _measure(group, rows, measure)
        order = np.argsort(-values, axis=-1, kind="stable")[..., ::-1][..., :number]
        prices = np.take_along_axis(_relative(values), order, -1)
        return order, prices if prices.ndim == 1 else prices.mean(0)

    return by_importance


def _rows(graph: Graph, params: Any, scores: Any) -> dict[str, np.ndarray]:
    """Return by path what importance is measured by; what has no score counts for nothing."""
    given = flatten(params, "params")
    require_shapes("The function", graph.by_path, "params", given.shapes, "Trace it with these parameters.")
    if scores is not None:
        require_scores(scores)
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
    """Return the importance of each channel from the weights of all members, ``[channels]`` or ``[layers, channels]``."""
    found: list[np.ndarray] = []
    for member in (member for member in group.members if member.path in rows):
        leading = (member.axis,) if member.layers is None else (member.axis, member.layers)
        weights = np.moveaxis(rows[member.path], leading, range(len(leading)))[member.elements(group.size)]
        found.append(weights if member.layers is None else np.moveaxis(weights, 2, 0))
    if not found:
        raise ValueError(f"scores has nothing for {group.name}: no score for {some(m.path for m in group.members)}.")
    if group.layers is None:
        return _of_rows(group, [weights.reshape(group.size, -1) for weights in found], importance)
    layers = range(group.layers.size)
    return np.stack([_of_rows(group, [w[n].reshape(group.size, -1) for w in found], importance) for n in layers])


def _of_rows(group: ChannelGroup, rows: list[np.ndarray], importance: Importance) -> np.ndarray:
    values = np.asarray(importance(np.concatenate(rows, 1), 1), np.float64)
    if values.shape != (group.size,):
        raise ValueError(f"importance returned shape {values.shape} for {group.size} channels of {group.name}.")
    return np.where(np.isnan(values), -np.inf, values)


def _relative(values: np.ndarray) -> np.ndarray:
    """Divide importances by their mean, in each layer by its own."""
    finite = np.isfinite(values)
    number = finite.sum(-1, keepdims=True)
    mean = np.where(finite, np.abs(values), 0.0).sum(-1, keepdims=True) / np.maximum(number, 1)
    return values / np.where(mean > 0, mean, 1.0)
