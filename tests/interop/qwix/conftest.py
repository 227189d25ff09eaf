"""qwix and Flax promote as JAX does by default."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _as_by_default():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
