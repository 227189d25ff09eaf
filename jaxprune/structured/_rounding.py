"""How far the outputs of a function may be off by rounding alone: by what one rounding of every parameter does to them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._dtypes import wide
from jaxprune._tree._paths import flatten
from jaxprune._tree._sharding import sharded_as
from jaxprune.structured._axes._program import Program, walk

# How many times every parameter is rounded anew, and how far beyond what that does two evaluations may be apart.
_TRIALS, _MARGIN = 2, 2.0
# Relative to an output's largest magnitude: sums in another order in float32; one rounding of a result and of what it is
# compared with, in units of the coarsest dtype; and what passes in no dtype, since outputs have then little in common.
_ORDER, _UNITS, _MOST = 1e-5, 2.0, 0.5


def tolerances(
    run: Callable[[Any], Any], params: Any, program: Program, difference: Callable[[Any, Any], float]
) -> dict[str, float]:
    """Return for each output by path the largest relative difference that rounding explains.

    Every weight is moved up or down at random by one unit of the coarsest floating-point dtype that the function computes
    in, as each result of a layer is when it is rounded to that dtype, and the outputs are compared with those before. This
    asks nothing of the graph, which is what is to be verified. (Channels in another order would be the same function, but
    only if the graph is right; and in bfloat16 another order is often rounded to the same bits, another program is not.)

    Args:
        run: the function, jitted, of the parameters alone.
        params: a pytree of arrays.
        program: says which dtypes it computes in.
        difference: of a result from the expected one, relative.
    """
    unit = _unit(program)
    expected = _outputs(run(params))
    moved = dict.fromkeys(expected, 0.0)
    for key in jax.random.split(jax.random.key(0), _TRIALS):
        found = _outputs(run(_rounded(params, unit, key)))
        moved = {path: max(moved[path], difference(found[path], expected[path])) for path in expected}
    least = max(_ORDER, _UNITS * unit)
    return {path: min(max(least, _MARGIN * distance), _MOST) for path, distance in moved.items()}


def _unit(program: Program) -> float:
    """The unit of the coarsest floating-point dtype of any value."""
    values = [*program.ins, *program.outs, *(value for node in walk(program) for value in (*node.ins, *node.outs))]
    dtypes = {value.dtype for value in values if jnp.issubdtype(value.dtype, jnp.inexact)}
    return max((float(jnp.finfo(dtype).eps) for dtype in dtypes), default=0.0)


def _outputs(outputs: Any) -> Mapping[str, Any]:
    return flatten(outputs, "outputs").by_path


def _rounded(params: Any, unit: float, key: jax.Array) -> Any:
    flat = flatten(params, "params")
    keys = jax.random.split(key, max(len(flat.leaves), 1))
    return flat.build([_moved(leaf, unit, key) for leaf, key in zip(flat.leaves, keys, strict=False)])


def _moved(leaf: Any, unit: float, key: jax.Array) -> Any:
    dtype = jax.dtypes.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return leaf
    leaf = jnp.asarray(leaf)
    up = sharded_as(jax.random.bernoulli(key, 0.5, np.shape(leaf)), leaf)
    precise = leaf.astype(wide(dtype))
    return (precise + precise * jnp.where(up, unit, -unit).astype(precise.dtype)).astype(dtype)
