"""Llama-type models as plain trees: the leaves that some sizes make, and the sizes that some leaves have."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune._printing import some
from jaxprune._tree._leaves import is_complex, is_floating
from jaxprune._tree._paths import flatten
from jaxprune.oneshot import Codes

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PERCEPTRON = ("gate_proj", "up_proj", "down_proj")
_LAYER = re.compile(r"layer_(0|[1-9]\d*)/(.+)")
_STACKED = "layers/"

Shape = tuple[int, ...]


class Leaf(NamedTuple):
    """An array that is on the host only when it is read.

    Attributes:
        name: what messages call it, ``params['layer_0']['q_proj']['kernel']``.
        shape: its shape.
        dtype: its dtype.
        read: returns it.
    """

    name: str
    shape: Shape
    dtype: np.dtype[Any]
    read: Callable[[], np.ndarray]


class Sizes(NamedTuple):
    """What a Llama is made of; `heads`, `kv_heads` and `inner` have an entry for each layer.

    Attributes:
        vocabulary: rows of the table of tokens.
        width: of the residual stream.
        head_dim: features of a head.
        heads: of queries.
        kv_heads: of keys and values; each serves as many heads of queries.
        inner: channels of the perceptron.
        tied: whether the table of tokens is the head, too.
        biases: the projections that have one.
        head_norms: whether queries and keys are normalised head by head.
    """

    vocabulary: int
    width: int
    head_dim: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    inner: tuple[int, ...]
    tied: bool
    biases: frozenset[str]
    head_norms: bool

    def shapes(self) -> dict[str, Shape]:
        """The shapes of all leaves by path; kernels are [inputs, outputs]."""
        found: dict[str, Shape] = {"embed/embedding": (self.vocabulary, self.width)}
        for number in range(len(self.heads)):
            found |= {f"layer_{number}/{path}": shape for path, shape in self._layer(number).items()}
        found["norm/scale"] = (self.width,)
        return found if self.tied else found | {"head/kernel": (self.width, self.vocabulary)}

    def _layer(self, number: int) -> dict[str, Shape]:
        queries, keys = self.heads[number] * self.head_dim, self.kv_heads[number] * self.head_dim
        width, inner = self.width, self.inner[number]
        kernels = {
            "q_proj": (width, queries),
            "k_proj": (width, keys),
            "v_proj": (width, keys),
            "o_proj": (queries, width),
        }
        kernels |= {"gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}
        found: dict[str, Shape] = {"attention_norm/scale": (width,), "mlp_norm/scale": (width,)}
        for name, shape in kernels.items():
            found[f"{name}/kernel"] = shape
            if name in self.biases:
                found[f"{name}/bias"] = shape[1:]
        if self.head_norms:
            found |= {"q_norm/scale": (self.head_dim,), "k_norm/scale": (self.head_dim,)}
        return found


class Llama(NamedTuple):
    """A model's leaves by path, its layers counted from 0 without a gap.

    Attributes:
        sizes: what it is made of.
        leaves: by path, as `Sizes.shapes` names them.
        numbers: what its layers were called; None where they were stacked.
        dtype: of its table of tokens.
    """

    sizes: Sizes
    leaves: dict[str, Leaf]
    numbers: tuple[int, ...] | None
    dtype: np.dtype[Any]


def read_llama(params: Any, config: Mapping[str, Any]) -> Llama:
    """Read a tree, with a loop of layers or with stacked ones; layers of which nothing is left do not count.

    Raises:
        TypeError: a leaf is no array.
        ValueError: a leaf is missing, has the shape of another model, is traced or not floating-point, or there is one too many.
    """
    head_dim = read_head_dim(config)
    leaves, numbers = _count_layers(read_leaves(params, "params"))
    sizes = _read_sizes(leaves, head_dim)
    for path, shape in sizes.shapes().items():
        leaf = _take(leaves, path)
        if leaf.shape != shape:
            raise ValueError(f"{leaf.name} has shape {leaf.shape}; beside the other leaves it should be {shape}.")
    unknown = [leaves[path].name for path in leaves.keys() - sizes.shapes().keys()]
    if unknown:
        raise ValueError(
            f"{some(sorted(unknown))} has no place in a Llama of these leaves. They are named like embed/embedding, "
            "layer_0/q_proj/kernel, norm/scale, and all layers have the same ones."
        )
    return Llama(sizes, leaves, numbers, leaves["embed/embedding"].dtype)


def codes_of(codes: Mapping[str, Codes], model: Llama) -> dict[str, Codes]:
    """Return the codes of each leaf, with layers counted as those of the model are; raise a ValueError for what is no kernel's."""
    found: dict[str, Codes] = {}
    now = {f"layer_{number}": f"layer_{place}" for place, number in enumerate(model.numbers or ())}
    for path, held in codes.items():
        if model.numbers is not None or not path.startswith(_STACKED):
            found["/".join(now.get(part, part) for part in path.split("/"))] = held
            continue
        for number in range(len(model.sizes.heads)):
            of_layer = jax.tree.map(lambda part, number=number: part[number], held)
            found[path.replace(_STACKED, f"layer_{number}/")] = of_layer
    for path in found:
        if not path.endswith("_proj/kernel") or path not in model.leaves:
            raise ValueError(f"codes has an entry for {path!r}, which is no kernel of a layer; take it out.")
    return found


