"""Strict settings for every test: eight CPU devices, and no silent rank promotion (warnings are errors, too)."""

import os

# Before jax starts its backend.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("MPLBACKEND", "agg")

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Shapes and dtypes in signatures are checked; the hook comes before any import of the package. It imports only the first
# word of what it is told, hence the look-up by name.
install_import_hook(
    ["jaxprune._selection", "jaxprune.oneshot", "jaxprune.sites._factorise"],
    "pkgutil.resolve_name('tests.support.checked_shapes:check_shapes')",
)
