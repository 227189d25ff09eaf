"""A fixture for test modules whose libraries need JAX's standard promotion of dtypes; importing it is using it."""

from collections.abc import Iterator

import jax
import pytest


# By module, since Hypothesis runs many examples within one call of a test.
@pytest.fixture(autouse=True, scope="module")
def standard_promotion() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"):
        yield
