"""Statistics of the inputs of every parameter, from a few batches, in constant memory."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp

from jaxprune._printing import Printable
from jaxprune._progress import tracked
from jaxprune._tree._given import described, require_instance
from jaxprune._tree._leaves import is_complex
from jaxprune._tree._sharding import through_compiler
from jaxprune.sites._accumulate import grams, sums_of_squares
from jaxprune.sites._find import Reading, read
from jaxprune.sites._show import in_short, statistics_table
from jaxprune.sites._sites import Site, Sites
from jaxprune.sites._walk import Measure

if TYPE_CHECKING:
    from jaxprune._tables import Table

_Statistics = TypeVar("_Statistics", bound="_Sums")


class CalibrationWarning(UserWarning):
    """Statistics that are there, but not of everything, or of too few samples."""


@dataclasses.dataclass(frozen=True, repr=False)
class _Sums(Printable):
    """Sums over samples for each group of sites that share their inputs; prints as a table of how many samples there were.

    Attributes:
        sites: the sites of the function; static, part of the treedef.
        sums: for each group the sum, float32.
        counts: for each group the number of samples (rows of x) of each of its N matrices, float32 ``[N]``.
    """

    sites: Sites
    sums: dict[int, jax.Array]
    counts: dict[int, jax.Array]

    def count(self, site: Site) -> jax.Array:
        """Return how many samples (rows of x) each of the site's N matrices has multiplied, float32 ``[N]``."""
        return _total(self.counts, site)

    def _in_short(self) -> str:
        return in_short(self.sites.sites)

    def table(self, *, full: bool = False) -> "Table":
        """Return the table that is printed; a row for each layer if it is to be `full`."""
        return statistics_table(f"{type(self).__name__}: samples measured", self.sites.sites, self.counts, full=full)

    def __add__(self: _Statistics, other: _Statistics) -> _Statistics:
        """Return the statistics of both calibrations together."""
        if type(self) is not type(other):
            return NotImplemented
        if self.sites != other.sites:
            raise ValueError("These statistics are of different functions or shapes of parameters; they do not add.")
        return jax.tree.map(jnp.add, self, other)


def _total(found: dict[int, jax.Array], site: Site) -> jax.Array:
    missing = [group for group in site.groups if group not in found]
    if missing or not site.groups:
        raise ValueError(
            f"There is no such statistic of {site.name} ({site.operation}): it was left out of the calibration, or, "
            "for a table of which rows are read, its Gram matrix is diagonal; take calibrate_norms."
        )
    return sum((found[group] for group in site.groups[1:]), start=found[site.groups[0]])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Norms(_Sums):
    """Sums of squares of every input, by `calibrate_norms`; a pytree that adds (``a + b``, ``lax.psum``).

    Attributes:
        sites: the sites of the function; static, part of the treedef.
        sums: for each group of sites that share their inputs the sum over samples, float32.
        counts: for each group the number of samples (rows of x) of each of its N matrices, float32 ``[N]``.
    """

    sites: Sites = dataclasses.field(metadata={"static": True})

    def of(self, site: Site) -> jax.Array:
        """Return the Euclidean norms of the site's inputs over all samples, ``||X_j||``, float32 ``[N, I]``."""
        return jnp.sqrt(_total(self.sums, site))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Grams(_Sums):
    """Gram matrices of the inputs, by `calibrate_grams`; a pytree that adds (``a + b``, ``lax.psum``).

    Attributes:
        sites: the sites of the function; static, part of the treedef.
        sums: for each group of sites that share their inputs the sum over samples, float32.
        counts: for each group the number of samples (rows of x) of each of its N matrices, float32 ``[N]``.
    """

    sites: Sites = dataclasses.field(metadata={"static": True})

    def of(self, site: Site) -> jax.Array:
        """Return ``X^T X``, summed over all samples, float32 ``[N, I, I]``."""
        return _total(self.sums, site)

    def norms(self) -> Norms:
        """Return what `calibrate_norms` measures, read off the diagonals: norms of the inputs, for `scores.wanda`.

        Of tables of which rows are read there are none, as there is no Gram matrix.

        >>> import jax.numpy as jnp
        >>> grams = calibrate_grams(lambda p, x: x @ p, jnp.ones((2, 1)), [jnp.array([[3.0, 1.0], [4.0, 0.0]])])
        >>> [grams.norms().of(site).tolist() for site in grams.sites]
        [[[5.0, 1.0]]]
        """
        diagonals = through_compiler(lambda sums: jax.tree.map(lambda x: jnp.diagonal(x, 0, 1, 2), sums), self.sums)
        return Norms(self.sites, diagonals, self.counts)


