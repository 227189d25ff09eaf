"""Which leaves are pruned, by name and shape."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune._tree._axes import Roles
from jaxprune._tree._leaves import is_function
from jaxprune._tree._paths import KeyPath, Tree
from jaxprune._tree._patterns import as_patterns, fitting

Predicate = Callable[[str, Any], bool]
# A predicate of path and leaf, glob patterns of paths or of modules above them, a tree (prefix) of bools, or sites.
Prunable = Predicate | str | Sequence[str] | Any

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


def _in_tables_or_norms(params: Any) -> list[bool]:
    """Say for each leaf whether the class that holds it is an embedding or a norm."""
    owners = [_owner(params, path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    return [bool(_EMBEDDING.intersection(_words(owner))) or "Norm" in owner for owner in owners]


def kernels(params: Any, tree: Tree, layers: Sequence[Any]) -> list[bool]:
    """Say for each leaf whether it is a kernel, by `is_kernel` and by the class that holds it."""
    excluded = _in_tables_or_norms(params)
    return [not out and is_kernel(path, layer) for out, path, layer in zip(excluded, tree.paths, layers, strict=True)]


def verdicts(prunable: Any, tree: Tree, layers: Sequence[Any]) -> list[Any]:
    """Say for each leaf, of which `layers` has one layer, whether it is pruned.

    Ask a predicate, patterns or sites, or read a tree of bools; what that does not cover is not pruned.
    """
    if isinstance(prunable, Roles):
        prunable = prunable.prunable
    patterns = as_patterns(prunable)
    if patterns is not None:
        return list(fitting(patterns, tree, "prunable"))
    if is_function(prunable):
        return [prunable(path, layer) for path, layer in zip(tree.paths, layers, strict=True)]
    verdicts = tree.spread(prunable, "prunable")
    for verdict, name in zip(verdicts, tree.names, strict=True):
        if not (verdict is None or isinstance(verdict, bool | np.bool_)):
            raise TypeError(
                f"prunable is a function (path, leaf) -> bool, a glob pattern, sites or a tree of bools; for {name} it "
                f"says {verdict!r}."
            )
    return verdicts
