"""Models that are really smaller: coupled channels of any function, chosen, cut from parameters and from the function."""

from jaxprune.structured._blocks import Block as Block
from jaxprune.structured._count import count_bytes as count_bytes
from jaxprune.structured._count import count_macs as count_macs
from jaxprune.structured._count import count_parameters as count_parameters
from jaxprune.structured._expert_meter import ExpertUse as ExpertUse
from jaxprune.structured._experts import expert_use as expert_use
from jaxprune.structured._experts import select_experts as select_experts
from jaxprune.structured._graph import Graph as Graph
from jaxprune.structured._groups import ChannelGroup as ChannelGroup
from jaxprune.structured._groups import FrozenAxis as FrozenAxis
from jaxprune.structured._groups import Member as Member
from jaxprune.structured._inputs import with_inputs as with_inputs
from jaxprune.structured._lasso import group_lasso as group_lasso
from jaxprune.structured._plan import Plan as Plan
from jaxprune.structured._plan import combine as combine
from jaxprune.structured._rebuild import masked as masked
from jaxprune.structured._rebuild import rebuild as rebuild
from jaxprune.structured._recover import recover as recover
from jaxprune.structured._repair import repair as repair
from jaxprune.structured._select_blocks import select_blocks as select_blocks
from jaxprune.structured._select_channels import select_channels as select_channels
from jaxprune.structured._select_channels import select_channels_globally as select_channels_globally
from jaxprune.structured._select_channels import sparsity_within as sparsity_within
from jaxprune.structured._select_in_sequence import select_in_sequence as select_in_sequence
from jaxprune.structured._select_rows import new_ids as new_ids
from jaxprune.structured._select_rows import old_ids as old_ids
from jaxprune.structured._select_rows import select_rows as select_rows
from jaxprune.structured._shrink import UnrepairedWarning as UnrepairedWarning
from jaxprune.structured._shrink import channel_masks as channel_masks
from jaxprune.structured._shrink import shrink as shrink
from jaxprune.structured._trace import trace as trace
from jaxprune.structured._verify import OutputError as OutputError
from jaxprune.structured._verify import Verification as Verification
from jaxprune.structured._verify import verify as verify
from jaxprune.structured._verify_module import verify_module as verify_module
from jaxprune.structured._widths._allocate_widths import Allocation as Allocation
from jaxprune.structured._widths._allocate_widths import allocate_widths as allocate_widths
from jaxprune.structured._widths._measure_times import Prediction as Prediction
from jaxprune.structured._widths._measure_times import check_times as check_times
from jaxprune.structured._widths._measure_times import measure_times as measure_times
from jaxprune.structured._widths._price_widths import price_widths as price_widths
from jaxprune.structured._widths._prices_by_loss import measure_blocks as measure_blocks
from jaxprune.structured._widths._prices_by_loss import measure_widths as measure_widths
from jaxprune.structured._widths._times import Times as Times

__all__ = [name for name in dir() if not name.startswith("_")]
