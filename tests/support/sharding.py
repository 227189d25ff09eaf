"""What a compiled program does across devices."""

import math
import re

_OPERATION = re.compile(r"= (?P<type>\([^)]*\)|\S+) (?P<name>[a-z][a-z-]*)\(")


def operations(compiled):
    """The operations of a compiled program: their name, and how many numbers their largest result holds."""
    for found in _OPERATION.finditer(compiled.as_text()):
        shapes = re.findall(r"\w\[([\d,]*)\]", found["type"])
        sizes = [math.prod(int(n) for n in shape.split(",") if n) for shape in shapes]
        yield found["name"].removesuffix("-start"), max(sizes, default=0)
