"""Scores: parameters, and evidence, to a tree of numbers that says how much each weight matters.

Every score returns the treedef of `params` in float32 (float64 stays), larger = keep. Evidence (gradients,
statistics) is a tree with the same paths; its containers may be of other classes. A leaf that has no
score, since it is not floating-point or multiplies no data, is None. A NaN weight, or one whose evidence is NaN, scores minus infinity: it goes first.
All work under ``jit`` and ``vmap`` and on sharded arrays; the scores are sharded like the parameters.
"""

from jaxprune.scores._channels import batch_norm_scale as batch_norm_scale
from jaxprune.scores._channels import channel_norm as channel_norm
from jaxprune.scores._channels import fpgm as fpgm
from jaxprune.scores._gradients import fisher as fisher
from jaxprune.scores._gradients import gradient as gradient
from jaxprune.scores._gradients import grasp as grasp
from jaxprune.scores._gradients import movement as movement
from jaxprune.scores._gradients import saliency as saliency
from jaxprune.scores._gradients import snip as snip
from jaxprune.scores._obs import obs as obs
from jaxprune.scores._synflow import synflow as synflow
from jaxprune.scores._wanda import ria as ria
from jaxprune.scores._wanda import wanda as wanda
from jaxprune.scores._weights import lamp as lamp
from jaxprune.scores._weights import magnitude as magnitude
from jaxprune.scores._weights import random as random

__all__ = [name for name in dir() if not name.startswith("_")]
