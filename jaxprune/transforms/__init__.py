"""Training under masks: optax transforms that hold, change or grow them, and masks in the forward pass.

`jaxprune.keep_pruned`, `jaxprune.prune`, `jaxprune.rigl` and `jaxprune.masks_in`, the most used, stand in `jaxprune` itself.
"""

from jaxprune.transforms._decay_pruned import decay_pruned as decay_pruned
from jaxprune.transforms._elsa import ElsaState as ElsaState
from jaxprune.transforms._elsa import elsa as elsa
from jaxprune.transforms._elsa import second_moment as second_moment
from jaxprune.transforms._heal import Healed as Healed
from jaxprune.transforms._heal import heal as heal
from jaxprune.transforms._keep_pruned import KeepPrunedState as KeepPrunedState
from jaxprune.transforms._keep_pruned import keep_zeros as keep_zeros
from jaxprune.transforms._keras import keep_pruned_in_keras as keep_pruned_in_keras
from jaxprune.transforms._keras import prune_in_keras as prune_in_keras
from jaxprune.transforms._merge_lora import merge_lora as merge_lora
from jaxprune.transforms._prune import PruneState as PruneState
from jaxprune.transforms._prune import ac_dc_schedule as ac_dc_schedule
from jaxprune.transforms._prune import prune_and_regrow as prune_and_regrow
from jaxprune.transforms._prune_and_splice import prune_and_splice as prune_and_splice
from jaxprune.transforms._prune_by_gradients import PruneByGradientsState as PruneByGradientsState
from jaxprune.transforms._prune_by_gradients import prune_by_gradients as prune_by_gradients
from jaxprune.transforms._soft_threshold import soft_threshold as soft_threshold
from jaxprune.transforms._sparse_training import SparseTrainingState as SparseTrainingState
from jaxprune.transforms._sparse_training import sparse_evolution as sparse_evolution
from jaxprune.transforms._sparse_training import static_sparse as static_sparse
from jaxprune.transforms._straight_through import straight_through as straight_through

__all__ = [name for name in dir() if not name.startswith("_")]