def require_grams(grams: Any, call: str) -> None:
    """Raise a TypeError unless these are Gram matrices; `call` shows the arguments in their order."""
    why = "; norms are their diagonals alone" if isinstance(grams, Norms) else ""
    require_instance(grams, Grams, call, f"Measure them by grams = calibrate_grams(fn, params, batches){why}.")


def require_norms(norms: Any, call: str) -> None:
    """Raise a TypeError unless these are norms; `call` shows the arguments in their order."""
    remedy = (
        "Pass grams.norms()."
        if isinstance(norms, Grams)
        else "Measure them by norms = calibrate_norms(fn, params, batches)."
    )
    require_instance(norms, Norms, call, remedy)


def calibrate_norms(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    where: Callable[[Site], bool] | None = None,
    progress: bool = False,
) -> Norms:
    """Measure the norms of the inputs of every parameter over a few batches: what `scores.wanda` needs.

    Any JAX function will do; see `find_sites`. Streamed: every batch is read once, its sums of squares are added up in
    float32 whatever the dtype of the activations, and no activations are kept. Compiled once.

    Args:
        fn: ``fn(params, *inputs)``; its results do not matter.
        params: a pytree of arrays.
        batches: any iterable of inputs of equal shapes; a tuple is several inputs, ``fn(params, *batch)``, anything
            else is one. A ``tfds.data_source`` in batches or a grain loader will do.
        where: which sites to measure; all when None.
        progress: whether to show a progress bar on stderr.

    Returns:
        The `Norms`; ``norms.of(site)`` for each of ``norms.sites``. They add, so that several runs can be one.

    Raises:
        ValueError: there is no batch, a batch has another shape than the first, an activation is NaN or infinite (the
            message names the parameter that it meets), or no site is left.
        TypeError: a parameter, or what it multiplies, is complex.

    Warns:
        CalibrationWarning: parameters are used in ways that are not understood.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.zeros((2, 3))}
    >>> norms = calibrate_norms(lambda p, x: x @ p["kernel"], params, [jnp.array([[3.0, 1.0]]), jnp.array([[4.0, 0.0]])])
    >>> [norms.of(site).tolist() for site in norms.sites]
    [[[5.0, 1.0]]]
    """
    return _calibrate(Norms, sums_of_squares, 1, fn, params, batches, where, progress)


def calibrate_grams(
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    *,
    where: Callable[[Site], bool] | None = None,
    progress: bool = False,
) -> Grams:
    """Accumulate the Gram matrices of the inputs of every parameter over a few batches: what the solvers need.

    As `calibrate_norms`, with ``X^T X`` for sums of squares: I x I numbers for each input instead of I, and no
    activations kept. Products are taken at the highest precision and added in float32. Parameters that share an input
    (query, key and value) share the matrix. Tables of which rows are read have none: theirs would be diagonal.

    Args:
        fn: ``fn(params, *inputs)``; its results do not matter.
        params: a pytree of arrays.
        batches: any iterable of inputs of equal shapes, as in `calibrate_norms`.
        where: which sites to measure; all when None.
        progress: whether to show a progress bar on stderr.

    Returns:
        The `Grams`; ``grams.of(site)`` for each of ``grams.sites``. They add, so that several runs can be one.

    Raises:
        ValueError: as in `calibrate_norms`.
        TypeError: as in `calibrate_norms`.

    Warns:
        CalibrationWarning: a site has met fewer samples than it has inputs, so that its Gram matrix is singular; or
            parameters are used in ways that are not understood.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.zeros((2, 3))}
    >>> grams = calibrate_grams(lambda p, x: x @ p["kernel"], params, [jnp.array([[3.0, 1.0], [4.0, 0.0]])])
    >>> [grams.of(site).tolist() for site in grams.sites]
    [[[[25.0, 3.0], [3.0, 1.0]]]]
    """
    found = _calibrate(Grams, grams, 2, fn, params, batches, where, progress)
    _warn_of_few_samples(found)
    return found


