"""Choosing k: what each layer bears, and strengths for each layer.

`jaxprune.sensitivity` and `jaxprune.search_k` make what is here.
"""

from jaxprune.choose._allocate import allocate as allocate
from jaxprune.choose._allocate_by_loss import allocate_by_loss as allocate_by_loss
from jaxprune.choose._search_k import Strength as Strength
from jaxprune.choose._search_k import Trial as Trial
from jaxprune.choose._sensitivity import Sensitivity as Sensitivity

__all__ = [name for name in dir() if not name.startswith("_")]
