"""The hyperparameters of the module that has the shapes of smaller parameters."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

import jax
import numpy as np
from jax.tree_util import keystr

from jaxprune._tree._paths import flatten, read_arrays
from jaxprune._tree._shapes import Shapes

Axis = tuple[str, int]
Values = dict[int, int]  # of hyperparameters, by their numbers; what is not named is as given


def recover(init: Callable[..., Any], hyperparameters: Mapping[str, Any], small: Any) -> dict[str, Any]:
    """Find the hyperparameters with which a module has the shapes of smaller parameters: its features, its heads.

    Each integer is changed once to see which axes follow it; then it is solved for what these axes became. Where an
    axis follows several (a head's size follows ``qkv_features`` and ``num_heads``), those that other axes determine
    come first. Layers that `small` lacks altogether give the number of layers.

    No answer is wrong in a shape: those of the answer are compared with `small`, one by one. What shows in no shape
    (the groups of a normalisation layer) stays; so compare the outputs as well, with `verify_module`. Of values that
    rounding makes alike, one is returned.

    Args:
        init: ``init(**hyperparameters)`` returns the parameters of the original module, in a tree with the paths of
            `small`: of Linen, ``lambda **h: CNN(**h).init(key, x)``; of NNX,
            ``lambda **h: nnx.state(CNN(**h, rngs=nnx.Rngs(0)), nnx.Param)``. It is traced, not run, two or three times
            for each integer; a value for which it raises is passed over.
        hyperparameters: of the original module, integers or tuples, lists and dicts of them; anything else in it
            (strings, functions, floats, booleans, None) stays. What must not change, such as a size that only its
            product with another one shows, belongs into `init`.
        small: the parameters after `shrink`, arrays or ShapeDtypeStructs; batch statistics may be among them.

    Returns:
        The hyperparameters, in the same structure.

    Raises:
        ValueError: no values give these shapes, with an axis that shows it, or more than one choice does; the trees
            have other paths. What `init` raises for `hyperparameters` as they are is passed on.

    >>> import jax.numpy as jnp
    >>> def init(features, heads):
    ...     return {"up": jnp.ones((3, features)), "query": jnp.ones((features, heads, features // heads))}
    >>> small = {"up": jnp.ones((3, 12)), "query": jnp.ones((12, 3, 4))}
    >>> recover(init, {"features": 16, "heads": 4}, small)
    {'features': 12, 'heads': 3}
    """
    search = _Search.start(init, hyperparameters, small)
    answers = search.answers({})
    if not answers:
        raise ValueError(search.reason())
    if len(answers) > 1:
        either = " or ".join(search.describe(answer) for answer in answers)
        raise ValueError(
            f"More than one choice gives the shapes of small: {either}. They need not compute the same; "
            "pass what shall stay in init, not among the hyperparameters."
        )
    return search.fill(answers[0])


@dataclasses.dataclass(frozen=True, eq=False)
class _Search:
    """What is known of a constructor.

    Attributes:
        init: the constructor.
        leaves: the hyperparameters, flat.
        treedef: their structure.
        names: of the integers among them, by their numbers.
        before: the shapes that they give.
        after: the shapes that are wanted.
        follows: which integers change an axis.
        tried: the shapes that other values give, or what they raise.
    """

    init: Callable[..., Any]
    leaves: list[Any]
    treedef: Any
    names: dict[int, str]
    before: Shapes
    after: Shapes
    follows: dict[Axis, set[int]] = dataclasses.field(default_factory=dict)
    tried: dict[frozenset[tuple[int, int]], Shapes | Exception] = dataclasses.field(default_factory=dict)

    @classmethod
    def start(cls, init: Callable[..., Any], hyperparameters: Mapping[str, Any], small: Any) -> "_Search":
        """Change every integer once."""
        entries, treedef = jax.tree_util.tree_flatten_with_path(dict(hyperparameters))
        leaves = [int(leaf) if _is_integer(leaf) else leaf for _, leaf in entries]
        names = {
            number: f"{path[0].key}{keystr(path[1:])}"
            for number, (path, leaf) in enumerate(entries)
            if _is_integer(leaf)
        }
        made = flatten(jax.eval_shape(lambda: init(**hyperparameters)), "the result of init")
        given = read_arrays(small, "small")
        search = cls(init, leaves, treedef, names, made.shapes, given.shapes)
        if search.after.keys() < search.before.keys():
            return cls.start(init, search.shorter(), small)
        made.aligned(given)
        for path, shape in search.before.items():
            if len(shape) != len(search.after[path]):
                raise ValueError(f"small has {path} of shape {search.after[path]}; init makes it in shape {shape}.")
            search.follows.update(((path, axis), set()) for axis in range(len(shape)))
        for number in names:
            search.follow(number)
        return search

    def shorter(self) -> dict[str, Any]:
        """Return the hyperparameters with a smaller number of layers, so that there are no others than wanted."""
        for number in self.names:
            for value in range(self.leaves[number] - 1, 0, -1):
                shapes = self.shapes({number: value})
                if shapes is None or shapes.keys() == self.before.keys():
                    break
                if shapes.keys() == self.after.keys():
                    return self.fill({number: value})
        missing = next(path for path in self.before if path not in self.after)
        raise ValueError(
            f"small has no {missing}, and no hyperparameter leaves out just what it lacks. "
            "Of layers that a module numbers, the last ones must go, and all of their parameters."
        )

    def follow(self, number: int) -> None:
        """Note which axes change with one hyperparameter."""
        for value in _others(self.leaves[number]):
            shapes = self.shapes({number: value})
            if shapes is not None:
                for axis, found in self.follows.items():
                    if _size(shapes, axis) not in (None, _size(self.before, axis)):
                        found.add(number)
                return

    def shapes(self, values: Values) -> Shapes | None:
        """Return the shapes that some values give, or None where the constructor raises."""
        key = frozenset((number, value) for number, value in values.items() if value != self.leaves[number])
        if not key:
            return self.before
        if key not in self.tried:
            try:
                made = jax.eval_shape(lambda: self.init(**self.fill(values)))
                self.tried[key] = flatten(made, "the result of init").shapes
            except Exception as error:  # constructors raise anything where sizes do not fit each other
                self.tried[key] = error
        found = self.tried[key]
        return None if isinstance(found, Exception) else found

    def fill(self, values: Values) -> dict[str, Any]:
        """Return the hyperparameters with some values changed."""
        leaves = [values.get(number, leaf) for number, leaf in enumerate(self.leaves)]
        return dict(jax.tree.unflatten(self.treedef, leaves))

    def describe(self, values: Values) -> str:
        """Write the values that changed."""
        changed = [f"{self.names[n]}={value}" for n, value in sorted(values.items()) if value != self.leaves[n]]
        return ", ".join(changed) or "none changed"

    def answers(self, values: Values) -> list[Values]:
        """Return all choices found, given some of them."""
        values, _ = self.determined(values)
        wrong = self.wrong(values)
        if wrong is None:
            return [values] if self.shapes(values) == self.after else []
        found: list[Values] = []
        for number in sorted(self.follows[wrong] - set(values)):
            value = self.value(wrong, number, values)
            for answer in [] if value is None else self.answers({**values, number: value}):
                if self.fill(answer) not in [self.fill(other) for other in found]:
                    found.append(answer)
        return found

    def determined(self, values: Values) -> tuple[Values, dict[int, Axis]]:
        """Return what follows from axes that depend on one unknown only, and which axis each follows from."""
        values, sources = dict(values), {}
        while (step := next(self.steps(values), None)) is not None:
            axis, number = step
            value = self.value(axis, number, values)
            values[number] = self.leaves[number] if value is None else value
            sources[number] = axis
        return values, sources

    def steps(self, values: Values) -> Iterator[tuple[Axis, int]]:
        """Yield axes that depend on one unknown: on little else, changed, of large arrays first."""

        def rank(axis: Axis) -> tuple[int, bool, int]:
            return len(self.follows[axis]), not self.changed(axis), -len(self.before[axis[0]])

        for axis in sorted((axis for axis in self.follows if self.follows[axis]), key=rank):
            unknown = self.follows[axis] - set(values)
            if len(unknown) == 1:
                yield axis, unknown.pop()

    def value(self, axis: Axis, number: int, values: Values) -> int | None:
        """Return the value of one hyperparameter that gives an axis its size, given others; its old value if it can.

        Sizes are taken to be proportional, linear or inverse between two values that were tried; what this predicts is
        tried in turn.
        """
        # Hyperparameters that do not concern this axis are as given: theirs may not be known yet.
        given = {other: values[other] for other in self.follows[axis] if other in values and other != number}
        target = self.after[axis[0]][axis[1]]
        points: dict[int, int] = {}
        start = self.leaves[number]
        for tried in (start, *_others(start, math.prod(given.values()))):
            shapes = self.shapes({**given, number: tried})
            size = None if shapes is None else _size(shapes, axis)
            if size == target:
                return tried
            if size is not None and size not in points.values():
                points[tried] = size
            if len(points) == 2:
                break
        while len(points) > 1:
            first, second = list(points.items())[-2:]
            predicted = _predict(first, second, target)
            guess = None if predicted is None else round(predicted)
            if guess is None or guess in points or guess < min(start, 1):
                return None
            shapes = self.shapes({**given, number: guess})
            if shapes is None:  # it need not fit before another one has changed
                return guess if guess == predicted else None
            size = _size(shapes, axis)
            if size is None or size == target:
                return guess
            points[guess] = size
        return None

    def changed(self, axis: Axis) -> bool:
        """Whether an axis was cut."""
        return self.before[axis[0]][axis[1]] != self.after[axis[0]][axis[1]]

    def wrong(self, values: Values) -> Axis | None:
        """Return an axis that has another size than wanted; what nothing changes, and of large arrays, first."""
        shapes = self.shapes(values)
        if shapes is None:
            return None
        axes = [axis for axis in self.follows if _size(shapes, axis) != self.after[axis[0]][axis[1]]]
        return min(axes, key=lambda axis: (bool(self.follows[axis]), -len(self.before[axis[0]])), default=None)

    def reason(self) -> str:
        """Say why there is no answer."""
        values, sources = self.determined({})
        axis = self.wrong(values)
        if axis is None:
            key = frozenset((n, value) for n, value in values.items() if value != self.leaves[n])
            return (
                f"The sizes of small's axes ask for {self.describe(values)}, with which init "
                f"{f'raises {self.tried[key]!r}' if isinstance(self.tried.get(key), Exception) else 'has other paths'}."
            )
        size = f"{_name(axis)} has {self.kept(axis)} elements"
        numbers = sorted(self.follows[axis])
        if not numbers:
            return f"{size}, which no hyperparameter changes. Make it an argument of the module, or do not cut it."
        if numbers == [number for number in numbers if sources.get(number, axis) != axis]:
            if len(numbers) == 1:
                other = sources[numbers[0]]
                return (
                    f"{_name(other)} and {_name(axis)} share {self.names[numbers[0]]}={self.leaves[numbers[0]]}, but "
                    f"have {self.kept(other)} and {self.kept(axis)} elements. Give the module a hyperparameter for "
                    "each, or cut both alike."
                )
            asked = [f"{self.names[n]}={values[n]} (which {_name(sources[n])} asks for)" for n in numbers]
            return f"{size}, but follows {' and '.join(asked)}. Give the module another hyperparameter, or cut alike."
        named = [f"{self.names[number]}={self.leaves[number]}" for number in numbers]
        return f"{size}, which no other value of {' or '.join(named)} alone gives."

    def kept(self, axis: Axis) -> str:
        """Write how much of an axis stays."""
        path, number = axis
        return f"{self.after[path][number]} of {self.before[path][number]}"


def _is_integer(leaf: Any) -> bool:
    return type(leaf) is int or isinstance(leaf, np.integer)


def _size(shapes: Shapes, axis: Axis) -> int | None:
    """Return the size of an axis, or None where there is no such axis."""
    path, number = axis
    shape = shapes.get(path, ())
    return shape[number] if number < len(shape) else None


def _name(axis: Axis) -> str:
    return f"{axis[0]}[{axis[1]}]"


def _others(value: int, divisor: int = 1) -> list[int]:
    """Return values to try in the place of one: some share its divisors, some are multiples of another number."""
    near = [2 * value, value // 2, value + 1, 3 * value, value - 1, 1]
    multiples = [divisor * (value // divisor), divisor * (value // divisor + 1)] if divisor > 1 else []
    return [other for other in dict.fromkeys(near + multiples) if other != value and other >= min(value, 1)]


def _predict(first: tuple[int, int], second: tuple[int, int], target: int) -> Fraction | None:
    """Return where a size reaches a target, if it goes on as between two points ``(value, size)``."""
    (a, size_a), (b, size_b) = first, second
    if a * size_a == b * size_b:
        return Fraction(a * size_a, target) if target else None
    return a + Fraction((target - size_a) * (b - a), size_b - size_a)
