"""The guard's report: which layers a rule would have emptied or capped, and what it kept instead."""

import fractions
import math
import warnings
from collections.abc import Sequence


class PruningWarning(UserWarning):
    """A rule removed less than it was asked to, so that no layer collapses."""


def check_max_sparsity(max_sparsity: float, rule: str) -> None:
    """Raise a ValueError unless max_sparsity is a number in [0, 1]."""
    if isinstance(max_sparsity, bool) or not isinstance(max_sparsity, int | float) or not 0 <= max_sparsity <= 1:
        raise ValueError(f"{rule} takes 0 <= max_sparsity <= 1, a number; got {max_sparsity!r}.")


def most_removed(max_sparsity: float, size: int) -> int:
    """Return floor(max_sparsity * size) of the decimal number as written: 0.9 of 10 is 9."""
    return math.floor(fractions.Fraction(str(max_sparsity)) * size)


def warn(lines: Sequence[str], rule: str) -> None:
    """Warn of the layers where the guard acted, one line each; called by the function that is the rule's body."""
    if lines:
        # The caller of make_masks: above it stand the rule, its function, their body and this function.
        warnings.warn(
            f"{rule} kept more than k says in {len(lines)} place(s), so that no layer collapses. "
            "Choose a smaller k there (k may be a tree prefix):\n" + "\n".join(lines),
            PruningWarning,
            stacklevel=6,
        )
