"""The dtypes that numbers are computed in, the same whatever promotion of dtypes JAX is set to."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def wide(dtype: Any) -> np.dtype:
    """The dtype to compute in: float32; what has 64 bits and more (float64, complex numbers) stays."""
    dtype = np.dtype(dtype)
    return dtype if jnp.issubdtype(dtype, jnp.inexact) and dtype.itemsize >= 8 else np.dtype(np.float32)


def real(dtype: Any) -> np.dtype:
    """The dtype of the moduli of complex numbers; of real ones their own."""
    dtype = np.dtype(dtype)
    return np.finfo(dtype).dtype if jnp.issubdtype(dtype, jnp.complexfloating) else dtype


def widen(x: jax.Array) -> jax.Array:
    """Return x in the dtype to compute in."""
    return x.astype(wide(x.dtype))


def with_infinities(x: jax.Array) -> jax.Array:
    """Return x, in float32 where its format has eight bits or fewer: most of these have no infinity, some no NaN."""
    return widen(x) if x.dtype.itemsize == 1 else x


def common(dtypes: Iterable[Any]) -> np.dtype:
    """The dtype in which floating-point numbers of all these dtypes can be held; their own where it is one."""
    found = {np.dtype(dtype) for dtype in dtypes}
    return found.pop() if len(found) == 1 else np.result_type(*map(wide, found))