def read_head_dim(config: Mapping[str, Any]) -> int:
    """Return the features of a head, which no shape says."""
    if not isinstance(config, Mapping):
        raise TypeError(f"config is {type(config).__name__}, not the dict that a reader returns or config.json holds.")
    head_dim = config.get("head_dim")
    if type(head_dim) is not int or head_dim < 2 or head_dim % 2:
        raise ValueError(f"config['head_dim'] is {head_dim!r}; say how many features a head has, an even number.")
    return head_dim


def read_leaves(tree: Any, what: str) -> dict[str, Leaf]:
    """Read the leaves of a tree, which messages call `what`, by path; raise where one is no array of real numbers."""
    flat = flatten(tree, what)
    flat.require_arrays()
    found = {}
    for path, name, leaf in zip(flat.paths, flat.names, flat.leaves, strict=True):
        if isinstance(leaf, jax.core.Tracer):
            raise ValueError(f"{name} is traced; write outside jit.")
        if not is_floating(leaf) or is_complex(leaf):
            raise ValueError(
                f"{name} is {getattr(leaf, 'dtype', type(leaf).__name__)}, not real and floating-point; cast it."
            )
        found[path] = Leaf(name, np.shape(leaf), np.dtype(getattr(leaf, "dtype", np.float32)), _reader(leaf))
    return found


def _reader(leaf: Any) -> Callable[[], np.ndarray]:
    return lambda: np.asarray(leaf)


def _count_layers(leaves: dict[str, Leaf]) -> tuple[dict[str, Leaf], tuple[int, ...] | None]:
    """Name the layers layer_0, layer_1, ... without a gap, and say what they were called, if they were not stacked."""
    rest = {path: leaf for path, leaf in leaves.items() if not path.startswith(_STACKED) and not _LAYER.fullmatch(path)}
    stacked = {path.removeprefix(_STACKED): leaf for path, leaf in leaves.items() if path.startswith(_STACKED)}
    loop = {found.groups(): leaf for path, leaf in leaves.items() if (found := _LAYER.fullmatch(path))}
    if bool(stacked) == bool(loop):
        raise ValueError(
            f"params has {some(sorted(leaves))}: its layers should be layer_0, layer_1, ... or stacked in layers."
        )
    if stacked:
        first = next(iter(stacked.values()))
        for leaf in stacked.values():
            if leaf.shape[:1] != first.shape[:1] or not leaf.shape:
                raise ValueError(
                    f"{leaf.name} has shape {leaf.shape}, {first.name} {first.shape}: one layer for each index."
                )
        for path, leaf in stacked.items():
            rest |= {f"layer_{i}/{path}": _of_stack(leaf, i) for i in range(leaf.shape[0])}
        return rest, None
    numbers = tuple(sorted({int(number) for number, _ in loop}))
    place = {number: i for i, number in enumerate(numbers)}
    return rest | {f"layer_{place[int(number)]}/{path}": leaf for (number, path), leaf in loop.items()}, numbers


