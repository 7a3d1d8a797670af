"""What a user adds to a `lightning.Trainer`; what runs a fit with them is `lightning_dropreg.session`."""

from lightning_dropreg.callbacks.audit import DropoutAudit
from lightning_dropreg.callbacks.detector import DivergenceDetector
from lightning_dropreg.callbacks.diagnostics import DropoutDiagnostics
from lightning_dropreg.callbacks.drop_prob_schedule import DropProbSchedule
from lightning_dropreg.callbacks.explicit_penalty import ExplicitPenalty
from lightning_dropreg.callbacks.implicit_noise import ImplicitNoise
from lightning_dropreg.callbacks.max_norm import MaxNorm
from lightning_dropreg.callbacks.minibatch_dropout import MiniBatchDropout
from lightning_dropreg.callbacks.monte_carlo import MonteCarloDropout, MonteCarloPrediction
from lightning_dropreg.callbacks.place_dropout import PlaceDropout
from lightning_dropreg.callbacks.r_drop import RDrop

__all__ = [
    "DivergenceDetector",
    "DropProbSchedule",
    "DropoutAudit",
    "DropoutDiagnostics",
    "ExplicitPenalty",
    "ImplicitNoise",
    "MaxNorm",
    "MiniBatchDropout",
    "MonteCarloDropout",
    "MonteCarloPrediction",
    "PlaceDropout",
    "RDrop",
]
