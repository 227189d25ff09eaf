"""One option of each choice, some choices dropped with what they belong to, at the least price within budgets: an integer program."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# The share of the best price that is not searched for.
_GAP = 1e-6


class Choice(NamedTuple):
    """Of these options one is taken, unless what the choice belongs to is dropped.

    Attributes:
        prices: [options].
        costs: what each adds to what is spent of each budget, [options, budgets].
    """

    prices: np.ndarray
    costs: np.ndarray


class Drop(NamedTuple):
    """What can be dropped.

    Attributes:
        price: of dropping it.
        costs: what that adds to what is spent of each budget, [budgets]; mostly below 0.
        frees: the numbers of the choices that are no more made then, and neither priced nor paid.
        inside: the numbers of the drops that are dropped with it, and not by themselves.
    """

    price: float
    costs: np.ndarray
    frees: Sequence[int]
    inside: Sequence[int]


class Taken(NamedTuple):
    """What is best.

    Attributes:
        options: the number of the option taken of each choice; None where it is not made.
        dropped: which drops are.
    """

    options: list[int | None]
    dropped: list[bool]


def take(
    choices: Sequence[Choice], drops: Sequence[Drop], alike: Sequence[Sequence[int]], budgets: Sequence[float]
) -> Taken | None:
    """Return the options of the least price in all that the budgets allow; None where they allow none.

    Args:
        choices: of which each is made once.
        drops: what can be dropped.
        alike: numbers of choices that take the same option, of equally many, where they are made.
        budgets: how much may be spent; infinite for no limit.
    """
    from scipy import optimize, sparse  # takes longer to import than all of this package

    # A variable, 0 or 1, for each option of each choice, for each drop, for each option of choices that are alike.
    sizes = [len(choice.prices) for choice in choices]
    firsts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
    shared = [sizes[same[0]] for same in alike]
    shared_firsts = firsts[-1] + len(drops) + np.concatenate([[0], np.cumsum(shared)]).astype(int)
    number = int(shared_firsts[-1])
    rows: list[tuple[dict[int, float], float, float]] = []
    for n, (first, size) in enumerate(zip(firsts, sizes, strict=False)):
        gone = {int(firsts[-1]) + m: 1.0 for m, drop in enumerate(drops) if n in drop.frees}
        rows.append(({**dict.fromkeys(range(first, first + size), 1.0), **gone}, 1, 1))
    for m, drop in enumerate(drops):
        rows += [({int(firsts[-1]) + m: 1.0, int(firsts[-1]) + other: 1.0}, -np.inf, 1) for other in drop.inside]
    for first, size, same in zip(shared_firsts, shared, alike, strict=False):
        rows.append((dict.fromkeys(range(first, first + size), 1.0), 1, 1))
        rows += [({int(firsts[n]) + o: 1.0, int(first) + o: -1.0}, -np.inf, 0) for n in same for o in range(size)]
    nothing = np.zeros((sum(shared), len(budgets)))
    prices = np.concatenate([*(choice.prices for choice in choices), [drop.price for drop in drops], nothing[:, 0]])
    costs = np.concatenate([*(choice.costs for choice in choices), *(drop.costs[None] for drop in drops), nothing])
    # The solver's tolerances are absolute.
    price, cost = (np.maximum(np.abs(values).max(0), np.finfo(float).tiny) for values in (prices, costs))
    data = [(n, column, value) for n, (row, _, _) in enumerate(rows) for column, value in row.items()]
    at, columns, values = zip(*data, strict=True)
    one_of_each = sparse.csr_array((values, (at, columns)), shape=(len(rows), number))
    found = optimize.milp(
        prices / price,
        integrality=np.ones(number),
        bounds=optimize.Bounds(0, 1),
        constraints=[
            optimize.LinearConstraint(one_of_each, *zip(*((low, high) for _, low, high in rows), strict=True)),
            optimize.LinearConstraint((costs / cost).T, -np.inf, np.asarray(budgets) / cost),
        ],
        options={"mip_rel_gap": _GAP},
    )
    if found.x is None:
        if found.status == 2:
            return None
        raise RuntimeError(f"The integer program was not solved: {found.message}")
    each = [found.x[first : first + size] for first, size in zip(firsts, sizes, strict=False)]
    dropped = [bool(found.x[firsts[-1] + m] > 0.5) for m in range(len(drops))]
    return Taken([int(np.argmax(x)) if x.max() > 0.5 else None for x in each], dropped)
