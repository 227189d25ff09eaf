"""What each layer bears: the metric with one layer pruned, and with all, at every strength."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import rules
from jaxprune._iterate import require_several
from jaxprune._masks import make_masks
from jaxprune._masks import sparsity as mask_sparsity
from jaxprune._printing import Printable, as_json, in_order, many
from jaxprune._progress import tracked
from jaxprune._tree._axes import Stacked
from jaxprune._tree._cautions import caution
from jaxprune._tree._given import described
from jaxprune._tree._params import Params, read_params
from jaxprune._tree._patterns import matches
from jaxprune._tree._prunable import Prunable
from jaxprune.rules._layers import check_strength
from jaxprune.rules._rule import AnyRule, Rule, as_rule
from jaxprune.scores._evidence import require_scores
from jaxprune.sites._sites import Sites

if TYPE_CHECKING:
    from jaxprune._tables import Table

# Parameters to one number, larger = better.
Evaluate = Callable[[Any], Any]

# A group that loses less than this of its weights is as good as dense.
NEGLIGIBLE = 0.01
# A metric may rise by such a share of itself where pruning does good.
_BY_CHANCE = 0.01


@dataclasses.dataclass(frozen=True, repr=False)
class Sensitivity(Printable):
    """What `sensitivity` found; prints as a table.

    Attributes:
        ks: the strengths, rising.
        groups: the names of what was pruned alone.
        paths: for each group the paths of its leaves.
        sizes: for each group how many weights it has.
        dense: the metric of the unpruned parameters.
        metric: with one group pruned alone, float64 [groups, ks].
        sparsity: the fraction removed of that group, float64 [groups, ks].
        together: the metric with all groups pruned, float64 [ks].
        together_sparsity: the fraction then removed of all their weights, float64 [ks].
    """

    ks: tuple[float, ...]
    groups: tuple[str, ...]
    paths: tuple[tuple[str, ...], ...]
    sizes: tuple[int, ...]
    dense: float
    metric: np.ndarray
    sparsity: np.ndarray
    together: np.ndarray
    together_sparsity: np.ndarray

    @property
    def drop(self) -> np.ndarray:
        """How much of the metric each group costs alone, [groups, ks]."""
        return self.dense - self.metric

    def _in_short(self) -> str:
        low, high = self.ks[0], self.ks[-1]
        ks = f"k = {low:g}" if low == high else f"{len(self.ks)} strengths from {low:g} to {high:g}"
        return f"{many(len(self.groups), 'layer')} alone and all together, {ks}; dense {self.dense:.4g}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers."""
        plain = {name: getattr(self, name) for name in (field.name for field in dataclasses.fields(self))}
        return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in plain.items()}

    def to_json(self) -> str:
        """Return `to_dict` as JSON text; an infinite metric becomes null."""
        return as_json(self.to_dict())

    def remarks(self, max_drop: float) -> list[str]:
        """Say in words, group by group, which strengths are too low to matter and which too high to survive.

        Args:
            max_drop: how much of the metric a group may cost alone, >= 0, in the metric's own unit.

        Returns:
            Sentences; none about a group that has neither.
        """
        found = []
        for name, sparsity, drop in zip(self.groups, self.sparsity, self.drop, strict=True):
            idle = [k for k, share in zip(self.ks, sparsity, strict=True) if share < NEGLIGIBLE]
            if idle:
                found.append(f"{name}: up to k = {idle[-1]:g} less than {NEGLIGIBLE:.0%} goes, too low to matter.")
            deadly = [j for j, cost in enumerate(drop) if cost > max_drop]
            if deadly:
                j = deadly[0]
                found.append(
                    f"{name}: k = {self.ks[j]:g} ({sparsity[j]:.0%} removed) alone costs {drop[j]:.4g} of the metric, "
                    "too high to survive."
                )
        return found

    def table(self, *, full: bool = False) -> "Table":
        """Return the table that is printed: the metric, and below it the sparsity; a row for each layer if it is to be `full`."""
        from jaxprune._tables import Table

        title = f"Metric with one layer pruned by k (dense {self.dense:.4g}), and the sparsity of that layer"
        table = Table(full=full, title=title, padding=(0, 0, 0, 1))
        table.add_column("layer", overflow="fold", min_width=12)
        table.add_column("weights", justify="right")
        for k in self.ks:
            table.add_column(f"{k:g}", justify="right")
        rows = zip(self.groups, self.sizes, self.metric, self.sparsity, strict=True)
        for name, size, metric, sparsity in in_order(rows, lambda row: row[0]):
            table.add_row(name, f"{size:,}", *_cells(metric, sparsity))
        table.add_section()
        table.add_row("all together", f"{sum(self.sizes):,}", *_cells(self.together, self.together_sparsity))
        return table


