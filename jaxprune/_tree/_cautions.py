"""Warnings of trees in which the default choice of leaves is likely not what is meant."""

import sys
import warnings
from collections.abc import Sequence

from jaxprune._tree._names import slashed
from jaxprune._tree._paths import Tree


def caution(message: str) -> None:
    """Warn at the line that called this package, however deep the call is."""
    depth, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("jaxprune", "jax"):
        depth, frame = depth + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=depth)


def caution_nameless(tree: Tree, chosen: Sequence[bool]) -> None:
    """Warn where names cannot tell kernels from tables: all paths are numbers, as in Keras' ``trainable_variables``."""
    if len(tree.paths) < 2 or not any(chosen) or not all(path.replace("/", "").isdigit() for path in tree.paths):
        return
    caution(
        f"{tree.what} has no names ({tree.names[0]}, {tree.names[1]}, ...), so every leaf of two axes and more is taken for "
        "a kernel, tables and biases of two axes among them. Say which leaves multiply data, by "
        "sites=jaxprune.find_sites(...) or prunable=..., or pass a dict by name."
    )


def caution_optimizer(tree: Tree, chosen: Sequence[bool]) -> None:
    """Warn where what is pruned is the state of an optimizer: that of a whole train state, or Adam's moments."""
    known = {slashed(path) for path in tree.paths}
    moments = [
        name
        for path, name, fits in zip(tree.paths, tree.names, chosen, strict=True)
        if fits and _is_of_optimizer(slashed(path).split("/"), known)
    ]
    if moments:
        caution(
            f"{tree.what} holds the state of an optimizer, which is pruned like the parameters: {len(moments)} leaves, "
            f"{moments[0]} the first. Pass the parameters alone, such as state.params or nnx.state(model, nnx.Param)."
        )


def _is_of_optimizer(parts: list[str], known: set[str]) -> bool:
    """Whether a leaf lies in an ``opt_state``, or in what optax calls so in a tuple, or is one of a pair of moments.

    A layer of its own may be called ``mu``.
    """
    first = next((i for i, part in enumerate(parts) if not part.isdigit()), 0)
    if "opt_state" in parts or (first and parts[first] in ("mu", "nu", "trace")):
        return True
    return any(
        "/".join([*parts[:i], other, *parts[i + 1 :]]) in known
        for i, part in enumerate(parts)
        for other in ({"mu": ["nu"], "nu": ["mu"]}.get(part, []))
    )
