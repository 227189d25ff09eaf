"""Sites as the matrices that solvers and scores take."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune._tree._leaves import is_floating, is_known, own
from jaxprune._tree._masks import keeps_all, kept
from jaxprune.sites._calibrate import Grams
from jaxprune.sites._sites import LEAVE_DENSE, Site


def is_pruned(mask: Any, leaf: Any, grams: Grams, path: str) -> bool:
    """Whether a mask prunes something of a leaf that the others can make up for.

    Of a mask that cannot be read, under jit or on other hosts, it counts whether the leaf multiplies calibrated data.
    """
    if mask is None or not is_floating(leaf) or keeps_all(mask):
        return False
    return is_known(mask) or grams.sites.prunable(path, leaf)


def as_masked(leaf: Any, mask: Any) -> Any:
    """A copy of a leaf that `is_pruned` says nothing of, under its mask where nobody could read that."""
    unread = mask is not None and is_floating(leaf) and not is_known(mask)
    return kept(leaf, mask) if unread else own(leaf)


def sites_of(grams: Grams, path: str, title: str) -> tuple[Site, ...]:
    """The sites of a leaf that is to be pruned; raise where there is none, or two of them share weights."""
    sites = grams.sites.at(path)
    unresolved = [entry.reason for entry in grams.sites.unresolved if entry.path == path]
    if unresolved:
        raise ValueError(f"{title} knows not all inputs of {sites[0].name}: {'; '.join(unresolved)}. {LEAVE_DENSE}")
    if path in grams.sites.tables:
        both = any(site.operation != "gather" for site in sites)
        raise ValueError(
            f"{sites[0].name} is a table of which rows are read{', and a matrix as well' if both else ''}; "
            f"{title} prunes what multiplies data only. {LEAVE_DENSE}"
        )
    if overlap(sites):
        raise ValueError(
            f"{sites[0].name} multiplies data in {len(sites)} ways that share weights (tied or transposed); {title} "
            f"has one Gram matrix for each way and cannot serve both. {LEAVE_DENSE}"
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
