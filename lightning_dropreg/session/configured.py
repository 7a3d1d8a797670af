"""With which settings a run estimates penalty and noise, so that the instruments measure what it trains with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lightning import LightningModule, Trainer

from lightning_dropreg.estimators import AUTO
from lightning_dropreg.estimators.curvature import FULL
from lightning_dropreg.estimators.precision import bfloat16_step_size
from lightning_dropreg.functional import find_sites
from lightning_dropreg.inspection.choice import chosen_estimator
from lightning_dropreg.passes import Closure
from lightning_dropreg.session.base import RegularizerCallback
from lightning_dropreg.session.problems import in_bfloat16
from lightning_dropreg.step.plan import Estimation

__all__ = ["Configured", "configured"]


@dataclass(frozen=True)
class Configured:
    """What the regularizers of a run estimate, and how.

    Attributes:
        penalty: Options for `lightning_dropreg.diagnostics.measure_penalty`; None where no penalty is configured.
        noise: Options for `lightning_dropreg.diagnostics.measure_noise`; empty where no ``xi_approx`` is configured.
        source: Where the configured noise comes from, ``"taylor"`` or ``"dropout"``; None without noise.
    """

    penalty: dict[str, Any] | None = None
    noise: dict[str, Any] = field(default_factory=dict)
    source: str | None = None


def configured(callbacks: Iterable[object], trainer: Trainer, module: LightningModule, closure: Closure) -> Configured:
    """Collect the settings of a run's regularizers."""
    ours = [callback for callback in callbacks if isinstance(callback, RegularizerCallback)]
    penalty = next((callback.penalty for callback in ours if callback.penalty is not None), None)
    noise = next((callback.noise for callback in ours if callback.noise is not None), None)
    sites = find_sites(closure, module=module) if (penalty or noise) and in_bfloat16(trainer, module) else None

    def options(chosen: Estimation) -> dict[str, Any]:
        second = penalty is not None and penalty.curvature == FULL
        step = chosen.step_size if sites is None else bfloat16_step_size(chosen.step_size, sites, second)
        estimator = chosen.estimator if chosen.estimator != AUTO else chosen_estimator(closure, module)
        return {"estimator": estimator, "step_size": step, "mask": chosen.mask}

    return Configured(
        None
        if penalty is None
        else {"strength": penalty.strength, "curvature": penalty.curvature, **options(penalty.estimation)},
        {} if noise is None or noise.source != "taylor" else options(noise.estimation),
        None if noise is None else noise.source,
    )
