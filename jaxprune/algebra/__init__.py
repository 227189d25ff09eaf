"""The algebra of masks: combined, compared, packed to bits, read off parameters, counted."""

from jaxprune.algebra._combine import intersect as intersect
from jaxprune.algebra._combine import invert as invert
from jaxprune.algebra._combine import overlap as overlap
from jaxprune.algebra._combine import union as union
from jaxprune.algebra._pack import pack as pack
from jaxprune.algebra._pack import unpack as unpack
from jaxprune.algebra._zeros import count_kept as count_kept
from jaxprune.algebra._zeros import masks_of as masks_of
from jaxprune.algebra._zeros import require_pruned as require_pruned

__all__ = [name for name in dir() if not name.startswith("_")]
