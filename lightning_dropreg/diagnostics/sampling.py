"""The loop that all the instruments share: one measurement for each draw, always from the same state."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from lightning_dropreg.checks import check_count
from lightning_dropreg.diagnostics.statistics import check_confidence
from lightning_dropreg.numerics.noise import draw_key, fold_key
from lightning_dropreg.passes import Closure
from lightning_dropreg.passes.isolation import Isolation

__all__ = ["MIN_DRAWS", "OnDraw", "Probe", "measure_draws"]

MIN_DRAWS = 4
"""With fewer draws an interval says nothing."""

P = TypeVar("P", bound="Probe")
OnDraw = Callable[[], object]


class Probe:
    """Measures something on a batch, once for every draw of noise. Subclasses say what."""

    def draw(self, key: int) -> None:
        """Measure once and keep what was found."""
        raise NotImplementedError


def measure_draws(
    make: Callable[[Closure], P],
    closure: Closure,
    *,
    draws: int,
    confidence: float,
    generator: torch.Generator | None,
    module: nn.Module | None,
    on_draw: OnDraw | None,
) -> P:
    """Let a probe measure `draws` times.

    Args:
        make: Makes the probe from a closure that runs the step, every time from the same state.
        closure: Runs forward and loss with the model in training mode; returns the scalar loss.
        draws: Number of draws, at least 4.
        confidence: What the intervals of the report will have; refused here, before anything is run.
        generator: Source of the seed of the noise; the global one if None.
        module: A module whose state must not change.
        on_draw: Called after every draw.

    Returns:
        The probe, with all that it found.

    Raises:
        InvalidArgumentError: If an argument is out of range.
    """
    check_count("draws", draws, MIN_DRAWS)
    check_confidence(confidence)
    key = draw_key(generator)
    with Isolation(module) as isolation:
        probe = make(lambda: isolation.run(closure, trace=False))
        for j in range(draws):
            probe.draw(fold_key(key, j))
            if on_draw is not None:
                on_draw()
    return probe
