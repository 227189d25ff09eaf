"""What a function multiplies with its data, read from its jaxpr, and statistics of that data.

`jaxprune.find_sites`, `jaxprune.calibrate_norms` and `jaxprune.calibrate_grams` make what is here.
"""

from jaxprune.sites._calibrate import CalibrationWarning as CalibrationWarning
from jaxprune.sites._calibrate import Grams as Grams
from jaxprune.sites._calibrate import Norms as Norms
from jaxprune.sites._sites import Site as Site
from jaxprune.sites._sites import Sites as Sites
from jaxprune.sites._sites import Unresolved as Unresolved

__all__ = [name for name in dir() if not name.startswith("_")]