def _cells(metric: np.ndarray, sparsity: np.ndarray) -> list[str]:
    return [f"{value:.4g}\n{share:.1%}" for value, share in zip(metric, sparsity, strict=True)]


def sensitivity(
    evaluate: Evaluate,
    params: Any,
    ks: Sequence[float],
    *,
    rule: AnyRule = rules.std_threshold,
    scores: Any = None,
    prunable: Prunable = None,
    stacked: Stacked = None,
    sites: Sites | None = None,
    groups: Mapping[str, str | Sequence[str]] | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Sensitivity:
    """Measure what each layer bears: prune it alone at every strength, and all together, and evaluate.

    Masks are made once for each k, by `rule` from all layers; pruning one layer alone applies its mask only. Both
    steps are compiled once for the whole sweep, and no more than one set of masks and one pruned copy of the
    parameters (`batch_size` copies) exist at a time.

    Args:
        evaluate: parameters to one number, larger = better (negate a loss). Called once for each point and once for
            the unpruned parameters; jit what it calls.
        params: a pytree of arrays.
        ks: the strengths, rising.
        rule: as in `make_masks`.
        scores: as in `make_masks`.
        prunable: as in `make_masks`.
        stacked: as in `make_masks`; layers of a stack are pruned together.
        sites: as in `make_masks`.
        groups: by name, glob patterns of paths of what to prune together; None takes each prunable leaf alone. Leaves
            in no group stay dense.
        batch_size: with a number, evaluate so many groups at once by ``vmap``; `evaluate` must then be traceable.
        progress: whether to show a progress bar.

    Returns:
        A `Sensitivity`.

    Raises:
        TypeError: evaluate is no function or returns no number, ks are no list, scores no tree.
        ValueError: ks is empty, does not rise, or holds what the rule does not take, a group matches nothing or a leaf twice, the metric is NaN or no
            scalar; and whatever `make_masks` raises.

    Warns:
        UserWarning: the metric is higher at the largest k than for the unpruned parameters, as a loss is.

    >>> import jax.numpy as jnp
    >>> params = {"a": {"kernel": jnp.array([[1.0, 4.0]])}, "b": {"kernel": jnp.array([[2.0, 3.0]])}}
    >>> total = lambda params: sum(float(leaf.sum()) for leaf in jax.tree.leaves(params))
    >>> found = sensitivity(total, params, [0.5], rule=rules.layer_sparsity)
    >>> found.groups, found.dense, found.metric.tolist(), found.together.tolist()
    (('a/kernel', 'b/kernel'), 10.0, [[9.0], [8.0]], [7.0])

    Reference: Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural Networks", 2015,
    section 4 (sensitivity of each layer alone).
    """
    require_evaluate(evaluate, "sensitivity(evaluate, params, ks)")
    ks = _check_rising(ks, as_rule(rule))
    require_scores(scores)
    flat = read_params(params, prunable=prunable, stacked=stacked, sites=sites)
    members = _members(groups, flat)
    group_of = {i: g for g, leaves in enumerate(members.values()) for i in leaves}
    sizes = tuple(sum(flat.leaves[i].size for i in leaves) for leaves in members.values())
    everything = len(members)
    kept_whole = flat.build([i in group_of for i in range(len(flat.leaves))])

    @jax.jit
    def make(params: Any, scores: Any, k: jax.Array) -> tuple[Any, jax.Array]:
        masks = make_masks(params, k, rule=rule, scores=scores, prunable=kept_whole, stacked=stacked, sites=sites)
        leaves = jax.tree.leaves(masks)
        gone = [mask_sparsity([leaves[i] for i in own], prunable=True) for own in members.values()]
        return masks, jnp.stack(gone)

    def prune(params: Any, masks: Any, group: jax.Array) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        pruned = [
            jnp.where(mask | ((group != group_of[i]) & (group != everything)), leaf, jnp.zeros_like(leaf))
            if i in group_of
            else leaf
            for i, (leaf, mask) in enumerate(zip(leaves, jax.tree.leaves(masks), strict=True))
        ]
        return jax.tree.unflatten(treedef, pruned)

    @jax.jit
    def evaluate_all(params: Any, masks: Any) -> jax.Array:
        points = jnp.arange(everything + 1)
        return jax.lax.map(lambda group: evaluate(prune(params, masks, group)), points, batch_size=batch_size)

    def prune_some(masks: Any, own: Sequence[int]) -> Any:
        # Leaf by leaf, so that a group costs what it holds and not what the whole model does.
        given, leaves = jax.tree.leaves(masks), list(flat.leaves)
        for i in own:
            leaves[i] = _prune_leaf(leaves[i], given[i])
        return flat.build(leaves)

    def metrics(masks: Any, k: float) -> list[float]:
        names = [*(f"{name} pruned at k = {k:g}" for name in members), f"everything pruned at k = {k:g}"]
        if batch_size is not None:
            return [as_metric(value, name) for value, name in zip(evaluate_all(params, masks), names, strict=True)]
        points = zip(names, [*members.values(), list(group_of)], strict=True)
        return [as_metric(evaluate(prune_some(masks, own)), name) for name, own in points]

    dense = as_metric(evaluate(params), "the unpruned parameters")
    measured, gone = [], []
    for k in tracked(ks, "sensitivity", progress):
        masks, removed = make(params, scores, jnp.float32(k))
        measured.append(metrics(masks, k))
        gone.append(np.asarray(removed, np.float64))
    metric, sparsity = np.asarray(measured).T, np.asarray(gone).T
    together_sparsity = np.asarray(sizes, np.float64) @ sparsity / max(1, sum(sizes))
    caution_rising(dense, metric[-1, -1], together_sparsity[-1], ks[-1])
    return Sensitivity(
        ks=ks,
        groups=tuple(members),
        paths=tuple(tuple(flat.paths[i] for i in leaves) for leaves in members.values()),
        sizes=sizes,
        dense=dense,
        metric=metric[:-1],
        sparsity=sparsity,
        together=metric[-1],
        together_sparsity=together_sparsity,
    )


@jax.jit
def _prune_leaf(leaf: Any, mask: Any) -> Any:
    return jnp.where(mask, leaf, jnp.zeros_like(leaf))


def as_metric(value: Any, what: str) -> float:
    """Read what `evaluate` returned; raise where it is not one number."""
    if isinstance(value, Mapping) and value:
        name = next(iter(value))
        raise TypeError(
            f"evaluate returned a dict of {', '.join(map(repr, value))} for {what}; it must return one number. Pass "
            f"lambda params: evaluate(params)[{name!r}], larger = better."
        )
    if value is None or isinstance(value, str | Mapping):
        hint = " Does it end without return?" if value is None else ""
        raise TypeError(
            f"evaluate returned {described(value)} for {what}; it must return one number, larger = better.{hint}"
        )
    if np.shape(value) != ():
        raise ValueError(f"evaluate returned an array of shape {np.shape(value)} for {what}; it must return a scalar.")
    number = float(value)
    if math.isnan(number):
        raise ValueError(f"evaluate returned NaN for {what}; a metric is a number, larger = better.")
    return number


def caution_rising(dense: float, pruned: float, share: float, k: float) -> None:
    """Warn where the metric is better with weights gone, by more than chance: it is a loss, most likely.

    What is negative is a loss negated already, which may fall where a network has not been trained.
    """
    if share > 0 and dense >= 0 and pruned - dense > _BY_CHANCE * abs(dense):
        caution(
            f"The metric rises as weights go: {dense:.4g} unpruned, {pruned:.4g} at k = {k:g} ({share:.0%} removed). Larger = "
            "better: of a loss, evaluate is to return the negative."
        )


def require_evaluate(evaluate: Any, call: str) -> None:
    """Raise a TypeError where what is to evaluate is no function."""
    if not callable(evaluate):
        raise TypeError(
            f"{call} was given {described(evaluate)} where the function evaluate belongs, which comes first."
        )


def _check_rising(ks: Sequence[float], rule: Rule) -> tuple[float, ...]:
    require_several(ks)
    found = tuple(map(float, ks))
    if not found or not all(map(math.isfinite, found)) or any(a >= b for a, b in itertools.pairwise(found)):
        raise ValueError(f"ks must be finite numbers that rise, at least one; got {list(ks)}.")
    for k in found:
        check_strength(k, rule, "ks")
    return found


def _members(groups: Any, flat: Params) -> dict[str, list[int]]:
    """Find for each group the positions of its leaves."""
    candidates = [i for i, fits in enumerate(flat.prunable) if fits and flat.leaves[i].size]
    if groups is None:
        return {flat.paths[i]: [i] for i in candidates}
    found: dict[str, list[int]] = {}
    for name, patterns in groups.items():
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        found[name] = [i for i in candidates if any(matches(pattern, flat.paths[i]) for pattern in patterns)]
        if not found[name]:
            raise ValueError(
                f"group {name!r} ({', '.join(map(repr, patterns))}) matches no prunable leaf; the paths are "
                f"{', '.join(flat.paths[i] for i in candidates)}."
            )
    owners: dict[int, str] = {}
    for name, leaves in found.items():
        for i in leaves:
            if i in owners:
                raise ValueError(f"{flat.names[i]} is in the groups {owners[i]!r} and {name!r}; a leaf has one.")
            owners[i] = name
    return found
