"""Files that other programs run or read: a function with its parameters, and the formats of other libraries."""

from jaxprune.export._bundle._load import Bundle as Bundle
from jaxprune.export._bundle._load import load as load
from jaxprune.export._bundle._save import save as save
from jaxprune.export._compressed._read import read_compressed_tensors as read_compressed_tensors
from jaxprune.export._compressed._write import write_compressed_tensors as write_compressed_tensors
from jaxprune.export._language._hugging_face import read_hugging_face as read_hugging_face
from jaxprune.export._language._hugging_face import write_hugging_face as write_hugging_face
from jaxprune.export._language._maxtext import from_maxtext as from_maxtext
from jaxprune.export._language._maxtext import to_maxtext as to_maxtext
from jaxprune.export._language._read_gguf import read_gguf as read_gguf
from jaxprune.export._language._write_gguf import write_gguf as write_gguf
from jaxprune.export._onnx._save import save_onnx as save_onnx
from jaxprune.export._two_four import TwoFour as TwoFour
from jaxprune.export._two_four import pack_cutlass as pack_cutlass
from jaxprune.export._two_four import pack_tcgen05 as pack_tcgen05
from jaxprune.export._two_four import to_two_four as to_two_four
from jaxprune.export._two_four import unpack_cutlass as unpack_cutlass
from jaxprune.export._two_four import unpack_tcgen05 as unpack_tcgen05

__all__ = [name for name in dir() if not name.startswith("_")]
