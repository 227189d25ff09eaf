"""Rules: ``(scores, k) -> masks``. The rule says what the strength k means."""

from jaxprune.rules._groups import blocks as blocks
from jaxprune.rules._groups import channels as channels
from jaxprune.rules._groups import n_m as n_m
from jaxprune.rules._guard import PruningWarning as PruningWarning
from jaxprune.rules._rule import Rule as Rule
from jaxprune.rules._rule import as_rule as as_rule
from jaxprune.rules._sparsities import erk_sparsity as erk_sparsity
from jaxprune.rules._sparsities import global_sparsity as global_sparsity
from jaxprune.rules._sparsities import layer_sparsity as layer_sparsity
from jaxprune.rules._sparsities import row_sparsity as row_sparsity
from jaxprune.rules._thresholds import absolute_threshold as absolute_threshold
from jaxprune.rules._thresholds import max_threshold as max_threshold
from jaxprune.rules._thresholds import mean_threshold as mean_threshold
from jaxprune.rules._thresholds import std_threshold as std_threshold

__all__ = [name for name in dir() if not name.startswith("_")]
