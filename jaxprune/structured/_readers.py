"""What reads the channels of groups, each at one place: there channels are chosen, and the reader is solved for."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._tree._leaves import require_real
from jaxprune.sites._accumulate import grams
from jaxprune.sites._contractions import Use
from jaxprune.sites._find import Reading
from jaxprune.sites._lanes import Stop
from jaxprune.sites._matrices import as_matrices
from jaxprune.sites._outputs import output_products
from jaxprune.sites._views import Each
from jaxprune.structured._groups import ChannelGroup, Member
from jaxprune.structured._losses import DAMPING, Reader, along_inputs, is_repaired, order_of
from jaxprune.structured._ridge import aim, fit
from jaxprune.structured._select_channels import without

_grams = jax.jit(grams, static_argnums=0)


class Problem(NamedTuple):
    """The least squares of one reader, float64, for each of its N matrices: X V close to T.

    Attributes:
        gram: ``X^T X``, [N, I, I].
        cross: ``X^T T``, [N, I, O].
        energy: the sums of the squares of T, [N]; None where they are known of all matrices together only.
        samples: how many rows X has, [N].
    """

    gram: np.ndarray
    cross: np.ndarray
    energy: np.ndarray | None
    samples: np.ndarray


def posed(stop: Stop, use: Use, weights: np.ndarray, outputs: Iterable[jax.Array] | None) -> Problem:
    """Return the problem where a parameter meets data.

    Args:
        stop: the place, with its data.
        use: how the parameter is used there.
        weights: of the reader, float64 [N, I, O].
        outputs: T for each batch, in the layout of the equation's result; None for the reader's own.
    """
    batches = list(zip(*(lane.current for lane in stop.data), strict=True))
    sums = [_grams(use.contraction, data) for data in batches]
    gram, samples = (np.asarray(sum(parts), np.float64) for parts in zip(*sums, strict=True))
    if outputs is None:
        cross = gram @ weights
        return Problem(gram, cross, (weights * cross).sum((1, 2)), samples)
    cross, energy = np.zeros(weights.shape), 0.0
    for data, wanted in zip(batches, outputs, strict=True):
        cross += np.asarray(output_products(stop.equation, use, data, wanted), np.float64)
        energy += float(jnp.sum(jnp.square(wanted)))
    return Problem(gram, cross, np.array([energy]) if len(weights) == 1 else None, samples)


class Readers:
    """The parameters that sum over the channels of some groups, and what stays of these as far as it is chosen.

    Args:
        reading: the function, of whose parameters some may be no more there.
        groups: the groups.
        counts: how many channels of each stay, by name.

    Attributes:
        planned: where they are read, as `Reading.in_order` returns it.
        kept: by the name of a group, and the layer (0 where there are none), what stays, rising.

    Raises:
        ValueError: a group is not read at one place alone.
    """

    def __init__(self, reading: Reading, groups: Sequence[ChannelGroup], counts: Mapping[str, int]) -> None:
        self.kept: dict[str, dict[int, np.ndarray]] = {group.name: {} for group in groups}
        self._counts = counts
        self._groups: dict[str, list[tuple[ChannelGroup, Member]]] = {}
        self._members: dict[str, list[Member]] = {}
        present = set(reading.flat.paths)
        for group in groups:
            members = [member for member in group.members if member.reads and member.path in present]
            self._members[group.name] = members
            for member in members:
                self._groups.setdefault(member.path, []).append((group, member))
        self.planned = reading.in_order(self._groups)
        self._sites = {site.path: site for site, _ in self.planned.values()}
        for group in groups:
            reason = self._trouble(reading, group)
            if reason:
                raise ValueError(
                    f"The channels of {group.name} cannot be chosen where they are read: {reason}. Name the groups to cut in "
                    "sequence, k={...}; this one is for select_channels, and combine joins the plans."
                )

    def _trouble(self, reading: Reading, group: ChannelGroup) -> str:
        """Say why a group is not read at one place alone; nothing where it is."""
        members = self._members[group.name]
        if not members:
            return "no parameter sums over them"
        for member in members:
            uses = [use for site, use in reading.uses.values() if site.path == member.path]
            site = self._sites.get(member.path)
            if site is None or not is_repaired(reading.sites, member.path):
                return f"{member.path} is read more than once, in a loop, or in a way that is not understood"
            if len(uses) > 1 or member.axis not in site.in_axes or uses[0].piece.axis is not None:
                return f"{member.path} is read in parts, or beside others as one"
            if sum(isinstance(step, Each) for step in site.steps) != (member.layers is not None):
                return f"{member.path} is of several layers, which have one choice"
        first, *rest = (self._sites[member.path] for member in members)
        other = next((site for site in rest if site.groups != first.groups), None)
        return "" if other is None else f"{first.path} and {other.path} read them at different places"

    def solve(self, stop: Stop, leaf: Callable[[str], Any], outputs: Iterable[jax.Array] | None) -> jax.Array:
        """Choose the channels that are read at a stop, unless they are chosen, and return its leaf without them, repaired.

        Args:
            stop: the place, with its data.
            leaf: the parameters by path, as they are now.
            outputs: as `posed` takes them.

        Raises:
            ValueError: the data is not finite.
            TypeError: the leaf or the data is complex.
        """
        site, use = self.planned[stop.place, stop.number]
        layer, entry = stop.layers[0] if stop.layers else 0, site.entry(stop.layers)
        require_real(leaf(site.path), site.name, "select_in_sequence")
        require_real(stop.data[0].current[0], f"what {site.name} multiplies", "select_in_sequence")
        weights = np.asarray(as_matrices(entry, leaf(site.path)), np.float64)
        with stop.equation.surroundings():
            problem = posed(stop, use, weights, outputs)
        if not (np.isfinite(problem.gram).all() and np.isfinite(problem.cross).all()):
            raise ValueError(
                f"What meets {site.name} is NaN or infinite. Look at the batches, or at what comes before it."
            )
        aimed = np.stack([aim(*each, DAMPING) for each in zip(problem.gram, problem.cross, weights, strict=True)])
        stays = np.ones(weights.shape[:2], bool)
        for group, member in self._groups[site.path]:
            if layer not in self.kept[group.name]:
                self.kept[group.name][layer] = self._chosen(group, stop.layers, leaf, problem.gram, site.path, aimed)
            along = along_inputs(entry, member.axis, member.channels)
            stays &= (along < 0) | np.isin(along, self.kept[group.name][layer])
        found = []
        for n, (gram, cross) in enumerate(zip(problem.gram, problem.cross, strict=True)):
            if problem.energy is None:
                found.append(aim(gram, cross, weights[n], DAMPING, stays[n]))
            else:
                found.append(fit(gram, cross, weights[n], stays[n], problem.energy[n], problem.samples[n]))
        return entry.put(leaf(site.path), jnp.asarray(np.stack(found), jnp.float32))

    def _chosen(
        self,
        group: ChannelGroup,
        layers: tuple[int, ...],
        leaf: Callable[[str], Any],
        gram: np.ndarray,
        path: str,
        aimed: np.ndarray,
    ) -> np.ndarray:
        """Return the channels that stay: of the reader at `path` what is lost of the weights aimed at, of others of their own."""
        count = self._counts[group.name]
        if count == group.size:
            return np.arange(count)
        readers = []
        for member in self._members[group.name]:
            entry = self._sites[member.path].entry(layers)
            own = aimed if member.path == path else np.asarray(as_matrices(entry, leaf(member.path)))
            along = along_inputs(entry, member.axis, member.channels)
            one_layer, alike = np.zeros(len(along), np.int64), np.ones(len(along))
            readers.append(Reader(entry.groups, along, one_layer, own, gram, alike, None))
        order = order_of(readers, group.size, group.size - count).order
        return without(group, order)
