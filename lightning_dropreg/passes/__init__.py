"""A pass: the user's step, run once with a chosen rule wherever it drops something (its dropout sites)."""

from lightning_dropreg.passes.directions import Directions
from lightning_dropreg.passes.rules import (
    Drop,
    Off,
    Perturb,
    PerturbSome,
    Tangent,
    Tap,
    TappedTangent,
    draws_of_dropout,
    focus,
)
from lightning_dropreg.passes.run import Closure, Pass, dormant_sites, is_dormant, run_pass

__all__ = [
    "Closure",
    "Directions",
    "Drop",
    "Off",
    "Pass",
    "Perturb",
    "PerturbSome",
    "Tangent",
    "Tap",
    "TappedTangent",
    "dormant_sites",
    "draws_of_dropout",
    "focus",
    "is_dormant",
    "run_pass",
]
