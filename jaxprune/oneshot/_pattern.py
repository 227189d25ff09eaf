"""Which weights of one matrix go: the rules that make sense within a matrix, applied to a block of its rows at a time."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from jaxprune import rules
from jaxprune._selection import _counts
from jaxprune._selection._counts import Count
from jaxprune._selection._largest import keep_largest
from jaxprune.rules import _guard
from jaxprune.rules._layers import Layer, strengths
from jaxprune.rules._rule import Rule

# The sizes of groups that are looked for when a rule may be `rules.n_m`.
_MAX_GROUP = 64
# A matrix of that many entries would need a Gram matrix of several petabytes or a single unit of its size.
_MOST = 2**32 - 1


class Pattern(NamedTuple):
    """A rule within matrices [inputs, outputs]: counts of the whole matrix or of each unit, or N of every M inputs.

    Attributes:
        rule: the rule itself.
        title: the rule's name in messages.
        group: M of an N:M rule; 1 where the rule counts.
        by_unit: whether every output unit loses the same number of weights.
    """

    rule: Rule
    title: str
    group: int
    by_unit: bool

    @property
    def counts(self) -> bool:
        """Whether the strength is a sparsity and becomes a count."""
        return self.group == 1

    def strength(self, k: Any, layer: Layer) -> UInt32[Array, " n"]:
        """Turn the strength k of a layer of matrices [N, inputs, outputs] into what `choose` takes: a number for each.

        That is how many weights go of the whole matrix (or of each unit), never the last; or how many stay of a group.
        """
        matrices, inputs, outputs = layer.values.shape
        (k,) = strengths(k, [layer], self.title, *((0.0, 1.0) if self.counts else (1, self.group)))
        if self.counts:
            size = inputs if self.by_unit else inputs * outputs
            if size > _MOST:
                raise ValueError(
                    f"{layer.name} consists of matrices of {size:,} weights; at most {_MOST:,} are handled."
                )
            if isinstance(k, float) and round(k * size) > max(0, size - 1):
                _guard.warn([f"  {layer.name}: k = {k:g} asks for all weights to go"], self.title)
            number = _counts.minimum(_counts.rounded(k, size), _counts.from_int(max(0, size - 1))).low
        else:
            if inputs % self.group:
                raise ValueError(
                    f"{self.title} groups weights by {self.group} along the inputs, but {layer.name} has {inputs} of "
                    "them. Leave this parameter dense with prunable=..."
                )
            if isinstance(k, float) and k != int(k):
                raise ValueError(
                    f"{self.title} keeps a whole number of every {self.group} weights, not k = {k} ({layer.name})."
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
            (mask,) = self.rule([Layer("kernel", "scores", scores)], strength)
            return mask
        first = jnp.asarray(first, jnp.uint32)
        last = jnp.minimum(first + rows, inputs)
        # The first `r` of the rows lose floor(strength * r / inputs) entries, without a product beyond one word.
        each, rest = strength // inputs, strength % inputs
        removed = each * (last - first) + rest * last // inputs - rest * first // inputs
        none = jnp.zeros_like(removed)
        batch = (1,) if self.by_unit else ()
        return keep_largest(scores, Count(none, removed), batch=batch, magnitude=False)


def read_pattern(rule: Rule, method: str) -> Pattern:
    """Find out how a rule chooses within a matrix; raise a ValueError where it does not."""
    if rule is rules.layer_sparsity:
        return Pattern(rule, "rules.layer_sparsity", 1, False)
    if rule is rules.row_sparsity:
        return Pattern(rule, "rules.row_sparsity", 1, True)
    # The same m gives the same function.
    for m in range(2, _MAX_GROUP + 1):
        if rules.n_m(m) is rule:
            return Pattern(rule, f"rules.n_m({m})", m, False)
    raise ValueError(
        f"{method} chooses weights within one matrix, by rules.layer_sparsity, rules.row_sparsity or rules.n_m(m) "
        f"with m <= {_MAX_GROUP} and without axis= (groups run along the inputs that the Gram matrix is of), not by {getattr(rule, '__name__', rule)!s}. To spread a sparsity over layers, give "
        "each its own k (k may be a tree prefix: see jaxprune.choose.allocate_by_loss)."
    )
