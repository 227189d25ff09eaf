"""Whether XLA's CPU compiler still has the older of its code generators, which compiles in half the time."""

from importlib.metadata import version

# Later releases do not know the flag, and stop at flags that they do not know.
HAS_OLDER_EMITTERS = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
