"""One of two processes: masks of arrays that are spread over both, printed as hashes. Run by test_processes.py."""

import functools
import hashlib
import json
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxprune
from jaxprune import rules

RULES = {
    "std": (rules.std_threshold, 1.0),
    "layer": (rules.layer_sparsity, 0.7),
    "global": (rules.global_sparsity, 0.7),
    "n_m": (rules.n_m(4), 2),
}
SPECS = {"a": {"kernel": P("x", "y")}, "b": {"kernel": P(None, ("x", "y"))}}


def weights() -> dict[str, dict[str, np.ndarray]]:
    """Whole quarters: many ties, and sums that are exact in any order."""
    rng = np.random.default_rng(0)
    return {
        name: {"kernel": np.round(4 * rng.normal(size=shape)).astype(np.float32) / 4}
        for name, shape in (("a", (16, 8)), ("b", (8, 24)))
    }


def hash_of(masks: dict[str, dict[str, np.ndarray]]) -> str:
    """A digest of all masks, gathered."""
    return hashlib.sha256(b"".join(np.packbits(mask).tobytes() for mask in jax.tree.leaves(masks))).hexdigest()


def main(address: str, process: int) -> None:
    """Join the other process, prune, print one line of JSON: {rule/mesh: hash}."""
    jax.distributed.initialize(address, 2, process)
    found = {}
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
        params = jax.tree.map(
            lambda array, spec, mesh=mesh: jax.make_array_from_callback(
                array.shape, NamedSharding(mesh, spec), lambda index: array[index]
            ),
            weights(),
            SPECS,
        )
        for name, (rule, k) in RULES.items():
            make = functools.partial(jaxprune.make_masks, k=k, rule=rule)
            # Each way once: compiled as a whole on an Auto mesh, call by call on an Explicit one.
            masks = (jax.jit(make) if kind is AxisType.Auto else make)(params)
            found[f"{name}/{kind.name}"] = hash_of(multihost_utils.process_allgather(masks, tiled=True))
    print(json.dumps({"devices": [jax.local_device_count(), jax.device_count()], "hashes": found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