def _of_stack(leaf: Leaf, number: int) -> Leaf:
    return Leaf(f"{leaf.name}[{number}]", leaf.shape[1:], leaf.dtype, lambda: leaf.read()[number])


def _read_sizes(leaves: Mapping[str, Leaf], head_dim: int) -> Sizes:
    vocabulary, width = _take(leaves, "embed/embedding", axes=2).shape
    count = 1 + max((int(found[1]) for path in leaves if (found := _LAYER.fullmatch(path))), default=-1)

    def outputs(name: str, unit: int) -> tuple[int, ...]:
        found = []
        for number in range(count):
            leaf = _take(leaves, f"layer_{number}/{name}/kernel", axes=2)
            if leaf.shape[1] % unit or not leaf.shape[1]:
                raise ValueError(f"{leaf.name} has {leaf.shape[1]} outputs, which are no heads of {unit} features.")
            found.append(leaf.shape[1] // unit)
        return tuple(found)

    sizes = Sizes(
        vocabulary,
        width,
        head_dim,
        heads=outputs("q_proj", head_dim),
        kv_heads=outputs("k_proj", head_dim),
        inner=outputs("gate_proj", 1),
        tied="head/kernel" not in leaves,
        biases=frozenset(name for name in ATTENTION + PERCEPTRON if f"layer_0/{name}/bias" in leaves),
        head_norms="layer_0/q_norm/scale" in leaves,
    )
    for number in range(count):
        _check_shared(leaves[f"layer_{number}/q_proj/kernel"].name, sizes.heads[number], sizes.kv_heads[number])
    return sizes


def _check_shared(name: str, heads: int, kv_heads: int) -> None:
    if heads % kv_heads:
        found = some(map(str, nearest(heads, lambda n: n % kv_heads == 0)))
        raise ValueError(
            f"{name} has {heads} heads for {kv_heads} of keys and values, which serve equally many. The nearest that do are {found}."
        )


def _take(leaves: Mapping[str, Leaf], path: str, axes: int | None = None) -> Leaf:
    leaf = leaves.get(path)
    if leaf is None:
        raise ValueError(
            f"params has no {path}. A layer has all of attention and perceptron: drop whole layers, or leave zeros in "
            "o_proj or down_proj of what is to do nothing."
            if path.startswith("layer_")
            else f"params has no {path}, which every Llama has."
        )
    if axes is not None and len(leaf.shape) != axes:
        raise ValueError(f"{leaf.name} has shape {leaf.shape}, not {axes} axes.")
    return leaf


def nearest(number: int, fits: Callable[[int], bool]) -> list[int]:
    """The next smaller and the next larger number that fit."""
    below = next((n for n in range(number - 1, 0, -1) if fits(n)), None)
    above = next((n for n in range(number + 1, 4 * number + 1) if fits(n)), None)
    return [n for n in (below, above) if n is not None]


def to_pairs(values: np.ndarray, head_dim: int) -> np.ndarray:
    """Bring the features of each head [..., heads * head_dim] from halves that are turned together to pairs side by side.

    >>> to_pairs(np.arange(8), 4).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return values.reshape(*values.shape[:-1], -1, 2, head_dim // 2).swapaxes(-1, -2).reshape(values.shape)


def from_pairs(values: np.ndarray, head_dim: int) -> np.ndarray:
    """Undo `to_pairs`.

    >>> from_pairs(to_pairs(np.arange(8), 4), 4).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    return values.reshape(*values.shape[:-1], -1, head_dim // 2, 2).swapaxes(-1, -2).reshape(values.shape)
