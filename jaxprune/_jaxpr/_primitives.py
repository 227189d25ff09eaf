"""The one table of primitives: what kinds there are, by name, and what they were called in other versions of jax."""

# ---- what has a jaxpr inside that may stand in its place

REMAT = frozenset({"checkpoint", "remat", "remat2"})
# These bring a derivative of their own.
CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"})
CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "eval_jaxpr"}) | REMAT | CUSTOM

# These hold what each device does with its part, as jax.pmap and jax.shard_map deal it out; nothing here looks into them.
DEVICES = frozenset({"shard_map", "xla_pmap"})

# ---- what moves elements about and computes nothing

# Each operand is the result of its place, but for its dtype, its place on devices, or its name.
COPIES = frozenset(
    {"convert_element_type", "reduce_precision", "stop_gradient", "copy", "copy_p", "name", "optimization_barrier"}
    | {"sharding_constraint", "layout_constraint", "reshard", "mesh_cast", "pvary", "device_put"}
)
RESHAPES = frozenset({"reshape", "squeeze", "broadcast_in_dim"})
# Each result holds elements of the first operand, at places that the equation alone tells; of copies, of the operand of its place.
LAYOUT = COPIES | RESHAPES | {"transpose", "slice", "split", "unstack", "rev"}
SCATTERS = frozenset({"scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max"})
# Operands side by side in one array.
JOINS = frozenset({"concatenate", "stack", "pad", "dynamic_update_slice"}) | SCATTERS

# ---- what computes

SUMS = frozenset({"add", "add_any"})
# Results of the operands' shape (scalars aside), each element from the operands' elements at the same place.
ELEMENTWISE = SUMS | frozenset(
    [
        "abs",
        "acos",
        "acosh",
        "and",
        "asin",
        "asinh",
        "atan",
        "atan2",
        "atanh",
        "bessel_i0e",
        "bessel_i1e",
        "cbrt",
        "ceil",
        "clamp",
        "clz",
        "complex",
        "conj",
        "cos",
        "cosh",
        "digamma",
        "div",
        "eq",
        "eq_to",
        "erf",
        "erf_inv",
        "erfc",
        "exp",
        "exp2",
        "expm1",
        "floor",
        "ge",
        "gt",
        "igamma",
        "igammac",
        "imag",
        "integer_pow",
        "is_finite",
        "le",
        "le_to",
        "lgamma",
        "log",
        "log1p",
        "logistic",
        "lt",
        "lt_to",
        "max",
        "min",
        "mul",
        "mulhi",
        "ne",
        "neg",
        "nextafter",
        "not",
        "one_minus_square",
        "or",
        "polygamma",
        "population_count",
        "pow",
        "real",
        "regularized_incomplete_beta",
        "rem",
        "round",
        "rsqrt",
        "select_n",
        "shift_left",
        "shift_right_arithmetic",
        "shift_right_logical",
        "sign",
        "sin",
        "sinh",
        "sqrt",
        "square",
        "sub",
        "tan",
        "tanh",
        "threefry2x32",
        "xor",
        "zeta",
    ]
)
CONTRACTIONS = frozenset({"dot_general", "conv_general_dilated", "ragged_dot_general"})
REDUCTIONS = frozenset(
    {"reduce_sum", "reduce_prod", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "reduce_xor"}
    # Over a named axis that vmap made an axis of the array.
    | {"psum", "pmax", "pmin"}
)
ARG_REDUCTIONS = frozenset({"argmax", "argmin"})
CUMULATIVE = frozenset({"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"})
WINDOWED = frozenset({"reduce_window_max", "reduce_window_min", "reduce_window_sum"})
# Values that belong to places: made from a shape, of random ones one for each key.
GENERATED = frozenset({"iota", "random_bits", "random_split"})
