"""Why an axis stays, in words for whoever wrote the function: what in it does that, and how to free the axis."""

from collections.abc import Callable

from jaxprune._jaxpr._equations import per_device


class Reason(str):
    """A reason that knows the place in the function; `place` is looked up when it is read, and empty where unknown.

    Attributes:
        renumbers: whether a cut does no more than to give the elements new numbers, by which they are chosen or told: it can
            be made by whoever passes these numbers.
    """

    _find: Callable[[], str]
    renumbers: bool

    def __new__(cls, text: str, find: Callable[[], str] = str, *, renumbers: bool = False) -> "Reason":
        """Make a reason of a text and of what finds the place."""
        reason = super().__new__(cls, text)
        reason._find, reason.renumbers = find, renumbers
        return reason

    @property
    def place(self) -> str:
        """The place: file, line, function."""
        return self._find()

    def __add__(self, more: str) -> "Reason":
        """Say more at the same place."""
        return Reason(str(self) + more, self._find)


def of_input(name: str, axis: int) -> str:
    """Say that an input lies along an axis."""
    return (
        f"an input: axis {axis} of {name} lies along it and keeps its size; a parameter that maps the two frees it, and for "
        "state that is passed in see prunable_inputs="
    )


def of_output(name: str, axis: int) -> str:
    """Say that an output lies along an axis."""
    why = (
        f"an output: axis {axis} of {name} lies along it and keeps its size; for passed-on state see prunable_outputs="
    )
    return Reason(why, renumbers=True)


def only_renumbers(reason: str | None) -> bool:
    """Whether a cut would only give elements new numbers."""
    return isinstance(reason, Reason) and reason.renumbers


def no_rule(primitive: str) -> str:
    """Say that nothing is known of a primitive."""
    return per_device(primitive) or (
        f"{primitive} has no rule, what it does along its axes is not known; write it in operations of jax.numpy"
    )


def runs_along(primitive: str) -> str:
    """Say that each element depends on those before it."""
    return f"{primitive} runs along it, so that results depend on all of its elements in order; let it run along another axis"


def numbers(primitive: str) -> str:
    """Say that a result holds numbers of elements."""
    return f"{primitive} numbers its elements, and a cut renumbers them; take it outside of the traced function"


def unaligned(left: str, right: str) -> str:
    """Say that two ways to divide an axis contradict each other; to be put behind the name of what relates them."""
    return (
        f": {left} and {right} do not align, so it is not known which elements belong together; split where one divides "
        "the other, as heads times their size"
    )


SINGLE = (
    "a part of one entry, put in front or sliced off (a class token, x[:1]): there is nothing in it to cut, and it holds "
    "no other part back"
)
UNUSED = "the function does not use it: no output depends on it; leave it out of params, or return what it is for"
UNREAD = (
    "no other parameter and no layer has to do with it, as with the rows of a table that are beyond those that the function "
    "reads: longer inputs may need them; leave them out of params"
)
CHOSEN = (
    "elements are chosen by an index that is known only at run time, so each may be needed; slices with fixed bounds "
    "(x[:, 2:5]) leave it free"
)
COMPARED = (
    "elements are chosen by their number (arange compared with something, as in one_hot), and a cut renumbers them; "
    "choose by a slice or a mask that is an argument"
)
DEALT = (
    "rows are dealt out along it (ragged_dot) by sizes that may be more than 0 for what top_k or argmax did not choose; count what "
    "they chose: jnp.bincount(experts.reshape(-1), length=number_of_experts)"
)
WINDOW = "the window of a convolution keeps its size; give the layer a smaller kernel instead"
CONVOLVED = "a convolution runs along it and mixes neighbours; it is free where window and stride are 1"
POOLED = "a window runs along it and mixes neighbours (pooling); pool along other axes"
IMAGE_GROUPS = "a convolution with groups of images, as gradients have; take gradients outside of the traced function"
SCANNED = (
    "a scan runs along it that carries nothing, or takes no parameter apart: its steps are no layers; carry the data "
    "from step to step over stacked parameters"
)
STACKED = (
    "a stack has one entry for each array given to it, and the function names each; concatenate along an axis of theirs"
)
UNSTACKED = "entries are taken one by one (x[0], a loop over x, unpacking), and the function names each; scan over it"
STRIDED = "a strided slice (x[::n]) takes so many elements that its steps do not divide the axis; take all, or one in n of a multiple"
ONE_IN = (
    "a strided slice (x[::n]) takes one of so many elements, and the others are not used; leave those out of params"
)
EMPTY_SLICE = "an empty slice is taken of it; leave out the slice"
EMPTY = "an empty array is reshaped; leave it out"
PADDED = "padding between elements, or less than none (dilation, cropping); pad at its ends, or crop by a slice"
REVERSED = "reversed: the last becomes the first, whatever is cut; reverse another axis"
KEY_WORDS = "the words of a random key"
