"""What dropout regularizes, as metrics: each a pure function in `functional` and a small stateful class.

`MeanExplicitPenalty` and `NoiseScale` measure the two effects of dropout on a model; `LossJacobianSize` and
`LossHessianSize` are ``mu(W)`` and ``nu(W)`` of Theorem 4.1, and `LinearModelBound` has the terms of that bound.
"""

from lightning_dropreg.metrics import functional
from lightning_dropreg.metrics.bound import LinearModelBound
from lightning_dropreg.metrics.effects import MeanExplicitPenalty, NoiseScale
from lightning_dropreg.metrics.stability import LossHessianSize, LossJacobianSize

__all__ = [
    "LinearModelBound",
    "LossHessianSize",
    "LossJacobianSize",
    "MeanExplicitPenalty",
    "NoiseScale",
    "functional",
]
