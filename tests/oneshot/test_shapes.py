"""Shapes in signatures hold: what does not fit is refused while testing (`conftest.py`)."""

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from jaxprune._selection import _counts
from jaxprune._selection._largest import keep_largest
from jaxprune.oneshot._reconstruct import reconstruct_matrix
from jaxprune.sites._factorise import factorise, inverse_root

WEIGHTS, MASK, GRAM = jnp.ones((3, 2)), jnp.ones((3, 2), bool), jnp.eye(3)


def test_what_fits_passes_traced_and_mapped():
    solve = jax.jit(lambda *arrays: reconstruct_matrix(*arrays, steps=2))
    assert solve(WEIGHTS, MASK, GRAM).tolist() == WEIGHTS.tolist()
    stacks = jax.tree.map(lambda array: jnp.stack([array] * 4), (WEIGHTS, MASK, GRAM))
    assert jax.vmap(solve)(*stacks).shape == (4, 3, 2)


@pytest.mark.parametrize(
    "arrays",
    [
        (WEIGHTS, MASK.T, GRAM),
        (WEIGHTS, MASK, jnp.eye(2)),
        (WEIGHTS, MASK.astype(jnp.float32), GRAM),
        (WEIGHTS.astype(jnp.bfloat16), MASK, GRAM),
    ],
    ids=["a transposed mask", "a Gram matrix of the outputs", "a mask of numbers", "weights in bfloat16"],
)
def test_what_does_not_fit_is_refused(arrays):
    with pytest.raises(TypeCheckError, match="reconstruct_matrix"):
        reconstruct_matrix(*arrays, steps=2)


def test_other_functions_are_checked_as_well():
    with pytest.raises(TypeCheckError, match="factorise"):
        factorise(WEIGHTS, jnp.float32(0.1))
    with pytest.raises(TypeCheckError, match="inverse_root"):
        inverse_root(WEIGHTS)
    with pytest.raises(TypeCheckError, match="keep_largest"):
        keep_largest(MASK, _counts.from_int(1), magnitude=True)
