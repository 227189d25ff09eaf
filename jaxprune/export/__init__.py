"""Files that other programs run or read: a function with its parameters, and the formats of other libraries."""

from jaxprune.export._compressed_tensors import write_compressed_tensors as write_compressed_tensors
from jaxprune.export._read_compressed_tensors import read_compressed_tensors as read_compressed_tensors
from jaxprune.export._two_four import TwoFour as TwoFour
from jaxprune.export._two_four import pack_cutlass as pack_cutlass
from jaxprune.export._two_four import pack_tcgen05 as pack_tcgen05
from jaxprune.export._two_four import to_two_four as to_two_four
from jaxprune.export._two_four import unpack_cutlass as unpack_cutlass
from jaxprune.export._two_four import unpack_tcgen05 as unpack_tcgen05

__all__ = [name for name in dir() if not name.startswith("_")]
