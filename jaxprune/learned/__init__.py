"""Masks that are learnt while the weights stay as they are: gates, soft masks of them, and the terms of their loss."""

from jaxprune.learned._losses import kept_norm as kept_norm
from jaxprune.learned._losses import sparsity_loss as sparsity_loss
from jaxprune.learned._patterns import pattern_gates as pattern_gates
from jaxprune.learned._patterns import pattern_masks as pattern_masks
from jaxprune.learned._patterns import soft_patterns as soft_patterns
from jaxprune.learned._soft import apply_soft_masks as apply_soft_masks
from jaxprune.learned._weights import soft_masks as soft_masks
from jaxprune.learned._weights import weight_gates as weight_gates

__all__ = [name for name in dir() if not name.startswith("_")]
