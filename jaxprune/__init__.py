"""Functional pruning for JAX: masks from parameters, optax transforms that keep them, honest reports."""

from jaxprune import rules as rules
from jaxprune import scores as scores
from jaxprune._guard import PruningWarning as PruningWarning
from jaxprune._masks import apply_masks as apply_masks
from jaxprune._masks import make_masks as make_masks
from jaxprune._masks import sparsity as sparsity
from jaxprune._prunable import is_kernel as is_kernel
from jaxprune._report import Summary as Summary
from jaxprune._report import summarize as summarize
from jaxprune._transforms import KeepPrunedState as KeepPrunedState
from jaxprune._transforms import keep_pruned as keep_pruned
from jaxprune._transforms import keep_zeros as keep_zeros
from jaxprune._transforms import masks_in as masks_in
