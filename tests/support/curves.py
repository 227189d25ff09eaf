"""Sensitivity curves by hand."""

import numpy as np

from jaxprune.choose._sensitivity import Sensitivity

CURVES = Sensitivity(
    ks=(0.5, 1.0, 2.0),
    groups=("a/kernel", "b/kernel"),
    paths=(("a/kernel",), ("b/kernel",)),
    sizes=(300, 100),
    dense=0.9,
    metric=np.array([[0.9, 0.85, 0.5], [0.9, 0.9, 0.8]]),
    sparsity=np.array([[0.005, 0.4, 0.8], [0.2, 0.5, 0.9]]),
    together=np.array([0.9, 0.8, 0.4]),
    together_sparsity=np.array([0.05375, 0.425, 0.825]),
)