def _calibrate(
    kind: type[_Statistics],
    measure: Measure,
    rank: int,
    fn: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    where: Callable[[Site], bool] | None,
    progress: bool,
) -> _Statistics:
    """Add up a measurement of `rank` axes for each matrix, over all batches."""
    require_batches(batches)
    reading: Reading | None = None
    for number, batch in enumerate(tracked(batches, "calibrating", progress)):
        inputs = inputs_of(batch)
        if reading is None:
            first = inputs
            reading = read(fn, params, inputs)
            sites = _selected(reading.sites, where, rank)
            for site in sites:
                _require_real(site, reading.flat.by_path[site.path])
            update, totals = _accumulator(reading, inputs, measure, rank, {g for site in sites for g in site.groups})
            for site in sites:
                for group in site.groups:
                    _require_real(site, totals[0][group])
        require_alike(inputs, first, number)
        totals = update(reading.flat.leaves, jax.tree.leaves(inputs), totals)
    if reading is None:
        raise ValueError("There is no calibration batch; an iterator that was read before is empty.")
    sums, counts = totals
    found = kind(sites, sums, counts)
    require_finite(found)
    return found


def require_batches(batches: Any) -> None:
    """Raise a TypeError where there is one batch, or something else, in place of several."""
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches is {described(batches)}, not several batches. Pass fn, params and batches in this order; of one "
            "batch, write [batch]."
        )


def inputs_of(batch: Any) -> tuple[Any, ...]:
    """Return the inputs a batch stands for: a plain tuple is several."""
    return batch if type(batch) is tuple else (batch,)


