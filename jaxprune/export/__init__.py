"""Files that other programs run or read: a function with its parameters, and the formats of other libraries."""

from jaxprune.export._load import Bundle as Bundle
from jaxprune.export._load import load as load
from jaxprune.export._onnx._save import save_onnx as save_onnx
from jaxprune.export._save import save as save

__all__ = [name for name in dir() if not name.startswith("_")]
