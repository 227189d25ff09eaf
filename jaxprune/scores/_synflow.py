"""Synaptic flow: scores without data."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._dtypes import wide
from jaxprune._tree._leaves import is_floating, is_known
from jaxprune._tree._paths import flatten, read_arrays
from jaxprune.scores._leaves import floats, leaf_score, map_leaves, require_real_leaves, widen, with_floats


@leaf_score
def _synflow(weights: jax.Array, slope: jax.Array) -> jax.Array:
    return jnp.abs(weights * slope)


def synflow(fn: Callable[[Any, Any], Any], params: Any, x: Any) -> Any:
    """Score weights by the synaptic flow through them, ``|w dR/d|w||``, without data.

    R is the sum of the outputs of the network with the magnitudes of its parameters, fed with ones. In a net
    of ReLUs and without biases it is the sum, over all paths from an input to an output, of the product of
    the weights on the path; a weight's score is what the paths through it contribute, and the scores of every
    layer add up to R.

    Computed in float32 (float64 stays). R grows exponentially with depth: where it overflows, enable x64 and
    pass float64 parameters. A NaN weight counts as zero and scores minus infinity. To prune by one such call
    is not the paper's method, which takes many rounds: see `synflow_masks`.

    Args:
        fn: ``(params, x) -> outputs``, a tree of arrays; as for inference (a batch norm should use its
            running averages).
        params: a pytree of arrays; leaves that are not floating-point are passed on as they are and have
            no score.
        x: one input, of which only the structure, shapes and dtypes count (``jax.ShapeDtypeStruct`` will do);
            ones take its place. A batch of one is enough.

    Returns:
        Scores of the treedef of params, float32, larger = keep.

    Raises:
        TypeError: x holds integers: the ones belong behind the embedding; or a leaf of params is complex.
        ValueError: outside jit, when R is not finite.

    >>> import jax.numpy as jnp
    >>> params = [jnp.array([[1.0, -2.0]]), jnp.array([[3.0], [5.0]])]
    >>> scores = synflow(lambda params, x: x @ params[0] @ params[1], params, jnp.zeros((1, 1)))
    >>> scores[0].tolist(), scores[1].tolist()  # R = 1 * 3 + 2 * 5
    ([[3.0, 10.0]], [[3.0], [10.0]])

    Reference: Tanaka, Kunin, Yamins, Ganguli, "Pruning neural networks without any data by iteratively
    conserving synaptic flow", 2020, section 6.
    """
    flat = read_arrays(params, "params")
    require_real_leaves(flat, "scores.synflow")
    inputs = flatten(x, "x")
    for name, leaf in zip(inputs.names, inputs.leaves, strict=True):
        if not is_floating(leaf):
            raise TypeError(
                f"synflow feeds ones, but {name} holds {jnp.result_type(leaf)}; pass a function that begins behind "
                "the embedding, and an x for it."
            )
    ones = inputs.treedef.unflatten([jnp.ones(np.shape(leaf), wide(jnp.result_type(leaf))) for leaf in inputs.leaves])

    def total(magnitudes: list[jax.Array]) -> jax.Array:
        outputs = jax.tree.leaves(fn(flat.build(with_floats(flat, magnitudes)), ones))
        return jnp.asarray(sum((jnp.sum(widen(output)) for output in outputs), 0.0))

    flow, slopes = jax.value_and_grad(total)([_magnitude(leaf) for leaf in floats(flat)])
    if is_known(flow) and not jnp.isfinite(flow):
        raise ValueError(
            f"the synaptic flow R is {flow}, not a finite number. Deep or wide networks overflow float32: enable "
            "x64 and pass float64 parameters; an infinite weight has the same effect."
        )
    return map_leaves(_synflow, flat, with_floats(flat, slopes))


@jax.jit
def _magnitude(leaf: jax.Array) -> jax.Array:
    weights = widen(leaf)
    return jnp.where(jnp.isnan(weights), 0.0, jnp.abs(weights))
