"""Know, control or replace what dropout does.

Wei, Kakade and Ma, *The Implicit and Explicit Regularization Effects of Dropout* (ICML 2020), for PyTorch Lightning:
`ExplicitPenalty`, `ImplicitNoise` and `MiniBatchDropout` are callbacks for any Trainer, the mixins bring them with a
LightningModule, and `functional` is the same without Lightning.
"""

from lightning_dropreg import errors, functional
from lightning_dropreg.callbacks import (
    DivergenceDetector,
    DropoutDiagnostics,
    DropProbSchedule,
    ExplicitPenalty,
    ImplicitNoise,
    MaxNorm,
    MiniBatchDropout,
    MonteCarloDropout,
)
from lightning_dropreg.interception.handlers.attention import attention_dropout
from lightning_dropreg.interception.handlers.custom import drop
from lightning_dropreg.losses import recognize
from lightning_dropreg.mixins import ExplicitPenaltyMixin, ImplicitNoiseMixin, MiniBatchDropoutMixin
from lightning_dropreg.nn.pretraining import scale_pretrained_for_dropout

__all__ = [
    "DivergenceDetector",
    "DropProbSchedule",
    "DropoutDiagnostics",
    "ExplicitPenalty",
    "ExplicitPenaltyMixin",
    "ImplicitNoise",
    "ImplicitNoiseMixin",
    "MaxNorm",
    "MiniBatchDropout",
    "MiniBatchDropoutMixin",
    "MonteCarloDropout",
    "attention_dropout",
    "drop",
    "errors",
    "functional",
    "recognize",
    "scale_pretrained_for_dropout",
]

__version__ = "0.1.0"
