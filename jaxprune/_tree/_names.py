"""What a path says: its parts, the words in them, and the names that frameworks give to kernels."""

import re

# Names of kernels in Flax, Haiku and Keras, which keep them as (..., inputs, outputs).
KERNEL = re.compile(r"((recurrent|depthwise|pointwise)_)?kernel|w|w_?\d+|w_[a-z]+")
# Names of kernels in PyTorch and Equinox, which keep them as (outputs, inputs, ...).
WEIGHT = re.compile(r"weight|weight_(ih|hh)(_l\d+)?(_reverse)?|weight_(v|orig)|(in|q|k|v)_proj_weight")
# What PyTorch's parametrizations of a weight keep in its place: of weight norm the lengths and the directions.
_ORIGINALS = {"original": "weight", "original0": "weight_g", "original1": "weight_v"}


def slashed(path: str) -> str:
    """A path with slashes for the dots of PyTorch's names, which a dict may hold in one key.

    >>> slashed("model.layers.0/weight")
    'model/layers/0/weight'
    """
    return path.replace(".", "/")


def names(path: str) -> list[str]:
    """The names on a path, from the outermost module to the leaf, without the numbers of layers.

    >>> names("conv.parametrizations.weight.original1"), names("layers/0/kernel")
    (['conv', 'weight_v'], ['layers', 'kernel'])
    """
    found = [part for part in slashed(path).split("/") if part and not part.isdigit()]
    if found[-3:-1] == ["parametrizations", "weight"] and found[-1] in _ORIGINALS:
        return [*found[:-3], _ORIGINALS[found[-1]]]
    return found


def words(name: str) -> list[str]:
    """Split ``LayerNorm_0`` or ``pos_embedding`` into lower-case words."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]
