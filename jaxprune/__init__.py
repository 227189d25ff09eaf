"""Functional pruning for JAX: masks from parameters, optax transforms that keep them, honest reports."""

from importlib.metadata import version as _version

import jaxprune._interrupt as _interrupt  # noqa: F401, first, since what follows takes seconds
from jaxprune import algebra as algebra
from jaxprune import choose as choose
from jaxprune import distill as distill
from jaxprune import export as export
from jaxprune import learned as learned
from jaxprune import oneshot as oneshot
from jaxprune import plot as plot
from jaxprune import rules as rules
from jaxprune import scores as scores
from jaxprune import sites as sites
from jaxprune import storage as storage
from jaxprune import structured as structured
from jaxprune import transforms as transforms
from jaxprune._iterate import Round as Round
from jaxprune._iterate import iterate as iterate
from jaxprune._masks import apply_masks as apply_masks
from jaxprune._masks import make_masks as make_masks
from jaxprune._masks import sparsity as sparsity
from jaxprune._recalibrate import recalibrate as recalibrate
from jaxprune._report._write import report as report
from jaxprune._summary import Summary as Summary
from jaxprune._summary import summarize as summarize
from jaxprune._tree._prunable import is_kernel as is_kernel
from jaxprune.choose._search_k import search_k as search_k
from jaxprune.choose._sensitivity import sensitivity as sensitivity
from jaxprune.scores._evidence import mean_over_batches as mean_over_batches
from jaxprune.sites._calibrate import calibrate_grams as calibrate_grams
from jaxprune.sites._calibrate import calibrate_norms as calibrate_norms
from jaxprune.sites._find import find_sites as find_sites
from jaxprune.storage._trees import load_sparse as load_sparse
from jaxprune.storage._trees import save_sparse as save_sparse
from jaxprune.transforms._keep_pruned import keep_pruned as keep_pruned
from jaxprune.transforms._masks_in import masks_in as masks_in
from jaxprune.transforms._prune import prune as prune
from jaxprune.transforms._sparse_training import rigl as rigl

__version__ = _version("jaxprune")

__all__ = [name for name in dir() if not name.startswith("_")]  # what help() lists; nothing else is public
