"""Which leaves are pruned, and which of them are stacks of layers."""

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
import numpy as np

from jaxprune._tree._leaves import is_floating
from jaxprune._tree._paths import Flat, KeyPath, spread

Predicate = Callable[[str, Any], bool]
Stacked = str | Sequence[str] | Callable[[str, Any], int]

# A leaf of one of these names multiplies inputs in Flax and Haiku, whatever the module around it is called.
_KERNEL = re.compile(r"kernel|w|w_?\d+|w_[a-z]+")
# Words in a leaf's own name, in its module's name, and anywhere on its path, that rule it out otherwise.
_NOT_NAMED = frozenset(
    {"bias", "biases", "b", "scale", "offset", "gamma", "beta", "g", "gain", "mean", "var", "log", "lora", "table"}
    | {"token", "tokens", "logits"}
)
_EMBEDDING = frozenset(
    {"embed", "embedding", "embeddings", "embedder", "emb", "wte", "wpe", "pos", "position", "positional", "cls"}
)
_NORM = re.compile(r"\w*norm|ln|bn|gn")


def _words(part: str) -> list[str]:
    """Split ``LayerNorm_0`` or ``pos_embedding`` into lower-case words."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part)]


def is_kernel(path: str, leaf: Any) -> bool:
    """Say by name and shape whether a leaf is the kernel of a dense, convolution or recurrent layer.

    A kernel has two axes or more and multiplies the layer's inputs. Biases (also those of shape ``(heads,
    head_dim)``), the scales of norms, embeddings and position tables are none. Understands the naming of Linen,
    NNX, Equinox and Haiku; a bare array (in a tuple, or under a name of your own) counts when it has two axes or
    more and its path speaks of no bias, norm or embedding.

    Args:
        path: the normalised path, ``encoder/Dense_0/kernel``.
        leaf: anything with a shape (of one layer, where layers are stacked).

    Returns:
        True for a kernel.

    >>> import numpy as np
    >>> is_kernel("Dense_0/kernel", np.ones((3, 2))), is_kernel("attention/query/bias", np.ones((4, 8)))
    (True, False)
    """
    if np.ndim(leaf) < 2:
        return False
    parts = [part for part in path.split("/") if not part.isdigit()]
    if not parts:
        return True
    *modules, name = parts
    if _KERNEL.fullmatch(name):
        return True
    nearest = [*modules[-1:], name]
    return not (
        _NOT_NAMED.intersection(_words(name))
        or any(_EMBEDDING.intersection(_words(part)) for part in parts)
        or any(_NORM.fullmatch(word) for part in nearest for word in _words(part))
    )


def _owner(params: Any, path: KeyPath) -> str:
    """Name the class that holds the leaf: Equinox calls kernels, norms and embeddings all ``weight``."""
    owner = params
    for key in path[:-1]:
        if isinstance(key, jax.tree_util.GetAttrKey):
            owner = getattr(owner, key.name, None)
        elif isinstance(key, jax.tree_util.DictKey | jax.tree_util.SequenceKey) and hasattr(owner, "__getitem__"):
            owner = owner[getattr(key, "key", getattr(key, "idx", None))]
        else:
            return ""
    return type(owner).__name__


def _in_table_or_norm(params: Any) -> list[bool]:
    owners = [_owner(params, path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    return [bool(_EMBEDDING.intersection(_words(owner))) or "Norm" in owner for owner in owners]


def stack_axes(stacked: Stacked | None, flat: Flat) -> list[int]:
    """Return for each leaf how many leading axes count layers; raise when `stacked` matches nothing."""
    if stacked is None:
        return [0] * len(flat.paths)
    if callable(stacked):
        counts = [int(stacked(path, leaf)) for path, leaf in zip(flat.paths, flat.leaves, strict=True)]
        asked = "the predicate"
    else:
        patterns = [stacked] if isinstance(stacked, str) else list(stacked)
        for pattern in patterns:
            if not any(_names(pattern, path) for path in flat.paths):
                found = f"Paths look like {flat.paths[0]!r}" if flat.paths else "There is none"
                raise ValueError(
                    f"stacked={pattern!r} matches no path. {found}; a pattern names a leaf or a module above it."
                )
        counts = [int(any(_names(pattern, path) for pattern in patterns)) for path in flat.paths]
        asked = repr(stacked)
    for count, name, leaf in zip(counts, flat.names, flat.leaves, strict=True):
        if not 0 <= count <= np.ndim(leaf):
            raise ValueError(f"stacked={asked} gives {count} layer axes to {name} of shape {np.shape(leaf)}.")
    return counts


def _names(pattern: str, path: str) -> bool:
    """Whether a glob pattern fits the path or a module above the leaf."""
    parts = path.split("/")
    return any(fnmatchcase("/".join(parts[: n + 1]), pattern) for n in range(len(parts)))


def choose(
    prunable: Any,
    tree: Any,
    flat: Flat,
    stacks: list[int],
    eligible: Callable[[Any], bool] = is_floating,
) -> list[bool]:
    """Return for each leaf of a tree of parameters whether it is pruned.

    `prunable` is None (kernels, by `is_kernel` and the class that holds the leaf), a predicate or a tree of bools.
    Leaves that are not `eligible` never are; for a tree of masks pass a test that its leaves meet.
    """
    allowed = [eligible(leaf) for leaf in flat.leaves]
    # A predicate is asked about one layer, so that a stack of biases does not look like a kernel.
    layers = [
        leaf if stack == 0 else jax.ShapeDtypeStruct(leaf.shape[stack:], leaf.dtype)
        for leaf, stack in zip(flat.leaves, stacks, strict=True)
    ]
    if prunable is None:
        excluded = _in_table_or_norm(tree)
        chosen = [
            fits and not out and is_kernel(path, layer)
            for fits, out, path, layer in zip(allowed, excluded, flat.paths, layers, strict=True)
        ]
    elif callable(prunable):
        chosen = [
            fits and bool(prunable(path, layer)) for fits, path, layer in zip(allowed, flat.paths, layers, strict=True)
        ]
    else:
        chosen = [fits and verdict for fits, verdict in zip(allowed, _verdicts(prunable, flat), strict=True)]
    if not any(chosen):
        shown = ", ".join(flat.names[:4]) + (", ..." if len(flat.names) > 4 else "")
        raise ValueError(
            f"No leaf is prunable. Found {shown or 'an empty tree'}. "
            "Pass prunable=, a function (path, leaf) -> bool or a tree of bools."
        )
    return chosen


def _verdicts(prunable: Any, flat: Flat) -> list[bool]:
    """Read a tree of bools; what it does not cover is not pruned."""
    verdicts = spread(prunable, flat.paths, "prunable")
    for verdict, name in zip(verdicts, flat.names, strict=True):
        if not (verdict is None or isinstance(verdict, bool | np.bool_)):
            raise TypeError(
                f"prunable is a function (path, leaf) -> bool or a tree of bools; for {name} it says {verdict!r}."
            )
    return [bool(verdict) for verdict in verdicts]
