"""What was given in place of what was asked for: models of frameworks, known by their classes; words for messages."""

import contextlib
import functools
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

# (where the class of all models of a framework lives, its name) -> what messages call one.
_MODELS = {
    ("flax.linen.module", "Module"): "Linen module",
    ("flax.nnx.module", "Module"): "NNX module",
    ("keras.src.layers.layer", "Layer"): "Keras model",
}
_APPLY = 'lambda params, x: model.apply({"params": params}, x)'
_BY_NAME = "{v.path: v.value for v in model.trainable_variables}"
_AS_FUNCTION = {
    "Linen module": f"Pass {_APPLY}.",
    "NNX module": "Pass lambda model, x: model(x), and the module itself as params.",
    "Keras model": (
        "Pass lambda params, x: model.stateless_call([params[v.path] for v in model.trainable_variables], "
        f"model.non_trainable_variables, x)[0], and as params {_BY_NAME}."
    ),
}
_AS_PARAMS = {
    "Linen module": 'It holds no parameters: pass those that its init returns, variables["params"].',
    "NNX module": "Pass its arrays, nnx.state(model, nnx.Param).",
    "Keras model": f"Pass its arrays by name, {_BY_NAME}.",
}
_BOUND = 'Pass the parameters that it is bound to: model, variables = bound.unbind(), then variables["params"].'
_ARRAYS = "Pass arrays only, for example eqx.filter(model, eqx.is_inexact_array) or nnx.state(model, nnx.Param)."
# What Flax raises where it finds no parameters in what its `apply` was given.
_NO_VARIABLES = (
    "ScopeCollectionNotFound",
    "ApplyScopeInvalidVariablesTypeError",
    "ApplyScopeInvalidVariablesStructureError",
)


def described(given: Any) -> str:
    """Say what something is: ``the string 'wanda'``, ``the function saliency``, ``a Linen module``, ``a dict``."""
    if given is None or isinstance(given, bool | int | float):
        return repr(given)
    if isinstance(given, str):
        return f"the string {given!r}"
    if inspect.isroutine(given):
        return f"the function {given.__name__}"
    kind = _model(given) or type(given).__name__
    if kind.endswith("s"):  # Norms, Grams, Sites
        return kind
    return f"{'an' if kind[0] in 'AEIOUaeiou' or kind.startswith('NNX') else 'a'} {kind}"


def takes(function: Any, *arguments: Any) -> bool:
    """Whether a function can be called with these arguments, as far as its signature is known."""
    signature = _signature(function)
    return signature is None or _binds(signature, arguments)


def require_instance(given: Any, kind: type, call: str, remedy: str) -> None:
    """Raise a TypeError unless an argument is of a class of this package; `call` shows the arguments in their order."""
    if not isinstance(given, kind):
        raise TypeError(f"{call} was given {described(given)} where {kind.__name__} belongs. {remedy}")


def instead_of(leaf: Any, *, alone: bool) -> str:
    """Say what to pass instead of a leaf of parameters that is no array, and may be all that was given."""
    kind = _model(leaf)
    if kind is not None:
        return _BOUND if kind == "Linen module" and getattr(leaf, "scope", None) is not None else _AS_PARAMS[kind]
    if alone and (inspect.isroutine(leaf) or isinstance(leaf, functools.partial)):
        return "The function comes first, then the parameters, as in find_sites(fn, params, x)."
    return _ARRAYS


@contextlib.contextmanager
def called_on(fn: Any, params: Any, inputs: Any) -> Iterator[None]:
    """Where a call ``fn(params, *inputs)`` fails for what was given to it, raise a TypeError that says what to give."""
    try:
        yield
    except Exception as error:
        advice = _advice(fn, params, inputs, error)
        if advice is None:
            raise
        raise TypeError(advice) from error


def _advice(fn: Any, params: Any, inputs: Any, error: Exception) -> str | None:
    if not callable(fn):
        return (
            f"fn is {described(fn)}, not a function (params, *inputs). The function comes first, then the parameters."
        )
    kind = _model(fn)
    if kind is not None:
        return f"fn is {described(fn)}, not a function (params, *inputs). {_AS_FUNCTION[kind]}"
    failure = type(error).__name__ if type(error).__module__ == "flax.errors" else None
    if failure in _NO_VARIABLES and isinstance(params, Mapping) and "params" not in params:
        return f"model.apply takes variables, and was given the parameters alone. Pass {_APPLY} for fn."
    if failure == "CallCompactUnboundModuleError":
        return f"fn calls a Linen module, which has no parameters of its own. Pass {_APPLY} for fn."
    signature = _signature(fn) if isinstance(error, TypeError) else None
    if signature is None or _binds(signature, (params, *inputs)):
        return None
    name, number = getattr(fn, "__name__", type(fn).__name__), len(inputs)
    pairs = (
        " A batch that is a tuple is several inputs: of pairs (x, y) give it x alone, as in [x for x, y in batches]."
        if number > 1
        else ""
    )
    return (
        f"fn is {name}{signature}, and was called as fn(params, *inputs) with {number} "
        f"input{'' if number == 1 else 's'}. Give as many as it takes, and bind all else with functools.partial.{pairs}"
    )


def _signature(fn: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError):  # what is written in C has none
        return None


def _binds(signature: inspect.Signature, arguments: tuple[Any, ...]) -> bool:
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def _model(given: Any) -> str | None:
    """The kind of model that something is; frameworks are told by name, since none is imported."""
    return next((_MODELS[at] for cls in type(given).__mro__ if (at := (cls.__module__, cls.__name__)) in _MODELS), None)
