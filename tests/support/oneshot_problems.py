"""Parameters that are matrices, with Gram matrices given instead of measured: the one-shot methods by themselves."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune.sites._calibrate import Grams
from jaxprune.sites._sites import Site, Sites


def grams_of(matrices: dict[str, np.ndarray], grams: dict[str, np.ndarray]) -> Grams:
    """Sites and statistics of parameters ``{name: {"kernel": [inputs, outputs] or [N, inputs, outputs]}}``."""
    sites = []
    for group, (name, matrix) in enumerate(matrices.items()):
        *stack, inputs, outputs = matrix.shape
        axes = range(matrix.ndim)
        sites.append(
            Site(
                path=f"{name}/kernel",
                name=f"params['{name}']['kernel']",
                operation="dot",
                shape=matrix.shape,
                matrix_shape=(int(np.prod(stack)), inputs, outputs),
                in_axes=(axes[-2],),
                out_axes=(axes[-1],),
                stack_axes=tuple(axes[:-2]),
                input_axis=axes[-2],
                groups=(group,),
                exact=True,
                steps=(),
            )
        )
    sums = {
        group: jnp.asarray(np.asarray(grams[name]).reshape(-1, *np.shape(grams[name])[-2:]), jnp.float32)
        for group, name in enumerate(matrices)
    }
    counts = {group: jnp.full(len(gram), 1e4) for group, gram in sums.items()}  # many more than inputs
    return Grams(sites=Sites(tuple(sites)), sums=sums, counts=counts)


def params_of(**matrices: Any) -> dict[str, dict[str, Any]]:
    return {name: {"kernel": jnp.asarray(matrix)} for name, matrix in matrices.items()}


def one(weights: np.ndarray, gram: np.ndarray | Sequence[np.ndarray]) -> tuple[Any, Grams]:
    """One kernel with its statistics."""
    return params_of(a=weights), grams_of({"a": weights}, {"a": np.asarray(gram)})
