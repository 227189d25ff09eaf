"""One-shot methods for a language model: what each is given, and what it returns."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import jaxprune
from jaxprune import rules, scores
from jaxprune.oneshot import Quantized

GROUP = 64  # of inputs that share a scale, where weights are stored in 4 bits or rounded by GPTQ


class Pattern(NamedTuple):
    """What to remove: a strength, the rule that reads it, and the same where every output unit is to lose as much."""

    k: float
    rule: Any
    by_unit: Any


PATTERNS = {
    **{f"{100 * k:g} %": Pattern(k, rules.layer_sparsity, rules.row_sparsity) for k in (0.5, 0.6, 0.7)},
    **{f"{n}:{m}": Pattern(n, rules.n_m(m), rules.n_m(m)) for n, m in ((2, 4), (4, 8))},
}


class Evidence(NamedTuple):
    """The model up to its head, the text it is calibrated on, what multiplies what in it, and what was measured of it.

    Norms and Gram matrices are None where no method asks for them; `bits` are those of a stored weight.
    """

    fn: Callable[[Any, jax.Array], jax.Array]
    batches: np.ndarray  # int32 [batches, BATCH_SIZE, length]
    sites: Any
    norms: Any
    grams: Any
    bits: int


# (params, evidence, pattern) -> params and masks, or with the integers that the weights were rounded to
Method = Callable[[Any, Evidence, Pattern], tuple[Any, Any] | Quantized]


def magnitude(params: Any, evidence: Evidence, pattern: Pattern) -> tuple[Any, Any]:
    """Remove the smallest weights of every layer."""
    masks = jaxprune.make_masks(params, pattern.k, rule=pattern.rule, sites=evidence.sites)
    return jaxprune.apply_masks(params, masks), masks


def wanda(params: Any, evidence: Evidence, pattern: Pattern) -> tuple[Any, Any]:
    """Remove the weights that contribute least to their unit's output."""
    found = scores.wanda(params, evidence.norms)
    masks = jaxprune.make_masks(params, pattern.k, rule=pattern.by_unit, scores=found, sites=evidence.sites)
    return jaxprune.apply_masks(params, masks), masks


def sparsegpt(params: Any, evidence: Evidence, pattern: Pattern) -> tuple[Any, Any]:
    """SparseGPT."""
    return jaxprune.oneshot.sparsegpt(params, evidence.grams, pattern.k, rule=pattern.rule, sites=evidence.sites)


def admm(params: Any, evidence: Evidence, pattern: Pattern) -> tuple[Any, Any]:
    """ADMM with a mask that tightens."""
    return jaxprune.oneshot.admm(params, evidence.grams, pattern.k, rule=pattern.rule, sites=evidence.sites)


def reconstructed(params: Any, evidence: Evidence, pattern: Pattern) -> tuple[Any, Any]:
    """Remove the smallest weights, and give those that stay their best values."""
    _, masks = magnitude(params, evidence, pattern)
    return jaxprune.oneshot.reconstruct(params, masks, evidence.grams), masks


def admm_in_sequence(params: Any, evidence: Evidence, pattern: Pattern) -> tuple[Any, Any]:
    """ADMM layer by layer: each matches the dense model's outputs on the inputs that the pruned one gives it."""
    solve = functools.partial(jaxprune.oneshot.admm, k=pattern.k, rule=pattern.rule)
    return jaxprune.oneshot.sequential(evidence.fn, params, evidence.batches, solve, sites=evidence.sites)


def in_one_pass(params: Any, evidence: Evidence, pattern: Pattern) -> Quantized:
    """SparseGPT and GPTQ in one pass: later weights make up for what is pruned and for what is rounded."""
    solve = functools.partial(jaxprune.oneshot.prune_and_quantize, rule=pattern.rule, sites=evidence.sites)
    return solve(params, evidence.grams, pattern.k, bits=evidence.bits, group_size=GROUP)


def rounded(method: Method, params: Any, evidence: Evidence, pattern: Pattern) -> Quantized:
    """Round by GPTQ what another method has pruned."""
    pruned, masks = method(params, evidence, pattern)
    solve = functools.partial(jaxprune.oneshot.gptq, bits=evidence.bits, group_size=GROUP, sites=evidence.sites)
    return solve(pruned, evidence.grams, masks=masks)


def rounded_in_sequence(params: Any, evidence: Evidence, pattern: Pattern) -> Quantized:
    """ADMM and GPTQ layer by layer: each also makes up for what was rounded before it."""

    def solve(params: Any, grams: Any, *, prunable: Any) -> Quantized:
        found, masks = jaxprune.oneshot.admm(params, grams, pattern.k, rule=pattern.rule, prunable=prunable)
        solve = functools.partial(jaxprune.oneshot.gptq, bits=evidence.bits, group_size=GROUP, prunable=prunable)
        return solve(found, grams, masks=masks)

    return jaxprune.oneshot.sequential(evidence.fn, params, evidence.batches, solve, sites=evidence.sites)


METHODS: dict[str, Method] = {
    "magnitude": magnitude,
    "Wanda": wanda,
    "SparseGPT": sparsegpt,
    "reconstructed": reconstructed,
    "ADMM": admm,
    "ADMM in sequence": admm_in_sequence,
    "SparseGPT with GPTQ": in_one_pass,
    "SparseGPT then GPTQ": functools.partial(rounded, sparsegpt),
    "ADMM then GPTQ": functools.partial(rounded, admm),
    "ADMM with GPTQ in sequence": rounded_in_sequence,
}
ROUNDING = {name for name in METHODS if "GPTQ" in name}
BY_NORMS = {"Wanda"}
BY_GRAMS = METHODS.keys() - BY_NORMS - {"magnitude", "ADMM in sequence", "ADMM with GPTQ in sequence"}
