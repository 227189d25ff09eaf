"""Which leaves are pruned, by name and shape."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune._tree._axes import Roles
from jaxprune._tree._leaves import is_function
from jaxprune._tree._names import KERNEL, WEIGHT, names, words
from jaxprune._tree._paths import KeyPath, Tree
from jaxprune._tree._patterns import as_patterns, fitting

Predicate = Callable[[str, Any], bool]
# A predicate of path and leaf, glob patterns of paths or of modules above them, a tree (prefix) of bools, or sites.
Prunable = Predicate | str | Sequence[str] | Any

# Words in a leaf's own name that rule it out: what is added or scales, statistics, tables, what is learnt as an input, angles.
_NOT_NAMED = re.compile(
    "bias(es)?|b|scales?|offsets?|gamma|beta|alpha|g|gain|log|lora|mean|var|average|const(ant)?|noise"
    "|table|tokens?|logits|latents|queries|probe|prompts|codebook|codevectors|vector"
    "|rope|rotary|rotations|freqs|sin|cos"
    "|hessian"
)
_EMBEDDING = re.compile("embed(ding|dings|der)?|emb|wte|wpe")
_POSITION = re.compile("pos|positions?|positional|pe|cls")
# In the name of the module that holds a weight, which make it a table.
_TABLE = re.compile("bias|table|tokens?|queries|codebook|rope|rotary")
# Parts of a quantised weight in qwix, which are no weights without each other: floats of 8 bits, too.
_QUANTISED = ("qvalue", "zero_point")
# What is no table, and what is one by its own name.
_ADDED, _LOOKED_UP = re.compile("bias(es)?|b|scales?"), re.compile("tables?")
_NORM = re.compile(r"\w*norms?|ln|bn|gn")
# In the name of what multiplies its inputs, even where it makes or takes embeddings.
_PRODUCT = re.compile(r"\w*conv|project(ion)?|proj|linear|lin|dense|fc|mlp|mapping|patch")


def _says(spoken: Iterable[str], *words: re.Pattern[str]) -> bool:
    return any(word.fullmatch(said) for said in spoken for word in words)


def is_kernel(path: str, leaf: Any) -> bool:
    """Say by name and shape whether a leaf is the kernel of a dense, convolution or recurrent layer.

    A kernel has two axes or more and multiplies the layer's inputs. Biases (also those of shape ``(heads,
    head_dim)``), the scales of norms, embeddings and position tables are none. Understands the naming of Linen, NNX,
    Equinox, Haiku, Keras and PyTorch; a bare array (in a tuple, or under a name of your own) counts when it has two axes
    or more that are longer than 1 and its path speaks of no bias, norm or embedding. The head of a language model
    (``lm_head``, ``logits``) is a kernel like any other: leave it out by ``prunable=`` where a recipe keeps it dense.

    Args:
        path: the normalised path, ``encoder/Dense_0/kernel``; dots are slashes, as in ``encoder.layers.0.fc1.weight``.
        leaf: anything with a shape (of one layer, where layers are stacked).

    Returns:
        True for a kernel.

    >>> import numpy as np
    >>> is_kernel("Dense_0/kernel", np.ones((3, 2))), is_kernel("attention/query/bias", np.ones((4, 8)))
    (True, False)
    """
    shape = np.shape(leaf)
    if len(shape) < 2:
        return False
    parts = names(path)
    *modules, name = parts or [""]
    if KERNEL.fullmatch(name):
        return True
    if name in _QUANTISED:
        return False
    weight = WEIGHT.fullmatch(name) is not None or name == "weights"
    # A layer of one unit has a matrix of one row; other leaves with a single long axis are vectors.
    if sum(n > 1 for n in shape) < 2 and not (weight and len(shape) == 2) and parts:
        return False
    return _is_kernel_weight(modules, len(shape)) if weight else _is_kernel_of_own_name(modules, name)


def is_table(path: str, leaf: Any) -> bool:
    """Say by name and shape whether a leaf is a table of embeddings or positions: rows, along its last axis, that are looked up.

    >>> import numpy as np
    >>> is_table("embed/embedding", np.ones((8, 4))), is_table("embed_tokens.weight", np.ones((8, 4)))
    (True, True)
    """
    shape = np.shape(leaf)
    if sum(n > 1 for n in shape) < 2 or is_kernel(path, leaf):
        return False
    *_, around, module, name = ["", "", "", *names(path)]
    if _says(words(name), _ADDED, _NORM) or _says(words(module), _NORM):
        return False
    said = [*words(module), *words(name), *(words(around) if WEIGHT.fullmatch(name) else [])]
    return _says(said, _EMBEDDING, _POSITION, _LOOKED_UP) or module == "shared"


def _is_kernel_weight(modules: list[str], ndim: int) -> bool:
    """Of what PyTorch and Equinox call ``weight``, in tables and norms too: go by the module that holds it."""
    said = [words(module) for module in modules]
    around, nearest = [[], [], *said][-2:]
    if _says(nearest, _NORM) or any("lora" in spoken for spoken in said):
        return False
    if _says(nearest, _PRODUCT):
        return True
    if ndim >= 4:  # no table has as many axes
        return not _says(nearest, _POSITION)
    if _says(nearest, _EMBEDDING, _POSITION, _TABLE) or modules[-1:] == ["shared"]:  # T5's and BART's table
        return False
    return ndim == 3 or not _says(around, _EMBEDDING)


def _is_kernel_of_own_name(modules: list[str], name: str) -> bool:
    own = words(name)
    if _says(own, _NOT_NAMED, _NORM) or (modules and _says(words(modules[-1]), _NORM)):
        return False
    if _says(own, _PRODUCT):
        return True
    return not _says([word for part in (*modules, name) for word in words(part)], _EMBEDDING, _POSITION)


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
    return [_says(words(owner), _EMBEDDING) or "Norm" in owner for owner in owners]


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
