"""Pictures of pruning: matplotlib axes in, the same axes out.

::

    from jaxprune import plot

    plot.weights(params["dense"]["kernel"], threshold)
    plot.sparsity_by_layer(summary, axes)

Every function takes the axes to draw into and returns them, and then touches no global state of matplotlib; without axes it
draws into a new figure of pyplot, which a notebook shows. Text and lines can be read on white and on dark.
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
