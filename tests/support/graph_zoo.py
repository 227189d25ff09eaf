"""Functions of parameters in every framework, and for each what its parameters multiply, worked out by NumPy.

Recurrent weights are 8 x 8 at least: XLA fuses smaller products with what measures them, and then rounds otherwise.
"""

import functools
from collections.abc import Callable

from jaxprune.sites._find import find_sites
from jaxprune.sites._sites import Sites
from tests.support import graph_zoo_bare as bare
from tests.support import graph_zoo_frameworks as frameworks
from tests.support.graph_zoo_frameworks import Case
from tests.support.graph_zoo_frameworks import normal as normal

CASES: dict[str, Callable[[], Case]] = {
    case.__name__: case
    for case in (
        frameworks.linen_embed,
        frameworks.linen_attention,
        frameworks.linen_dense_general,
        frameworks.linen_dense_general_swapped,
        frameworks.linen_conv,
        frameworks.linen_conv_strided,
        frameworks.linen_conv_dilated,
        frameworks.linen_conv_grouped,
        frameworks.linen_conv_depthwise,
        frameworks.linen_conv_transpose,
        frameworks.linen_remat_bfloat16,
        frameworks.linen_scan,
        frameworks.linen_simple_cell,
        frameworks.linen_gru,
        frameworks.linen_lstm,
        frameworks.linen_optimized_lstm,
        frameworks.nnx_attention,
        frameworks.nnx_scanned,
        frameworks.nnx_tied,
        frameworks.equinox_attention,
        frameworks.equinox_conv,
        frameworks.equinox_mlp,
        frameworks.equinox_embedding,
        frameworks.haiku_mlp,
        bare.fused_split,
        bare.unstacked,
        bare.concatenated,
        bare.experts,
        bare.experts_einsum,
        bare.ragged,
        bare.vmapped_ensemble,
        bare.conditional,
        bare.indexed,
        bare.chosen_by_data,
        bare.nested_scans,
        bare.while_loop,
        bare.carried_params,
        bare.used_twice,
        bare.modified,
        bare.custom_derivatives,
        bare.weight_layouts,
        bare.learned_query,
        bare.scaled_by_einsum,
        bare.stacked_here,
        bare.codebooks,
    )
}


@functools.cache
def built(name: str) -> Case:
    return CASES[name]()


@functools.cache
def sites_of(name: str) -> Sites:
    case = built(name)
    return find_sites(case.fn, case.params, *case.inputs)
