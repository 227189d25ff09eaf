"""What a configuration says of the function that a model computes, for formats with fields of their own for it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxprune._printing import some

# By the ways to stretch wavelengths, the fields that say how much.
_FIELDS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# What all models of Llama 3.1 to 3.3 have, beside a factor.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Function(NamedTuple):
    """What a Llama computes with its leaves.

    Attributes:
        epsilon: of the norms.
        base: of the wavelengths of rotations.
        scaling: what the configuration says of how they are stretched; empty if they are not.
    """

    epsilon: float
    base: float
    scaling: dict[str, Any]


def read_function(config: Mapping[str, Any], target: str) -> Function:
    """Read a configuration; raise a ValueError of what the format `target` has no field for."""
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config['hidden_act'] is {config['hidden_act']!r}; {target} of this type has silu.")
    windows = config.get("model_type") == "mistral" or config.get("use_sliding_window")
    if (windows and config.get("sliding_window")) or "sliding_attention" in (config.get("layer_types") or ()):
        raise ValueError(
            f"config has a sliding window, which {target} of this type has not. Up to {config.get('sliding_window')} tokens the "
            "model is the same without: set sliding_window to None, use_sliding_window to False, layer_types to None."
        )
    scaling = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    base = scaling.pop("rope_theta", config.get("rope_theta", 10_000.0))
    kind = scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type", "default"))
    if kind not in ("default", *_FIELDS):
        raise ValueError(f"config has rotations of the type {kind!r}; known are {', '.join(_FIELDS)}.")
    missing = [field for field in _FIELDS.get(kind, ()) if not isinstance(scaling.get(field), int | float)]
    if missing:
        raise ValueError(f"config has rotations of the type {kind!r} without {some(missing)}.")
    return Function(
        epsilon=float(number(config, "rms_norm_eps", float)),
        base=float(base),
        scaling={} if kind == "default" else scaling,
    )


def stretched(scaling: Mapping[str, Any], base: float, head_dim: int) -> np.ndarray:
    """By what each wavelength [head_dim / 2] is stretched in Llama 3.1 and those after it.

    Short ones stay, long ones are multiplied by the factor, those between by what lies between: linear in the frequency, from
    `low_freq_factor` to `high_freq_factor` turns in the context that the model was first trained on.
    """
    wavelengths = 2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] / wavelengths
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    short = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - short) / scaling["factor"] + short)


def number(config: Mapping[str, Any], field: str, kind: type) -> Any:
    """Return a positive number of a configuration; raise a ValueError where there is none."""
    found = config.get(field)
    if not isinstance(found, int | float) or not isinstance(found, int | kind) or found <= 0:
        raise ValueError(
            f"config[{field!r}] is {found!r}, and no shape says it. Set it as in the model that this one is made of."
        )
    return found
