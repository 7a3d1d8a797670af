"""Instruments that show what dropout does to a model on one batch: no Lightning, a closure is enough.

`measure_effect` sets the true explicit effect beside its approximation, `measure_noise` the true gradient noise beside
its own, and `measure_penalty` is the penalty with the settings of a training run. A `Diagnosis` keeps them, `tables`
and `read` show them, and `lightning_dropreg.diagnostics.figures` draws them.
"""

from lightning_dropreg.diagnostics.diagnosis import Diagnosis, trusted
from lightning_dropreg.diagnostics.effect import EffectReport, measure_effect
from lightning_dropreg.diagnostics.noise import NoiseReport, measure_noise
from lightning_dropreg.diagnostics.penalty import PenaltyReport, measure_penalty
from lightning_dropreg.diagnostics.reading import Costs, read, recommend_strength
from lightning_dropreg.diagnostics.statistics import Interval
from lightning_dropreg.diagnostics.tables import show, tables

__all__ = [
    "Costs",
    "Diagnosis",
    "EffectReport",
    "Interval",
    "NoiseReport",
    "PenaltyReport",
    "measure_effect",
    "measure_noise",
    "measure_penalty",
    "read",
    "recommend_strength",
    "show",
    "tables",
    "trusted",
]
