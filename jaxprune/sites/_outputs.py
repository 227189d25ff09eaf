"""Products of the inputs of a parameter with outputs that are wanted of it: the right side of its least squares."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._dtypes import wide
from jaxprune._jaxpr import _equations
from jaxprune._jaxpr._equations import Equation
from jaxprune.sites._contractions import Use, recognise
from jaxprune.sites._origins import DATA, Origin
from jaxprune.sites._pieces import Piece
from jaxprune.sites._views import View, apply_steps


def output_products(equation: Equation, use: Use, data: Sequence[Any], outputs: Any) -> jax.Array:
    """Return ``X^T Y``, summed over samples, ``[B, I, O]``, at the highest precision.

    A product is linear in its parameter W; ``Y -> X^T Y`` is the transpose of ``W -> X W``, whatever the layout.

    Args:
        equation: the product.
        use: how a parameter is used in it: whole, as the one operand that is no data.
        data: the other operands, X.
        outputs: Y, in the layout of the equation's result.
    """
    (at,) = set(range(len(equation.in_shapes))) - set(use.operands)
    shape, dtype = equation.in_shapes[at], wide(jnp.result_type(outputs))
    origins = [DATA] * len(equation.in_shapes)
    origins[at] = Origin(pieces=(Piece(View(0, shape)),), leaves=frozenset([0]))
    (seen,) = recognise(equation, origins)
    precise = equation.with_params(precision=(jax.lax.Precision.HIGHEST,) * 2, preferred_element_type=dtype)
    operands = [x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x for x in data]

    def product(weights: jax.Array) -> jax.Array:
        every = iter(operands)
        return _equations.evaluate(precise, [weights if i == at else next(every) for i in range(len(origins))])[0]

    (products,) = jax.linear_transpose(product, jax.ShapeDtypeStruct(shape, dtype))(outputs.astype(dtype))
    return apply_steps(seen.view.steps, products).reshape(seen.matrix_shape)
