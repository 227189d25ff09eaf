"""Which weights of one matrix go: the rules that make sense within a matrix, applied to a block of its rows at a time."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from jaxprune._selection import _counts
from jaxprune._selection._counts import Count
from jaxprune._selection._largest import keep_largest
from jaxprune._tree._axes import Axes
from jaxprune.rules import _guard
from jaxprune.rules._layers import Layer, strengths
from jaxprune.rules._rule import AnyRule, Rule, as_rule

# A matrix of that many entries would need a Gram matrix of several petabytes or a single unit of its size.
_MOST = 2**32 - 1


class Pattern(NamedTuple):
    """A rule within matrices [inputs, outputs]: counts of the whole matrix or of each unit, or N of every M inputs.

    Attributes:
        rule: the rule itself, `rules.layer_sparsity`, `rules.row_sparsity` or ``rules.n_m(m)``.
    """

    rule: Rule

    @property
    def title(self) -> str:
        """The rule's name in messages."""
        return self.rule.name

    @property
    def group(self) -> int:
        """M of an N:M rule; 1 where the rule counts."""
        return self.rule.m

    @property
    def by_unit(self) -> bool:
        """Whether every output unit loses the same number of weights."""
        return self.rule.scope == "unit"

    @property
    def counts(self) -> bool:
        """Whether the strength is a sparsity and becomes a count."""
        return self.rule.counts

    def strength(self, k: Any, name: str, weights: Float[Array, "n inputs outputs"]) -> UInt32[Array, " n"]:
        """Turn the strength k of matrices [N, inputs, outputs] into what `choose` takes: a number for each.

        That is how many weights go of the whole matrix (or of each unit), never the last; or how many stay of a group.

        Args:
            k: a number, or an array of shape ``()`` or ``[N]``.
            name: of the leaf, for messages.
            weights: the matrices.
        """
        matrices, inputs, outputs = weights.shape
        layer = Layer("kernel", name, weights, Axes((0,), 1, (2,)))
        (k,) = strengths(k, [layer], self.rule)
        if self.counts:
            size = inputs if self.by_unit else inputs * outputs
            if size > _MOST:
                raise ValueError(f"{name} consists of matrices of {size:,} weights; at most {_MOST:,} are handled.")
            allowed = min(max(0, size - 1), _guard.most_removed(self.rule.max_sparsity, size))
            if isinstance(k, float) and round(k * size) > allowed:
                _guard.warn([f"  {name}: k = {k:g} asks for {round(k * size):,} of {size:,} to go"], self.title)
            number = _counts.minimum(_counts.rounded(k, size), _counts.from_int(allowed)).low
        else:
            if inputs % self.group:
                raise ValueError(
                    f"{self.title} groups weights by {self.group} along the inputs, but {name} has {inputs} of "
                    "them. Leave this parameter dense with prunable=..."
                )
            number = jnp.asarray(k).astype(jnp.uint32)
        return jnp.broadcast_to(number, (matrices,))

    def choose(
        self, scores: Float[Array, "rows outputs"], strength: UInt32[Array, ""], first: Any, inputs: int
    ) -> Bool[Array, "rows outputs"]:
        """Mask the lowest scores of some rows of a matrix, so that all blocks of rows together remove the exact count.

        Args:
            scores: larger = keep; infinite in rows beyond the last input, which are never masked.
            strength: of the matrix, from `strength`.
            first: the index of the first row within the matrix, a multiple of `group`; may be traced.
            inputs: the number of rows of the whole matrix.

        Returns:
            A mask of the scores, True = keep.
        """
        rows, _ = scores.shape
        if not self.counts:
            (mask,) = self.rule([Layer("kernel", "scores", scores, Axes((), 0, (1,)))], strength)
            return mask
        first = jnp.asarray(first, jnp.uint32)
        last = jnp.minimum(first + rows, inputs)
        # The first `r` of the rows lose floor(strength * r / inputs) entries, without a product beyond one word.
        each, rest = strength // inputs, strength % inputs
        removed = each * (last - first) + rest * last // inputs - rest * first // inputs
        none = jnp.zeros_like(removed)
        batch = (1,) if self.by_unit else ()
        return keep_largest(scores, Count(none, removed), batch=batch, magnitude=False)


def read_pattern(rule: AnyRule, method: str) -> Pattern:
    """Find out how a rule chooses within a matrix; raise a ValueError where it does not."""
    found = as_rule(rule)
    within = (found.counts and found.scope in ("layer", "unit")) or found.m > 1
    if not within or found.grain != "weight" or found.axis is not None:
        raise ValueError(
            f"{method} chooses weights within one matrix, by rules.layer_sparsity, rules.row_sparsity or rules.n_m(m), "
            f"without axis= (groups and units are those that the Gram matrix is of), not by {found.name}. To spread a "
            "sparsity over layers, give each its own k (k may be a tree prefix: see choose.allocate_by_loss)."
        )
    return Pattern(found)
