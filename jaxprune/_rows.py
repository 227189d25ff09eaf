"""A row of a report: the weights of a layer, or of a tensor in a file, counted."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """Weights counted.

    Attributes:
        path: of the layer (with its index where it is one of a stack), or the tensor's name in its file.
        shape: its shape.
        size: how many weights it has.
        kept: how many its mask keeps.
        threshold: the smallest magnitude kept; None where nothing is removed.
        std: of the weights; None where they are not floating-point.
        dense_bytes: of the array as it is.
        stored_bytes: in a file, kept values with a bitmask where that was pruned; before zstd.
    """

    path: str
    shape: tuple[int, ...]
    size: int
    kept: int
    threshold: float | None = None
    std: float | None = None
    dense_bytes: int
    stored_bytes: int

    @property
    def sparsity(self) -> float:
        """The fraction removed."""
        return 1 - self.kept / self.size if self.size else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and tuples by name."""
        return {**dataclasses.asdict(self), "sparsity": self.sparsity}
