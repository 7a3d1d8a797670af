"""Diagnoses as plain data, for checkpoints that load with ``weights_only=True``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lightning_dropreg.diagnostics.diagnosis import Diagnosis
from lightning_dropreg.diagnostics.effect import EffectReport
from lightning_dropreg.diagnostics.noise import NoiseReport
from lightning_dropreg.diagnostics.penalty import PenaltyReport
from lightning_dropreg.interception.sites import Site

__all__ = ["from_plain", "to_plain"]


def to_plain(diagnosis: Diagnosis) -> dict[str, Any]:
    """Take a diagnosis apart into dicts, tuples, tensors, numbers and strings.

    Args:
        diagnosis: What was measured.

    Returns:
        What `from_plain` takes.
    """
    return asdict(diagnosis)


def from_plain(state: Mapping[str, Any]) -> Diagnosis:
    """Put together what `to_plain` took apart.

    Args:
        state: The plain data.

    Returns:
        The diagnosis.
    """
    noise, penalty = state["noise"], state["penalty"]
    return Diagnosis(
        **{
            **state,
            "effect": _effect(state["effect"]),
            "noise": None if noise is None else NoiseReport(**noise),
            "sweep": tuple((drop_prob, _effect(effect)) for drop_prob, effect in state["sweep"]),
            "penalty": None if penalty is None else PenaltyReport(**penalty),
        }
    )


def _effect(state: Mapping[str, Any]) -> EffectReport:
    return EffectReport(**{**state, "sites": tuple(Site(**site) for site in state["sites"])})
