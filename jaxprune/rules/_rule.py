"""What a rule is."""

from collections.abc import Callable
from typing import Any

# (scores, k) -> masks
Rule = Callable[[Any, Any], Any]
