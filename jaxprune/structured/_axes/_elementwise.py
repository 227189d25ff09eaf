"""Rules for what treats every element alike: the axes of all operands and results are the same."""

from jaxprune.structured._axes._dims import Dim
from jaxprune.structured._axes._program import Node, Rule, elementwise, opaque

_NAMES = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz complex conj
    convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma
    igammac imag integer_pow is_finite le le_to lgamma log log1p logistic lt lt_to max min mul mulhi name ne neg nextafter
    not one_minus_square or polygamma population_count pow real reduce_precision regularized_incomplete_beta rem round rsqrt select_n
    shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh
    threefry2x32 xor zeta
"""


def _each(node: Node) -> list[list[Dim]]:
    """Operands pass unchanged, each to the result of its place."""
    return [list(value.dims) for value in node.ins]


def _bitcast(node: Node) -> list[list[Dim]]:
    """Numbers of another width add or remove an axis, which is not followed."""
    return elementwise(node) if node.shapes[0] == node.ins[0].shape else opaque(node)


RULES: dict[str, Rule] = {
    **dict.fromkeys(_NAMES.split(), elementwise),
    "bitcast_convert_type": _bitcast,
    "optimization_barrier": _each,
    "sharding_constraint": _each,
    "pvary": _each,
}
