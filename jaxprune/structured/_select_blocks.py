"""Choose layers and residual branches to drop, by how little their absence raises the loss."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxprune._progress import tracked
from jaxprune.structured._axes._dims import Var
from jaxprune.structured._blocks import Block
from jaxprune.structured._gated import Loss, gated
from jaxprune.structured._graph import Graph
from jaxprune.structured._plan import Plan, plan_of


def select_blocks(graph: Graph, params: Any, number: int, loss: Loss, *, progress: bool = False) -> Plan:
    """Choose layers and residual branches to drop, one after the other: each time the one that is missed least.

    Each that is left is left out in turn, and the one goes for which the loss is least, among equals the first one. Of
    scanned layers at least one stays; branches may all go. A loss that is not finite is taken for the worst. Compiles once; calls
    the function ``number`` times as often as there are blocks, at most.

    Args:
        graph: the function, by `trace`; ``graph.blocks`` says what can be dropped.
        params: its parameters. Values are read: not under jit.
        number: how many go, at least 1: layers of a scan count each, a branch counts as one.
        loss: ``loss(fn, params) -> scalar``, traceable by JAX, of a function like the one that was traced: of the
            batches that it is to be measured on it may close over any number, of any shapes.
        progress: whether to show a progress bar on stderr for each block that goes.

    Returns:
        The plan: for scanned layers, those that stay along the axis they are stacked in; for branches, the parameters
        that are dropped. Join it with a plan of channels by `combine`.

    Raises:
        ValueError: nothing can be dropped, or not so much; the loss is no scalar, or is finite for none.

    >>> import jax.numpy as jnp
    >>> from jaxprune.structured import trace
    >>> params = {"f": jnp.array([[2.0]]), "g": jnp.array([[0.5]])}
    >>> def fn(params, x):
    ...     x = x + jnp.tanh(x @ params["f"])
    ...     return x + jnp.tanh(x @ params["g"])
    >>> x = jnp.ones((3, 1))
    >>> graph, y = trace(fn, params, x), fn(params, x)
    >>> [block.name for block in graph.blocks]
    ['f', 'g']
    >>> select_blocks(graph, params, 1, lambda fn, params: jnp.square(fn(params, x) - y).mean()).dropped
    ('g',)

    Reference: Song, Oh, Kim, Kim, Kim, Kim, "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of
    Transformer Blocks", 2024, algorithm 1.
    """
    _check_number(graph, number)

    measure = gated(graph, loss)
    gates = [np.ones((block.size,) if block.members else (), bool) for block in graph.blocks]
    for gone in range(number):
        choices = list(_choices(graph.blocks, gates))
        if not choices:
            raise ValueError(f"number is {number}, but behind {gone} nothing is left that can be dropped.")
        title = f"block {gone + 1} of {number}"
        losses = np.array([float(measure(params, {}, choice)) for choice in tracked(choices, title, progress)])
        if not np.isfinite(losses).any():
            raise ValueError(
                f"With {gone} of {number} blocks dropped, loss is finite for no choice of the next one: {losses}."
            )
        gates = choices[int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))]
    pairs = list(zip(graph.blocks, gates, strict=True))
    kept = {block.place: np.flatnonzero(gate) for block, gate in pairs if isinstance(block.place, Var)}
    return plan_of(graph, kept, [block for block, gate in pairs if not block.members and not gate])


def _check_number(graph: Graph, number: int) -> None:
    if not graph.blocks:
        raise ValueError(
            "The function has nothing that can be dropped: no scan over stacked parameters whose layers are free (print the "
            "graph to see which axes stay, and why), and no sum x + f(x) whose f alone reads parameters."
        )
    most = sum(max(block.size - 1, 1) for block in graph.blocks)
    if not isinstance(number, int) or not 1 <= number <= most:
        raise ValueError(f"number is how many blocks go, from 1 to {most} of this function, not {number!r}.")


def _choices(blocks: Sequence[Block], gates: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Yield what stays if one more goes; what is inside of a branch that is gone is gone."""
    gone = [set(block.paths) for block, gate in zip(blocks, gates, strict=True) if not gate.any()]
    for number, (block, gate) in enumerate(zip(blocks, gates, strict=True)):
        if any(paths.issuperset(block.paths) for paths in gone) or (block.members and gate.sum() == 1):
            continue
        for layer in np.ndindex(gate.shape):
            if gate[layer]:
                fewer = gate.copy()
                fewer[layer] = False
                yield [*gates[:number], fewer, *gates[number + 1 :]]
