"""Pruning in one shot, with a few batches of data or none, and without training."""

from jaxprune.oneshot._admm import admm as admm
from jaxprune.oneshot._blocks import block_by_block as block_by_block
from jaxprune.oneshot._codes import Codes as Codes
from jaxprune.oneshot._codes import Quantized as Quantized
from jaxprune.oneshot._gptq import gptq as gptq
from jaxprune.oneshot._gptq import prune_and_quantize as prune_and_quantize
from jaxprune.oneshot._method import Method as Method
from jaxprune.oneshot._reconstruct import reconstruct as reconstruct
from jaxprune.oneshot._sequential import sequential as sequential
from jaxprune.oneshot._solve import DampingWarning as DampingWarning
from jaxprune.oneshot._sparsegpt import sparsegpt as sparsegpt
from jaxprune.oneshot._swap import Errors as Errors
from jaxprune.oneshot._swap import Swapped as Swapped
from jaxprune.oneshot._swap import swap as swap
from jaxprune.oneshot._swap import swap_and_reconstruct as swap_and_reconstruct
from jaxprune.oneshot._synflow_masks import synflow_masks as synflow_masks

__all__ = [name for name in dir() if not name.startswith("_")]
