"""Pictures of pruning: matplotlib axes in, the same axes out.

::

    import matplotlib.pyplot as plt
    from jaxprune import plot

    plot.weights(params["dense"]["kernel"], threshold, plt.gca())

Every function takes the axes to draw into and returns them; none touches matplotlib's global state, and none imports it.
Colours and the look of axes are in `jaxprune.plot.style`.
"""

from jaxprune.plot import style as style
from jaxprune.plot._figures import accuracy as accuracy
from jaxprune.plot._figures import churn as churn
from jaxprune.plot._figures import mask as mask
from jaxprune.plot._figures import sensitivity_curves as sensitivity_curves
from jaxprune.plot._figures import sparsity_by_layer as sparsity_by_layer
from jaxprune.plot._figures import weights as weights

__all__ = [name for name in dir() if not name.startswith("_")]
