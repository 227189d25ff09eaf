"""A rule: a function ``(scores, k) -> masks`` that says what it is."""

import dataclasses
import functools
import importlib
import math
import sys
from collections.abc import Callable
from typing import Any, Literal

from jaxprune._tree._given import described

# A rule of any kind, your own among them: (scores, k) -> masks.
AnyRule = Callable[[Any, Any], Any]
# How far a rule looks to decide on one weight: its group of m, its output unit, its layer, or all layers.
Scope = Literal["group", "unit", "layer", "model"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A function ``(scores, k) -> masks``, and what may be asked of it; a value: hashable, and equal to its like.

    All rules of `jaxprune.rules` are of this class. ``functools.partial(rule, max_sparsity=0.9)`` is one with other
    settings (`as_rule` makes it one); so is ``dataclasses.replace``.

    Attributes:
        function: does the work, ``function(scores, k, **settings)``.
        name: what messages call it, ``rules.layer_sparsity``.
        scope: how far it looks: ``"group"``, ``"unit"``, ``"layer"`` or ``"model"``; None of a function of your own, of
            which that is not known.
        strength: what its k is, in words.
        low: the smallest k.
        high: the largest k; infinity where there is no bound.
        whole: whether k is a whole number.
        rises: whether a larger k removes more.
        grain: what it keeps or removes: single weights, channels or blocks.
        shares: how a rule that looks at the whole model shares out what goes: by one threshold for all scores, or by the
            layers' shapes alone; None of other rules.
        settings: keyword arguments of `function` by name, sorted.
    """

    function: Callable[..., Any]
    name: str
    scope: Scope | None = None
    strength: str = ""
    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    rises: bool = True
    grain: Literal["weight", "channel", "block"] = "weight"
    shares: Literal["threshold", "shapes"] | None = None
    settings: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        """Pass on the function's documentation and name."""
        for attribute in ("__doc__", "__module__", "__name__", "__qualname__"):
            object.__setattr__(self, attribute, getattr(self.function, attribute, getattr(Rule, attribute)))
        object.__setattr__(self, "__wrapped__", self.function)

    def __repr__(self) -> str:
        """Return its name, and the settings that the name does not say."""
        said = ("m", "rule", "norm", "reduce", "shape")
        settings = ", ".join(
            f"{name}={value!r}" for name, value in self.settings if name not in said and value is not None
        )
        return f"{self.name}[{settings}]" if settings else self.name

    def __call__(self, scores: Any, k: Any, **settings: Any) -> Any:
        """Make masks; settings given here go before those of the rule."""
        return self.function(scores, k, **{**dict(self.settings), **settings})

    def __reduce__(self) -> tuple[Any, ...]:
        """Let pickle find a function whose name stands for its rule: by that rule, and the settings."""
        module, name = self.function.__module__, self.function.__name__
        if isinstance(getattr(sys.modules.get(module), name, None), Rule):
            return _restored, (module, name, self.settings)
        return Rule, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def m(self) -> int:
        """The size of a group of an N:M rule; 1 of any other."""
        return int(dict(self.settings).get("m", 1))

    @property
    def max_sparsity(self) -> float:
        """The most that may be removed of any layer."""
        return float(dict(self.settings).get("max_sparsity", 1.0))

    @property
    def axis(self) -> Any:
        """The axis it was told to look along; None where it goes by the layer."""
        return dict(self.settings).get("axis")

    @property
    def counts(self) -> bool:
        """Whether its k is the fraction removed."""
        return (self.low, self.high) == (0.0, 1.0) and not self.whole

    @property
    def allowed(self) -> str:
        """Its k in a formula: ``0 <= k <= 1``."""
        return f"k >= {self.low:g}" if math.isinf(self.high) else f"{self.low:g} <= k <= {self.high:g}"


def as_rule(rule: AnyRule) -> Rule:
    """Return what a rule says of itself: a `Rule` as it is, one with other settings, or one of which nothing is known.

    Args:
        rule: a `Rule`; ``functools.partial`` of one with keyword arguments; or any function ``(scores, k) -> masks``.

    Returns:
        The rule.

    Raises:
        TypeError: it is no function, or one that makes rules (`n_m`, `channels`, `blocks`).

    >>> import functools
    >>> from jaxprune import rules
    >>> rule = as_rule(functools.partial(rules.global_sparsity, max_sparsity=0.95))
    >>> rule.name, rule.scope, rule.max_sparsity
    ('rules.global_sparsity', 'model', 0.95)
    """
    if isinstance(rule, Rule):
        return rule
    if isinstance(rule, functools.partial) and not rule.args:
        inner = as_rule(rule.func)
        settings = {**dict(inner.settings), **rule.keywords}
        return dataclasses.replace(inner, settings=tuple(sorted(settings.items(), key=lambda item: item[0])))
    if not callable(rule):
        named = (
            f"rules.{rule}" if isinstance(rule, str) and rule in _public() else "rules.layer_sparsity or rules.n_m(4)"
        )
        raise TypeError(
            f"a rule is a function (scores, k) -> masks, not {described(rule)}. Name the function: rule={named}."
        )
    if getattr(rule, "__annotations__", {}).get("return") in (Rule, "Rule"):
        name = getattr(rule, "__name__", repr(rule))
        raise TypeError(
            f"{name} makes a rule and is none itself. Call it: rule=rules.n_m(4), rules.channels(rules.layer_sparsity) or "
            "rules.blocks(rules.layer_sparsity, (16, 16))."
        )
    return Rule(rule, getattr(rule, "__name__", repr(rule)))


def _public() -> set[str]:
    return set(dir(importlib.import_module("jaxprune.rules")))


def _restored(module: str, name: str, settings: tuple[tuple[str, Any], ...]) -> Rule:
    rule: Rule = getattr(importlib.import_module(module), name)
    return dataclasses.replace(rule, settings=settings)


def says(**fields: Any) -> Callable[[Callable[..., Any]], Rule]:
    """Make a rule of a function of `jaxprune.rules` that says these things of itself."""

    def made(function: Callable[..., Any]) -> Rule:
        return Rule(function, f"rules.{function.__name__}", **fields)

    return made
