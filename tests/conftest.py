"""Strict settings for every test: eight CPU devices, and no silent rank promotion (warnings are errors, too)."""

import os

# Before jax starts its backend.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("MPLBACKEND", "agg")

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

# Written for what is still in progress (sharded selection, pruning while training) and not yet run as a whole: run them
# by name, and take a file off this list when it passes.
collect_ignore = [
    "test_interop.py",
    "test_algebra.py",
    "test_benchmarks.py",
    "test_large.py",
    "test_loops.py",
    "test_processes.py",
    "test_prune.py",
    "test_reparametrise.py",
    "test_resume.py",
    "test_selection.py",
    "test_sharding.py",
    "test_sparse_training.py",
]
