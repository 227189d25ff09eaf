"""A loss of the function without some channels and branches, which are arguments: one program measures every choice."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.structured._axes._replay import Masks, Replay
from jaxprune.structured._graph import Graph
from jaxprune.structured._rebuild import at_shapes, evaluate, whole_shapes

# (a function like the one that was traced, its parameters) -> a scalar.
Loss = Callable[[Callable[..., Any], Any], Any]
# (parameters, by the names of groups which channels stay, for each of the graph's blocks which layers stay) -> the loss.
Gated = Callable[[Any, Mapping[str, Any], Sequence[Any]], Any]


def gated(graph: Graph, loss: Loss) -> Gated:
    """Return the loss of the function without what gates of bool close; jitted.

    Raises:
        ValueError: when it is called, the loss is no scalar.
    """

    @jax.jit
    def measure(params: Any, channels: Mapping[str, Any], layers: Sequence[Any]) -> Any:
        def fn(params: Any, *inputs: Any) -> Any:
            here = at_shapes(graph, inputs)
            masks: Masks = {here.group(name).var: stays for name, stays in channels.items()}
            masks |= {block.place: gate for block, gate in zip(here.blocks, layers, strict=True)}
            return evaluate(here, Replay(), params, whole_shapes(here), inputs, masks)

        value = jnp.asarray(loss(fn, params))
        if value.shape:
            raise ValueError(f"loss is to return a scalar; it returned an array of shape {value.shape}.")
        return value

    return measure
