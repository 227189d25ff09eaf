"""Sites as the matrices that solvers and scores take."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.sites._calibrate import Grams
from jaxprune.sites._sites import Site


def sites_of(grams: Grams, path: str, title: str) -> tuple[Site, ...]:
    """The sites of a leaf that is to be pruned; raise where there is none, or two of them share weights."""
    sites = grams.sites.at(path)
    unresolved = [entry.reason for entry in grams.sites.unresolved if entry.path == path]
    if unresolved:
        raise ValueError(
            f"{title} knows not all inputs of {sites[0].name}: {'; '.join(unresolved)}. Leave it dense with prunable=..."
        )
    if path in grams.sites.tables:
        both = any(site.operation != "gather" for site in sites)
        raise ValueError(
            f"{sites[0].name} is a table of which rows are read{', and a matrix as well' if both else ''}; "
            f"{title} prunes what multiplies data only. Leave it dense with prunable=..."
        )
    if overlap(sites):
        raise ValueError(
            f"{sites[0].name} multiplies data in {len(sites)} ways that share weights (tied or transposed); {title} "
            "has one Gram matrix for each way and cannot serve both. Leave it dense with prunable=..."
        )
    return sites


def overlap(sites: Sequence[Site]) -> bool:
    """Whether two of a leaf's sites share weights."""
    if len(sites) == 1:
        return False
    with jax.ensure_compile_time_eval():
        uses = jnp.zeros(sites[0].shape, jnp.int32)
        for site in sites:
            uses = site.put(uses, site.matrices(uses) + 1)
        return int(uses.max(initial=0)) > 1


def as_matrices(site: Site, leaf: Any) -> jax.Array:
    """The leaf as matrices [N, inputs, outputs] of float32; what is not finite is zero, and so does not spread."""
    matrices = site.matrices(leaf).astype(jnp.float32)
    return jnp.where(jnp.isfinite(matrices), matrices, 0.0)
