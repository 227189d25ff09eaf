"""What readers lose with each channel, where they make up for it: the order in which channels go."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._printing import some
from jaxprune.sites._calibrate import Grams
from jaxprune.sites._matrices import as_matrices, overlap
from jaxprune.sites._sites import Site, Sites
from jaxprune.structured._groups import ChannelGroup, Member

# The share of the mean diagonal that is added to a Gram matrix, as the solvers of `oneshot` do unless told otherwise.
DAMPING = 0.01
# Updates of large matrices wait for each other, until they are this many columns: a product costs less than its parts.
_WAITING = 64


class Removals(NamedTuple):
    """Channels that go one after the other.

    Attributes:
        order: the channels, [number], the first one first, among equals the later ones first; where each layer keeps its own,
            [layers, number].
        losses: what each adds to the loss of the group's readers, of the same shape.
        whole: the loss without all channels: what the readers compute, ``1/2 tr(W^T H W)``; [] or [layers].
    """

    order: np.ndarray
    losses: np.ndarray
    whole: np.ndarray


def removal_order(
    group: ChannelGroup,
    params: Mapping[str, Any],
    grams: Grams,
    number: int,
    squares: Mapping[str, Any] | None = None,
) -> Removals:
    """Return the channels of a group that go, the first one first, and how much the loss rises with each.

    Where each layer keeps its own channels, in a row for each layer.

    Readers are matrices W of ``y = x W`` with the Gram matrix H of their inputs x. Their loss under a choice of channels is
    the least of ``1/2 tr((V - W)^T H (V - W))`` over all V whose rows of the channels that went are zero. With the V of the
    channels gone so far, and P the inverse of H where rows stay, the one whose rows are g adds ``1/2 tr(V_g^T (P_gg)^-1 V_g)``:
    the cheapest goes, and ``V - P_:g (P_gg)^-1 V_g``, ``P - P_:g (P_gg)^-1 P_g:`` are those of what is left. V enters by
    ``S = V V^T`` alone, so that what one removal costs does not depend on the number of outputs. Losses of several readers
    add up. One that no least squares repairs (`is_repaired`) keeps its V = W where rows stay.

    Args:
        group: the channels.
        params: the parameters by path.
        grams: of the inputs of the group's readers.
        number: how many channels go, below the group's size.
        squares: squared gradients of the parameters, by path. Each matrix then counts by the mean square of the gradient
            at its outputs, on their scale. For inputs x and gradients g of the outputs that do not depend on each other
            (Martens, Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", 2015, section 3.1)
            ``E[(dL/dW_io)^2] = E[x_i^2] E[g_o^2]``: it is the sum of squares over the diagonal of H, whatever is summed
            over or averaged.

    Raises:
        ValueError: the group has no reader, or one whose inputs are not in `grams`.
    """
    readers = _readers(group, params, grams, squares)
    if group.layers is None:
        return order_of(readers, group.size, number)
    found = [order_of(readers, group.size, number, layer) for layer in range(group.layers.size)]
    return Removals(*(np.stack(parts) for parts in zip(*found, strict=True)))


def order_of(readers: Sequence["Reader"], size: int, number: int, layer: int | None = None) -> Removals:
    """Return what `removal_order` returns: of one layer, or of channels that all have in common.

    Args:
        readers: what reads the channels.
        size: how many channels there are.
        number: how many go.
        layer: which layer, where readers are of several.
    """
    return _order(_matrices(readers, size, layer), size, number)


def _order(matrices: Sequence["_Matrix"], size: int, number: int) -> Removals:
    """Return the order of channels that one choice is made for."""
    readers = [_Solved(matrix) if matrix.solved else _Fixed(matrix) for matrix in matrices]
    whole = sum(float(np.vdot(matrix.gram, matrix.outer)) for matrix in matrices) / 2
    order, losses = np.zeros(number, np.int64), np.zeros(number)
    gone = np.zeros(size, bool)
    for n in range(number):
        rises = np.where(gone, np.inf, sum(reader.rises() for reader in readers))
        channel = size - 1 - int(np.argmin(rises[::-1]))
        order[n], losses[n], gone[channel] = channel, rises[channel], True
        for reader in readers:
            reader.remove(channel)
    return Removals(order, losses, np.asarray(whole))


def repaired_readers(group: ChannelGroup, grams: Grams) -> Iterator[str]:
    """Yield the paths of a group's readers whose weights `removal_order` takes to be solved for."""
    yield from (member.path for member in group.members if member.reads and is_repaired(grams.sites, member.path))


def is_repaired(sites: Sites, path: str) -> bool:
    """Whether every weight of a parameter multiplies data in one known way, so that least squares can be had for it."""
    known = path not in sites.tables and all(entry.path != path for entry in sites.unresolved)
    return known and not overlap(sites.at(path))


class Reader(NamedTuple):
    """A site that reads the channels.

    Attributes:
        groups: what tells its inputs from others.
        channels: of each input of its N matrices the channel or -1, [N, I].
        layers: of each matrix the layer, [N]; zeros where layers have one choice.
        weights: [N, I, O].
        grams: [N, I, I].
        prices: of each matrix what a unit of its loss counts, [N].
        fixed: its path where no least squares repairs it, else None.
    """

    groups: tuple[int, ...]
    channels: np.ndarray
    layers: np.ndarray
    weights: jax.Array | np.ndarray
    grams: jax.Array | np.ndarray
    prices: np.ndarray
    fixed: str | None


class _Matrix(NamedTuple):
    """One matrix of a reader, or of several that share their input.

    Attributes:
        gram: H, [I, I], float64.
        outer: ``W W^T``, [I, I], float64, times what a unit of the loss counts.
        rows: for each channel its rows, [channels, rows of each].
        solved: whether least squares repairs it.
    """

    gram: np.ndarray
    outer: np.ndarray
    rows: np.ndarray
    solved: bool


def _readers(
    group: ChannelGroup, params: Mapping[str, Any], grams: Grams, squares: Mapping[str, Any] | None
) -> list[Reader]:
    found = []
    for member in (member for member in group.members if member.reads):
        sites = _sites(group, member, grams)
        fixed = None if is_repaired(grams.sites, member.path) else member.path
        for site in sites:
            channels = along_inputs(site, member.axis, member.channels)
            layers = np.zeros(len(channels), np.int64)
            if member.layers is not None:
                layers = along_inputs(site, member.layers, np.arange(site.shape[member.layers]))[:, 0]
            weights, gram = as_matrices(site, params[member.path]), grams.of(site)
            prices = (
                np.ones(len(weights)) if squares is None else _prices(as_matrices(site, squares[member.path]), gram)
            )
            found.append(Reader(site.groups, channels, layers, weights, gram, prices, fixed))
    if not found:
        raise ValueError(
            f"No parameter sums over the channels of {group.name}, so that no Gram matrix tells what is lost with them. "
            "Choose those of the other groups by grams, which a k by name says, these by scores=, and combine the plans."
        )
    return found


def _prices(squares: jax.Array, grams: jax.Array) -> np.ndarray:
    """Return of each matrix the mean square of the gradient at one of its outputs, [N]."""
    inputs = np.trace(np.asarray(grams, np.float64), axis1=1, axis2=2)
    return np.asarray(squares, np.float64).sum(1).mean(1) / np.where(inputs > 0, inputs, 1.0)


def along_inputs(site: Site, axis: int, numbers: np.ndarray) -> np.ndarray:
    """Return for each input of each of a site's matrices the number at its place along an axis of the parameter, [N, I]."""

    @jax.jit
    def read(numbers: Any) -> jax.Array:
        shape = [n if other == axis else 1 for other, n in enumerate(site.shape)]
        return site.matrices(jnp.broadcast_to(numbers.reshape(shape), site.shape))[:, :, 0]

    return np.asarray(read(numbers))


def _matrices(readers: Sequence[Reader], size: int, layer: int | None) -> list[_Matrix]:
    """Return the matrices of one layer, or of all."""
    found: dict[tuple[Any, ...], _Matrix] = {}
    for reader in readers:
        for n, along in enumerate(reader.channels):
            if (along < 0).all() or layer not in (
                None,
                reader.layers[n],
            ):  # of another part of the parameter, another layer
                continue
            weights = np.asarray(reader.weights[n], np.float64)
            outer = reader.prices[n] * (weights @ weights.T)
            key = (reader.groups, n, along.tobytes(), reader.fixed)
            if key in found:  # one input, one solution: of query, key and value
                found[key] = found[key]._replace(outer=found[key].outer + outer)
                continue
            order = np.argsort(along, kind="stable")
            rows = order[np.searchsorted(along[order], 0) :].reshape(size, -1)
            found[key] = _Matrix(np.asarray(reader.grams[n], np.float64), outer, rows, reader.fixed is None)
    return list(found.values())


def _sites(group: ChannelGroup, member: Member, grams: Grams) -> list[Site]:
    sites = [site for site in grams.sites if site.path == member.path and member.axis in site.in_axes]
    unresolved = [entry.reason for entry in grams.sites.unresolved if entry.path == member.path]
    if unresolved or not sites:
        known = some(dict.fromkeys(site.path for site in grams.sites))
        raise ValueError(
            f"{group.name} is read by {member.path}, of whose inputs grams "
            + (
                f"knows not all: {'; '.join(unresolved)}"
                if unresolved
                else f"has no Gram matrix; it has those of {known}"
            )
            + ". Calibrate it as well; or choose the other groups by name, this one by scores=, and combine the plans."
        )
    return sites


class _Solved:
    """A reader whose weights are solved for anew after each removal."""

    def __init__(self, matrix: _Matrix) -> None:
        """Invert the Gram matrix; of both matrices the rows of channels are all that is needed from then on."""
        (size, k), rows = matrix.rows.shape, matrix.rows.ravel()
        mean = np.diagonal(matrix.gram).mean() or 1.0
        inverse = np.linalg.inv(matrix.gram + DAMPING * mean * np.eye(len(matrix.gram)))
        self._inverse = inverse[np.ix_(rows, rows)]
        self._outer = matrix.outer[np.ix_(rows, rows)]
        self._own_inverse, self._own_outer = (_blocks(square, size, k) for square in (self._inverse, self._outer))
        # Of each removal that waits: P_:g, P_:g (P_gg)^-1, and S_:g - P_:g (P_gg)^-1 S_gg / 2.
        self._waiting: tuple[np.ndarray, ...] = tuple(np.zeros((len(rows), 0)) for _ in range(3))

    def rises(self) -> np.ndarray:
        """Return what each channel would add to the loss; of one that is gone, anything."""
        if self._own_inverse.shape[1] == 1:
            return (self._own_outer / self._own_inverse).reshape(-1) / 2
        return np.trace(np.linalg.solve(self._own_inverse, self._own_outer), axis1=1, axis2=2) / 2

    def remove(self, channel: int) -> None:
        """Solve for what is left without a channel."""
        size, k, _ = self._own_inverse.shape
        g = slice(channel * k, channel * k + k)
        columns, gains, halves = self._waiting
        column = self._inverse[:, g] - gains @ columns[g].T
        outer = self._outer[:, g] - gains @ halves[g].T - halves @ gains[g].T
        gain = np.linalg.solve(column[g], column.T).T
        half = outer - gain @ outer[g] / 2
        each = [part.reshape(size, k, k) for part in (column, gain, half)]
        self._own_inverse -= each[1] @ each[0].swapaxes(1, 2)
        cross = each[1] @ each[2].swapaxes(1, 2)
        self._own_outer -= cross + cross.swapaxes(1, 2)
        self._own_inverse[channel], self._own_outer[channel] = np.eye(k), 0.0
        self._waiting = tuple(
            np.concatenate([before, new], 1) for before, new in zip(self._waiting, (column, gain, half), strict=True)
        )
        if self._waiting[0].shape[1] >= _WAITING:
            columns, gains, halves = self._waiting
            self._inverse -= gains @ columns.T
            cross = gains @ halves.T
            self._outer -= cross + cross.T
            self._waiting = tuple(part[:, :0] for part in self._waiting)


class _Fixed:
    """A reader whose weights stay as they are."""

    def __init__(self, matrix: _Matrix) -> None:
        """Sum up the products of all pairs of channels: ``tr(W_g^T H_gr W_r)``."""
        size, k = matrix.rows.shape
        at = np.ix_(matrix.rows.ravel(), matrix.rows.ravel())
        self._pairs = (matrix.gram[at] * matrix.outer[at]).reshape(size, k, size, k).sum((1, 3))
        self._rises = np.diagonal(self._pairs) / 2

    def rises(self) -> np.ndarray:
        """Return what each channel would add to the loss; of one that is gone, anything."""
        return self._rises

    def remove(self, channel: int) -> None:
        """Take note of a channel that is gone."""
        self._rises = self._rises + self._pairs[:, channel]


def _blocks(square: np.ndarray, size: int, k: int) -> np.ndarray:
    """Return the blocks on the diagonal, [size, k, k]."""
    each = np.arange(size)
    return square.reshape(size, k, size, k)[each, :, each].copy()
