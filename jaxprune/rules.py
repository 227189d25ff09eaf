"""Rules: ``(scores, k) -> masks``. The rule says what the strength k means."""

from jaxprune._count_rules import erk_sparsity as erk_sparsity
from jaxprune._count_rules import global_sparsity as global_sparsity
from jaxprune._count_rules import layer_sparsity as layer_sparsity
from jaxprune._count_rules import row_sparsity as row_sparsity
from jaxprune._group_rules import blocks as blocks
from jaxprune._group_rules import channels as channels
from jaxprune._group_rules import n_m as n_m
from jaxprune._threshold_rules import absolute_threshold as absolute_threshold
from jaxprune._threshold_rules import max_threshold as max_threshold
from jaxprune._threshold_rules import mean_threshold as mean_threshold
from jaxprune._threshold_rules import std_threshold as std_threshold
