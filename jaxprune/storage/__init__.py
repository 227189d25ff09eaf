"""Pruned models in files that are really small, and models on disk pruned without loading them whole."""

from jaxprune.storage._bcsr import multiply_bcsr as multiply_bcsr
from jaxprune.storage._bcsr import to_bcsr as to_bcsr
from jaxprune.storage._blocks import prune_blocks as prune_blocks
from jaxprune.storage._codes import load_codes as load_codes
from jaxprune.storage._container import StorageError as StorageError
from jaxprune.storage._files import convert_file as convert_file
from jaxprune.storage._files import prune_file as prune_file
from jaxprune.storage._overview import FileOverview as FileOverview
from jaxprune.storage._overview import TensorDifference as TensorDifference
from jaxprune.storage._overview import diff_files as diff_files
from jaxprune.storage._overview import summarize_file as summarize_file
from jaxprune.storage._sizes import stored_bytes as stored_bytes
from jaxprune.storage._trees import Saved as Saved
from jaxprune.storage._trees import TensorRow as TensorRow
from jaxprune.storage._trees import read_metadata as read_metadata

__all__ = [name for name in dir() if not name.startswith("_")]
