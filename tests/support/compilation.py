"""Programs as users have them, where a test reads one: the tests' own are compiled fast, as `conftest.py` says."""

from typing import Any

import jax

from tests.support.emitters import HAS_OLDER_EMITTERS

_AS_FOR_USERS: dict[str, Any] = {
    **({"xla_cpu_use_fusion_emitters": True} if HAS_OLDER_EMITTERS else {}),
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
}


def compiled_for_users(jitted: Any, *arguments: Any) -> jax.stages.Compiled:
    """The program of these arguments, with the text and the memory that users get."""
    return jitted.lower(*arguments).compile(_AS_FOR_USERS)
