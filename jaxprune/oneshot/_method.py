"""A method as `sequential` and `block_by_block` call it: for one leaf at a time, and its results put together again."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp

from jaxprune._tree._leaves import is_floating
from jaxprune._tree._paths import Tree
from jaxprune._tree._prunable import Predicate
from jaxprune.oneshot._codes import Codes, Quantized
from jaxprune.sites._calibrate import Grams

# The parameters and their masks, or a `Quantized`.
Found = TypeVar("Found", bound=tuple[Any, ...])
Found_co = TypeVar("Found_co", bound=tuple[Any, ...], covariant=True)


class Method(Protocol[Found_co]):
    """A method that prunes or rounds a tree of parameters, as `admm` and `gptq` do once their options are given.

    Called ``method(params, grams, prunable=predicate)``, it returns the parameters and their masks, or a `Quantized`:
    ``functools.partial(oneshot.admm, k=0.5)`` is one, ``functools.partial(oneshot.prune_and_quantize, k=0.5, bits=4)`` another.
    """

    def __call__(self, params: Any, grams: Grams, /, *, prunable: Predicate) -> Found_co:
        """Return the parameters and their masks, and the codes of what was rounded."""


class OfLeaf(NamedTuple):
    """What a method finds for one leaf, or one layer of it; `codes` where it rounds."""

    weights: jax.Array
    mask: jax.Array
    codes: Codes | None


def call(method: Method[Any], flat: Tree, path: str, leaf: jax.Array, grams: Grams) -> OfLeaf:
    """Call a method for one leaf of a tree, or for one layer of it."""
    # Other leaves are here only for the sake of tree prefixes.
    tree = {other: jnp.zeros(()) for other, other_leaf in flat.by_path.items() if is_floating(other_leaf)}
    found = method({**tree, path: leaf}, grams, prunable=lambda other, _: other == path)
    codes = found.codes.get(path) if isinstance(found, Quantized) else None
    return OfLeaf(found[0][path], found[1][path], codes)


def together(params: Any, masks: Any, codes: Mapping[str, Codes]) -> Any:
    """Return what a method returns, for all leaves."""
    return Quantized(params, masks, dict(codes)) if codes else (params, masks)


def stack(layers: Mapping[tuple[int, ...], Codes]) -> Codes:
    """Return the codes of a stack of those of its layers, by their indices; ``()`` is that of a leaf that is no stack."""
    in_order = [layers[index] for index in sorted(layers)]
    sizes = tuple(last + 1 for last in max(layers))
    return jax.tree.map(lambda *parts: jnp.stack(parts).reshape(*sizes, *parts[0].shape), *in_order)
