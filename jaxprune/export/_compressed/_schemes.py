"""What `config.json` says of integer weights in the words of compressed-tensors: the `quantization_config`."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

METHOD = "compressed-tensors"
PACKED, PLAIN = "pack-quantized", "int-quantized"


class Scheme(NamedTuple):
    """How the weights of some modules are rounded.

    Attributes:
        bits: of a code.
        symmetric: whether zero has the code 0.
        group_size: how many inputs of an output share a scale; None for all of them.
    """

    bits: int
    symmetric: bool
    group_size: int | None

    def entry(self, targets: list[str], round_inputs: bool) -> dict[str, Any]:
        """Return the group of a configuration that says so of modules, by their names."""
        strategy = "channel" if self.group_size is None else "group"
        return {
            "targets": targets,
            "weights": _integers(self.bits, self.symmetric, strategy, self.group_size, dynamic=False),
            "input_activations": _integers(8, True, "token", None, dynamic=True) if round_inputs else None,
            "output_activations": None,
            "format": PLAIN if round_inputs else PACKED,
        }

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> Self:
        """Read a group of a configuration; raise a ValueError, the end of a sentence, for what has no integer codes."""
        weights = entry.get("weights")
        if not isinstance(weights, dict):
            raise ValueError("has a scheme in config.json without weights")
        bits, strategy, size = weights.get("num_bits"), weights.get("strategy"), weights.get("group_size")
        if weights.get("type") != "int" or type(bits) is not int or not 1 <= bits <= 8:
            raise ValueError(f"has weights of {weights.get('type')!r} and {bits!r} bits, not integers of 1 to 8")
        if strategy != "channel" and not (strategy == "group" and type(size) is int and size > 0):
            raise ValueError(
                f"has scales of the strategy {strategy!r}, group_size {size!r}; those of 'channel' and 'group' are read"
            )
        return cls(bits, weights.get("symmetric") is not False, size if strategy == "group" else None)


def to_config(schemes: Mapping[str, Scheme], round_inputs: bool) -> dict[str, Any]:
    """Return the `quantization_config` of modules, by their names.

    Modules are named one by one, since a class of modules may hold some that were not rounded, and a head that is tied to a table
    is no tensor of the file.
    """
    targets: dict[Scheme, list[str]] = {}
    for module, scheme in schemes.items():
        targets.setdefault(scheme, []).append(module)
    groups = {f"group_{i}": scheme.entry(names, round_inputs) for i, (scheme, names) in enumerate(targets.items())}
    return {
        "quant_method": METHOD,
        "format": PLAIN if round_inputs else PACKED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def scheme_of(module: str, config: Mapping[str, Any]) -> Scheme:
    """Find the scheme of a module in a `quantization_config`: by its name, by a pattern, or by its class.

    Raises:
        ValueError: there is none, or it is no scheme of integers; the end of a sentence that begins with the module.
    """
    entries = list(config["config_groups"].values())
    by_name = [entry for entry in entries if any(_fits(module, target) for target in entry["targets"])]
    by_class = [entry for entry in entries if "Linear" in entry["targets"]]
    for entry in by_name + by_class:
        return Scheme.read(entry)
    raise ValueError("is none of the modules that config.json has a scheme for")


def _fits(module: str, target: str) -> bool:
    return re.match(target[3:], module) is not None if target.startswith("re:") else target == module


def _integers(bits: int, symmetric: bool, strategy: str, group_size: int | None, *, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": dynamic,
    }
