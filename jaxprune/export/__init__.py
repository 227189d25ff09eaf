"""Files that other programs run or read: a function with its parameters, and the formats of other libraries."""

from jaxprune.export._compressed_tensors import write_compressed_tensors as write_compressed_tensors
from jaxprune.export._read_compressed_tensors import read_compressed_tensors as read_compressed_tensors

__all__ = [name for name in dir() if not name.startswith("_")]