def all_inputs(batches: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Return the inputs of all batches; raise a ValueError where there is none, or one is unlike the first."""
    require_batches(batches)
    held = [inputs_of(batch) for batch in batches]
    if not held:
        raise ValueError("There is no calibration batch; an iterator that was read before is empty.")
    for number, inputs in enumerate(held):
        require_alike(inputs, held[0], number)
    return held


def require_alike(inputs: tuple[Any, ...], first: tuple[Any, ...], number: int) -> None:
    """Raise a ValueError that names the first array of a batch that is unlike that of the first batch."""
    structures: list[Any] = [jax.tree.structure(inputs), jax.tree.structure(first)]
    if structures[0] != structures[1]:
        raise ValueError(f"batches[{number}] has another structure than the first batch; let all be alike.")
    before = jax.tree.leaves(first)
    for (path, leaf), like in zip(jax.tree_util.tree_leaves_with_path(inputs), before, strict=True):
        new, old = jax.typeof(leaf), jax.typeof(like)
        if new.shape != old.shape or new.dtype != old.dtype:
            raise ValueError(
                f"batches[{number}]{jax.tree_util.keystr(path)} is {new.dtype}{list(new.shape)}, in the first batch "
                f"{old.dtype}{list(old.shape)}. Drop a smaller last batch, or calibrate it apart and add the results."
            )


def warn_of_unresolved(sites: Sites, stacklevel: int) -> None:
    """Warn where there will be no statistics, as seen from the function that calls."""
    if sites.unresolved:
        lines = [f"  {entry.name}: {entry.reason}" for entry in sites.unresolved]
        warnings.warn(
            "Parameters are used in ways that are not understood; there are no statistics of these uses:\n"
            + "\n".join(lines),
            CalibrationWarning,
            stacklevel=stacklevel + 1,
        )


def _selected(sites: Sites, where: Callable[[Site], bool] | None, rank: int) -> Sites:
    warn_of_unresolved(sites, stacklevel=4)
    chosen = sites.select(lambda site: (rank == 1 or site.operation != "gather") and (where is None or where(site)))
    if not chosen.sites:
        raise ValueError("There is nothing to calibrate: " + _why_nothing(sites))
    return chosen


def _why_nothing(sites: Sites) -> str:
    if len(sites):
        return f"of {len(sites)} site(s), none is asked for."
    if sites.unresolved:
        first = sites.unresolved[0]
        return f"no use of a parameter is understood, {first.name} the first: {first.reason}."
    if sites.unused and not sites.elementwise:
        return (
            "the function uses no parameter of those it is given. Let it take them from its first argument, not from a "
            "model that holds its own."
        )
    return "the function multiplies no input by a floating-point parameter."


def _require_real(site: Site, array: Any) -> None:
    if is_complex(array):
        raise TypeError(
            f"Calibration is of real numbers, but {site.name}, or what it multiplies, is complex. Leave it out with "
            "where=lambda site: ...; by its modulus it is pruned by make_masks without scores=."
        )


def _accumulator(
    reading: Reading, inputs: Any, measure: Measure, rank: int, groups: set[int]
) -> tuple[Callable[..., Any], Any]:
    """Return the program that adds a batch's measurements to the totals, and totals of zero, so that it compiles once."""

    def flatten(array: jax.Array, kept: int) -> jax.Array:
        cut = array.ndim - kept
        return array.reshape(math.prod(array.shape[:cut]), *array.shape[cut:])

    def of_batch(leaves: Any, inputs: Any) -> Any:
        _, measured = reading.run(leaves, inputs, measure, groups)
        return (
            {group: flatten(sums, rank) for group, (sums, _) in measured.items()},
            {group: flatten(counts, 0) for group, (_, counts) in measured.items()},
        )

    @functools.partial(jax.jit, donate_argnums=2)
    def update(leaves: Any, inputs: Any, totals: Any) -> Any:
        return jax.tree.map(jnp.add, totals, of_batch(leaves, inputs))

    shapes = jax.eval_shape(of_batch, reading.flat.leaves, jax.tree.leaves(inputs))
    # Placed as they will be, which on a mesh with explicit axes zeros_like could do only with the mesh set.
    return update, jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype, device=shape.sharding), shapes)


def require_finite(found: _Sums) -> None:
    """Raise a ValueError that names the first parameter whose statistics are not finite."""
    finite = dict(zip(found.sums, _are_finite(list(found.sums.values())), strict=True))
    for site in found.sites:
        if not all(bool(finite[group]) for group in site.groups):
            raise ValueError(
                f"The activations that meet {site.name} are NaN or infinite, or their squares overflow float32. "
                "It is the first such parameter; look at what comes before it, or at the batches."
            )


@jax.jit  # once for all blocks of one shape: they are told apart by the groups' numbers alone
def _are_finite(sums: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(array).all() for array in sums]


def _warn_of_few_samples(found: Grams) -> None:
    few = []
    for site in found.sites:
        samples, inputs = float(jnp.min(found.count(site))), site.matrix_shape[1]
        if samples < inputs:
            few.append(f"  {site.name}: {samples:g} samples, {inputs} inputs")
    if few:
        warnings.warn(
            "These parameters have met fewer samples than they have inputs, so their Gram matrices are singular and "
            "the solvers rely on damping; calibrate with more batches:\n" + "\n".join(few),
            CalibrationWarning,
            stacklevel=3,
        )
