"""Whether masks are the same bits on this device and on a CPU, eager and jitted.

    python -m benchmarks.devices

Prints for each rule how many of 1.5 million weights are kept on one and not on the other.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune
from jaxprune import rules

SHAPES = {"a": (300, 200), "b": (3, 3, 64, 128), "c": (1024, 1000), "d": (500, 64), "e": (600, 500)}
DTYPES = {"c": jnp.bfloat16, "d": jnp.float16}
RULES: dict[str, tuple[Any, float]] = {
    "std": (rules.std_threshold, 1.0),
    "mean": (rules.mean_threshold, 1.0),
    "layer": (rules.layer_sparsity, 0.9),
    "row": (rules.row_sparsity, 0.5),
    "global": (rules.global_sparsity, 0.9),
    "ERK": (rules.erk_sparsity, 0.9),
    "2:4": (rules.n_m(4), 2),
}


def weights(device: Any) -> dict[str, Any]:
    """Return the same random weights on a device, drawn by NumPy."""
    rng = np.random.default_rng(0)
    drawn = {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}
    return {
        name: {"kernel": jax.device_put(jnp.asarray(array, DTYPES.get(name)), device)} for name, array in drawn.items()
    }


def differences(rule: Any, k: float) -> list[int]:
    """Count in which weights the eager CPU's masks differ from: its jitted ones, the device's eager and jitted ones."""
    found = []
    for device in (jax.devices("cpu")[0], jax.devices()[0]):
        make = functools.partial(jaxprune.make_masks, k=k, rule=rule)
        found += [[np.asarray(mask) for mask in jax.tree.leaves(run(weights(device)))] for run in (make, jax.jit(make))]
    first, *others = found
    return [sum(int(np.sum(a != b)) for a, b in zip(first, other, strict=True)) for other in others]


def main() -> None:
    """Print the differences by each rule."""
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; from the CPU's eager masks: jitted, here eager, jitted"
    )
    for name, (rule, k) in RULES.items():
        print(f"{name}: {', '.join(map(str, differences(rule, k)))}")


if __name__ == "__main__":
    main()
