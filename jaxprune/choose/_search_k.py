"""The largest strength that a metric bears, or the smallest that meets a budget."""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import rules
from jaxprune._masks import apply_masks, make_masks, sparsity
from jaxprune._printing import Printable
from jaxprune._tree._axes import Stacked
from jaxprune._tree._prunable import Prunable
from jaxprune.algebra import count_kept
from jaxprune.choose._sensitivity import Evaluate, as_metric, caution_rising, require_evaluate
from jaxprune.rules._layers import check_strength
from jaxprune.rules._rule import AnyRule, Rule, as_rule
from jaxprune.scores._evidence import require_scores
from jaxprune.sites._sites import Sites

if TYPE_CHECKING:
    from jaxprune._tables import Table

# Of a Gaussian layer, four standard deviations leave one weight in 16,000.
_DEVIATIONS = 4.0


class Trial(NamedTuple):
    """One strength that `search_k` tried.

    Attributes:
        k: the strength.
        sparsity: the fraction that it removes of the prunable weights.
        value: the metric, or the cost where a budget was to be met.
        accepted: whether it is within what was asked for.
    """

    k: float
    sparsity: float
    value: float
    accepted: bool


class Strength(Printable, float):
    """A strength that knows how it was found: a float, to be used as k; prints as a table of what was tried.

    Attributes:
        tried: the trials, in their order.
        asked: what was asked for, in words.
        remarks: what the caller should know: where the metric did not fall steadily, say.
    """

    tried: tuple[Trial, ...]
    asked: str
    remarks: tuple[str, ...]

    def __new__(cls, k: float, tried: tuple[Trial, ...], asked: str, remarks: tuple[str, ...] = ()) -> "Strength":
        """Make the float."""
        found = super().__new__(cls, k)
        found.tried, found.asked, found.remarks = tried, asked, remarks
        return found

    def __getnewargs__(self) -> tuple[Any, ...]:
        """Return what pickle and copy make it from."""
        return float(self), self.tried, self.asked, self.remarks

    __repr__ = float.__repr__

    def table(self, *, full: bool = False) -> "Table":
        """Return the table that is printed; a row for each layer if it is to be `full`."""
        from jaxprune._tables import Table

        table = Table(full=full, title=f"k = {float(self):.6g}: {self.asked}", caption="\n".join(self.remarks) or None)
        for column in ("k", "sparsity", "found", ""):
            table.add_column(column, justify="right")
        for trial in sorted(self.tried):
            verdict = "chosen" if trial.k == self else "accepted" if trial.accepted else "refused"
            style = "bold" if trial.k == self else None
            table.add_row(f"{trial.k:.6g}", f"{trial.sparsity:.2%}", f"{trial.value:.6g}", verdict, style=style)
        return table


def search_k(
    evaluate: Evaluate | None,
    params: Any,
    *,
    max_drop: float | None = None,
    min_metric: float | None = None,
    budget: float | None = None,
    cost: Callable[[Any], Any] | None = None,
    rule: AnyRule = rules.std_threshold,
    scores: Any = None,
    prunable: Prunable = None,
    stacked: Stacked = None,
    sites: Sites | None = None,
    low: float = 0.0,
    high: float | None = None,
    steps: int = 16,
) -> Strength:
    """Find the largest k that keeps the metric within a tolerance, or the smallest that meets a budget.

    Exactly one of `max_drop`, `min_metric` and `budget` is given. For a metric, half of the steps look at strengths
    evenly spread from `low` to `high`, the others halve the gap between the largest one below which all are accepted
    and the next one, which is refused. So a metric that falls and rises again is seen, and said in `remarks`; the
    answer is the last accepted k before the first refused one. For a budget, all steps halve. Masks are made by one
    compiled program with k traced; jit what `evaluate` calls.

    Args:
        evaluate: pruned parameters to one number, larger = better (negate a loss); None where `budget` is given.
        params: a pytree of arrays.
        max_drop: how much lower than for the unpruned parameters the metric may be, >= 0, in the metric's unit.
        min_metric: the lowest metric accepted.
        budget: the highest cost accepted.
        cost: masks to a number that falls as k rises; None counts the weights kept of the prunable leaves. See
            `storage.stored_bytes`.
        rule: as in `make_masks`; its sparsity must rise with k.
        scores: as in `make_masks`.
        prunable: as in `make_masks`.
        stacked: as in `make_masks`.
        sites: as in `make_masks`.
        low: where the search begins.
        high: where it ends; None takes the largest k of the rule, or 4 where it has none.
        steps: how many strengths to try at most, >= 2.

    Returns:
        k, a float that also holds what was tried; prints as a table.

    Raises:
        ValueError: not exactly one aim is given, nothing between low and high meets it (the message says what can be
            had), the metric is NaN or no scalar, or low >= high.
        TypeError: evaluate is no function or returns no number, or scores are no tree.

    Warns:
        UserWarning: the metric is higher where most is removed than for the unpruned parameters, as a loss is.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.arange(1.0, 11.0)[None]}
    >>> k = search_k(lambda params: params["kernel"].sum(), params, max_drop=6.0, rule=rules.layer_sparsity)
    >>> float(sparsity(make_masks(params, k, rule=rules.layer_sparsity)))  # 1 + 2 + 3 may go
    0.30000001192092896
    """
    if sum(aim is not None for aim in (max_drop, min_metric, budget)) != 1:
        raise ValueError("search_k takes exactly one of max_drop=, min_metric= and budget=.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise ValueError(f"search_k takes steps >= 2, a whole number; got {steps!r}.")
    make = functools.partial(make_masks, rule=rule, prunable=prunable, stacked=stacked, sites=sites)
    require_scores(scores)
    high = _highest(as_rule(rule), high)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"search_k looks from low to high, low < high; got {low:g} and {high:g}.")
    for bound in (low, high):
        check_strength(bound, as_rule(rule), "search_k")
    which: dict[str, Any] = {"prunable": prunable, "stacked": stacked, "sites": sites}

    @jax.jit
    def prune_by(params: Any, scores: Any, k: jax.Array) -> tuple[Any, Any, jax.Array]:
        masks = make(params, k, scores=scores)
        return masks, apply_masks(params, masks), sparsity(masks, **which)

    def prune(k: float) -> tuple[Any, Any, jax.Array]:
        return prune_by(params, scores, jnp.float32(k))

    if budget is not None:
        return _within_budget(prune, cost, budget, float(low), high, steps, which)
    if evaluate is None:
        raise ValueError("search_k needs evaluate= for max_drop and min_metric.")
    require_evaluate(evaluate, "search_k(evaluate, params)")
    dense = as_metric(evaluate(params), "the unpruned parameters")
    least, asked = _least(dense, max_drop, min_metric)

    def attempt(k: float) -> Trial:
        _, pruned, gone = prune(k)
        value = as_metric(evaluate(pruned), f"the parameters pruned at k = {k:g}")
        # Metrics are computed in float32: what differs by its rounding is equal.
        return Trial(k, float(gone), value, value >= least or math.isclose(value, least, rel_tol=1e-6))

    found = _largest_accepted(attempt, float(low), high, steps, asked)
    most = max(found.tried, key=lambda trial: trial.sparsity)
    caution_rising(dense, most.value, most.sparsity, most.k)
    return found


