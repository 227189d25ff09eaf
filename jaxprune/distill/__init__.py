"""Losses by which a smaller model learns from the one that it was made of."""

from jaxprune.distill._hidden_loss import hidden_loss as hidden_loss
from jaxprune.distill._logit_loss import logit_loss as logit_loss

__all__ = [name for name in dir() if not name.startswith("_")]
