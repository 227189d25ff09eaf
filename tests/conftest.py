"""Strict settings for every test: eight CPU devices, and no silent rank promotion (warnings are errors, too).

Nearly all of the tests' time is XLA's, which compiles thousands of programs to run each of them once or twice. So they
are compiled fast rather than to be fast, and kept for all workers, for the processes that tests start, and for the next
run. `JAX_DISABLE_MOST_OPTIMIZATIONS=0` compiles them as for users; `.ci/run` does so for those marked `optimised`.
"""

import os
from pathlib import Path

from tests.support.emitters import HAS_OLDER_EMITTERS

# Before jax is imported.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and HAS_OLDER_EMITTERS:
    # XLA's older code generator takes half as long as the one that users have.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ.setdefault("MPLBACKEND", "agg")

from collections.abc import Iterator

import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Shapes and dtypes in signatures are checked; the hook comes before any import of the package. It imports only the first
# word of what it is told, hence the look-up by name.
install_import_hook(
    ["jaxprune._selection", "jaxprune.oneshot", "jaxprune.sites._factorise"],
    "pkgutil.resolve_name('tests.support.checked_shapes:check_shapes')",
)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """Drop what a file has compiled: a process has 65,530 memory maps, each program takes a few, and XLA dies of the last."""
    yield
    jax.clear_caches()
