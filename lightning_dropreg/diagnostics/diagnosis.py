"""What was found on one batch, kept together, and whether the expansion is to be trusted there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_dropreg.diagnostics.effect import EffectReport
from lightning_dropreg.diagnostics.noise import NoiseReport
from lightning_dropreg.diagnostics.penalty import PenaltyReport
from lightning_dropreg.diagnostics.statistics import Interval
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.estimators.curvature import OF_OUTPUTS
from lightning_dropreg.interception.sites import Site

__all__ = ["TOLERANCE", "Diagnosis", "check_tolerance", "from_plain", "trusted"]

TOLERANCE = 0.2
"""How far ``R_approx`` may be from ``R_drop``, as a fraction of it, for the expansion to be trusted."""


@dataclass(frozen=True)
class Diagnosis:
    """The state of a model on one batch at one moment.

    Attributes:
        effect: The explicit effect.
        noise: The gradient noise, if it was measured.
        sweep: The explicit effect of all sites together with other drop probabilities, by drop probability.
        tolerance: See `trusted`.
        step: Optimizer steps taken before.
        epoch: Number of the epoch, from 0.
        penalty: The penalty that the model is trained with, if it is and was measured.
    """

    effect: EffectReport
    noise: NoiseReport | None = None
    sweep: tuple[tuple[float, EffectReport], ...] = ()
    tolerance: float = TOLERANCE
    step: int = 0
    epoch: int = 0
    penalty: PenaltyReport | None = None

    def metrics(self) -> dict[str, float]:
        """Return the numbers worth logging, each with the margin of its interval under ``<name>_margin``.

        Returns:
            Values by name, for example ``r_drop``, ``r_approx``, ``r_drop/encoder.2``, ``noise/trace_drop``.
        """
        found = {"loss": self.effect.loss}
        intervals = self._effects() | {f"noise/{name}": interval for name, interval in self._noises().items()}
        for name, interval in intervals.items():
            if interval.value == interval.value:  # not what could not be measured
                found[name] = interval.value
                found[f"{name}_margin"] = interval.margin
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return everything in plain numbers, lists and dicts, as JSON has them (None for what was not measured)."""
        effect = self.effect
        sites = [
            {
                "name": name,
                "drop_prob": site.p,
                "kind": site.kind,
                **{k: _plain(v) for k, v in _effect_of(effect, i).items()},
                "share": _plain(effect.share(i)),
                "trusted": trusted(effect, self.tolerance, i),
            }
            for i, (name, site) in enumerate(zip(effect.names, effect.sites, strict=True))
        ]
        found: dict[str, Any] = {
            "loss": effect.loss,
            "draws": effect.draws,
            "confidence": effect.confidence,
            "tolerance": self.tolerance,
            "total": {
                **{k: _plain(v) for k, v in _effect_of(effect, None).items()},
                "trusted": trusted(effect, self.tolerance),
            },
            "sites": sites,
            "problem": effect.problem,
        }
        if sites:
            found["interaction"] = _plain(effect.interaction())
        if self.sweep:
            found["sweep"] = [
                {
                    "drop_prob": q,
                    **{k: _plain(v) for k, v in _effect_of(report, None).items()},
                    "trusted": trusted(report, self.tolerance),
                }
                for q, report in self.sweep
            ]
        if self.penalty is not None:
            settings = {k: v for k, v in vars(self.penalty).items() if k not in {"samples", "confidence"}}
            found["penalty"] = {**settings, **(_plain(self.penalty.value()) or {})}
        if self.noise is not None:
            noise = self.noise
            found["noise"] = {
                **{k: _plain(v) for k, v in self._noises().items() if "/" not in k},
                "draws": noise.draws,
                "sketched": noise.sketched,
                "estimator": noise.estimator,
                "step_size": noise.step_size,
                "mask": noise.mask,
                "layers": [
                    {
                        "name": layer,
                        "trace_drop": _plain(noise.trace_drop(i)),
                        "trace_approx": _plain(noise.trace_approx(i)),
                        "signal_to_noise": _plain(noise.signal_to_noise(i)),
                        "alignment": _plain(noise.alignment(i)),
                    }
                    for i, layer in enumerate(noise.layers)
                ],
            }
        return found

    def _effects(self) -> dict[str, Interval]:
        found = _effect_of(self.effect, None)
        for i, name in enumerate(self.effect.names):
            for key, interval in _effect_of(self.effect, i).items():
                found[f"{key}/{name}"] = interval
        if self.effect.sites:
            found["interaction"] = self.effect.interaction()
        if self.penalty is not None:
            found["penalty"] = self.penalty.value()
        return found

    def _noises(self) -> dict[str, Interval]:
        noise = self.noise
        if noise is None:
            return {}
        found = {
            "trace_drop": noise.trace_drop(),
            "trace_approx": noise.trace_approx(),
            "trace_ratio": noise.trace_ratio(),
            "alignment": noise.alignment(),
            "signal_to_noise": noise.signal_to_noise(),
        }
        for i, layer in enumerate(noise.layers):
            found[f"trace_drop/{layer}"] = noise.trace_drop(i)
            found[f"trace_approx/{layer}"] = noise.trace_approx(i)
            found[f"alignment/{layer}"] = noise.alignment(i)
        return found


def trusted(effect: EffectReport, tolerance: float = TOLERANCE, site: int | None = None) -> str:
    """Judge whether ``R_approx`` is within `tolerance` times ``R_drop`` of ``R_drop``.

    Args:
        effect: What was measured.
        tolerance: Fraction of ``R_drop``.
        site: Number of the site, or None for all together.

    Returns:
        ``"yes"`` if the interval of the remainder, seen against the tolerance, lies inside, ``"no"`` if outside, and
        ``"unclear"`` if more draws are needed to tell, or nothing is there to compare.
    """
    if effect.problem:
        return "unclear"
    above, below = effect.excess(tolerance, site)
    if above.low > 0 or below.low > 0:
        return "no"
    return "yes" if above.high < 0 and below.high < 0 else "unclear"


def check_tolerance(tolerance: object) -> None:
    """Refuse what is no number above 0."""
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 < tolerance < float("inf"):
        raise InvalidArgumentError(f"tolerance={tolerance!r} must be a number above 0, for example {TOLERANCE}.")


def _effect_of(effect: EffectReport, site: int | None) -> dict[str, Interval]:
    names = ("r_approx", *OF_OUTPUTS[1:])
    return {
        "r_drop": effect.truth(site),
        **{name: effect.approximation(curvature, site) for name, curvature in zip(names, OF_OUTPUTS, strict=True)},
        "remainder": effect.remainder(site),
        "left_out": effect.left_out(site),
        "higher_orders": effect.higher_orders(site),
    }


def _plain(interval: Interval) -> dict[str, float] | None:
    if interval.value != interval.value:
        return None
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def from_plain(state: Mapping[str, Any]) -> Diagnosis:
    """Put together what `dataclasses.asdict` took apart, for checkpoints that load with ``weights_only=True``."""
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
