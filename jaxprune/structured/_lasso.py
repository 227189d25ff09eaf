"""The group lasso over coupled channels: a penalty that drives whole channels to zero while training."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._tree._leaves import is_complex
from jaxprune._tree._paths import flatten
from jaxprune._tree._shapes import require_shapes
from jaxprune._tree._sharding import whole
from jaxprune.structured._graph import Graph
from jaxprune.structured._groups import Member


def group_lasso(graph: Graph, params: Any) -> jax.Array:
    """Penalise coupled channels by their norms, so that training drives whole channels to zero.

    Add ``strength * group_lasso(graph, params)`` to a loss: the sum over channels of ``sqrt(n) ||w||``, where ``w`` is
    the n weights that would be cut with a channel, those of its producers, biases, norms and consumers. Its gradient is
    ``sqrt(n) w / ||w||``, as long for a small channel as for a large one, so that channels of no use fade as a whole;
    `select_channels` then finds them. Gradient steps bring norms near zero, within a step's size, not to zero itself.

    Channels that are part of others (the dimensions of attention heads) are left out, as in `select_channels`; the
    outer ones hold their weights. A weight between two channels counts for both; one that a recurrent kernel has
    between a channel and itself, twice. Channels that each layer of a scan keeps for itself count layer by layer. Sums are in float32 whatever the dtype. The gradient at a channel of zeros is
    zero (a subgradient). A NaN makes the result NaN. Pure; works under jit, grad and vmap, and on sharded arrays.

    Args:
        graph: the function's channels, by `trace`.
        params: its parameters; may be traced.

    Returns:
        A scalar of float32.

    Raises:
        ValueError: the function has no channels that can be cut; the parameters are not those that were traced.

    Yuan & Lin, Model Selection and Estimation in Regression with Grouped Variables, 2006; Wen et al., Learning
    Structured Sparsity in Deep Neural Networks, 2016; for coupled layers, Fang et al., DepGraph, 2023.

    >>> from jaxprune.structured import trace
    >>> params = {"up": jnp.array([[3.0, 0.0, 1.0]]), "down": jnp.array([[4.0], [0.0], [0.0]])}
    >>> graph = trace(lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"], params, jnp.ones((5, 1)))
    >>> float(group_lasso(graph, params) / jnp.sqrt(2))  # channels of norm 5, 0 and 1, of two weights each
    6.0
    """
    outermost = [group for group in graph.groups if not group.outer]
    if not outermost:
        raise ValueError("The function has no channels that can be cut; print the graph to see what keeps them.")
    flat = flatten(params, "params")
    leaves = dict(zip(flat.paths, flat.leaves, strict=True))
    require_shapes("The function", graph.by_path, "params", flat.shapes, "Trace it with these parameters.")
    penalty = jnp.float32(0)
    for group in outermost:
        squares = sum(_squares(leaves[member.path], member, group.size) for member in group.members)
        layers = 1 if group.layers is None else group.layers.size
        weights = (
            sum(_weights(np.shape(leaves[member.path]), member) for member in group.members) // group.size // layers
        )
        penalty += math.sqrt(weights) * _root(squares).sum()
    return penalty


def _weights(shape: tuple[int, ...], member: Member) -> int:
    """How many weights of a member belong to any channel."""
    return math.prod(shape) // shape[member.axis] * int((member.channels >= 0).sum())


def _squares(leaf: Any, member: Member, size: int) -> jax.Array:
    """Sum the squares of a member's weights, by channel; by layer and channel, where each layer keeps its own."""
    leaf = jnp.asarray(leaf)
    squares = jnp.square(jnp.real(leaf).astype(jnp.float32))
    if is_complex(leaf):  # by its parts: the modulus has no gradient at zero
        squares += jnp.square(jnp.imag(leaf).astype(jnp.float32))
    own = (member.axis,) if member.layers is None else (member.layers, member.axis)
    summed = squares.sum([axis for axis in range(leaf.ndim) if axis not in own])
    rows = summed.T if member.layers is not None and member.layers > member.axis else summed
    return whole(rows)[..., member.elements(size)].sum(-1)


def _root(squares: Any) -> jax.Array:
    """The square root, with gradient zero at zero."""
    zero = squares == 0
    return jnp.where(zero, 0.0, jnp.sqrt(jnp.where(zero, 1.0, squares)))