def _least(dense: float, max_drop: float | None, min_metric: float | None) -> tuple[float, str]:
    if max_drop is not None:
        if not max_drop >= 0:
            raise ValueError(f"search_k takes max_drop >= 0, in the metric's unit; got {max_drop!r}.")
        return dense - max_drop, f"the metric is at most {max_drop:g} below {dense:.6g}"
    assert min_metric is not None
    if not min_metric <= dense:
        raise ValueError(f"min_metric={min_metric:g} is above the metric of the unpruned parameters, {dense:.6g}.")
    return min_metric, f"the metric is at least {min_metric:g} (unpruned {dense:.6g})"


def _largest_accepted(attempt: Callable[[float], Trial], low: float, high: float, steps: int, asked: str) -> Strength:
    tried = [attempt(float(k)) for k in np.linspace(low, high, max(2, steps // 2))]
    refused = [i for i, trial in enumerate(tried) if not trial.accepted]
    if refused and refused[0] == 0:
        best = max(tried, key=lambda trial: trial.value)
        raise ValueError(
            f"no k from {low:g} on is accepted ({asked}): k = {low:g} already gives {tried[0].value:.6g}; the best of "
            f"those tried is {best.value:.6g} at k = {best.k:g}. Allow more, or lower low=."
        )
    if not refused:
        return Strength(high, tuple(tried), asked, (f"Every k tried is accepted, up to high = {high:g}: look higher.",))
    good, bad = tried[refused[0] - 1], tried[refused[0]]
    while len(tried) < steps:
        trial = attempt((good.k + bad.k) / 2)
        tried.append(trial)
        good, bad = (trial, bad) if trial.accepted else (good, trial)
    again = [trial for trial in sorted(tried) if trial.accepted and trial.k > good.k]
    remarks = tuple(
        f"The metric is not steady: k = {trial.k:.4g} is accepted again ({trial.value:.6g})." for trial in again
    )
    return Strength(good.k, tuple(tried), asked, remarks)


def _within_budget(
    prune: Callable[[float], tuple[Any, Any, jax.Array]],
    cost: Callable[[Any], Any] | None,
    budget: float,
    low: float,
    high: float,
    steps: int,
    which: dict[str, Any],
) -> Strength:
    def attempt(k: float) -> Trial:
        masks, _, gone = prune(k)
        value = count_kept(masks, **which) if cost is None else float(cost(masks))
        return Trial(k, float(gone), value, value <= budget)

    asked = f"a cost of at most {budget:,.6g}"
    tried = [attempt(low), attempt(high)]
    first, last = tried
    if first.accepted:
        return Strength(low, tuple(tried), asked, (f"low = {low:g} meets the budget already.",))
    if not last.accepted:
        raise ValueError(
            f"no k up to {high:g} meets a budget of {budget:,.6g}: k = {high:g} still costs {last.value:,.6g} "
            f"({last.sparsity:.2%} removed). Raise the budget to that, or high=."
        )
    bad, good = first, last
    while len(tried) < steps:
        trial = attempt((bad.k + good.k) / 2)
        tried.append(trial)
        bad, good = (bad, trial) if trial.accepted else (trial, good)
    return Strength(good.k, tuple(tried), asked)


def _highest(rule: Rule, high: float | None) -> float:
    """Where the search ends: at the largest k of a fraction, or where multiples of a statistic leave almost nothing."""
    if not rule.rises:
        raise ValueError(f"search_k takes a rule of which a larger k removes more; {rule.name} keeps more.")
    if high is not None:
        return float(high)
    return rule.high if math.isfinite(rule.high) else _DEVIATIONS
