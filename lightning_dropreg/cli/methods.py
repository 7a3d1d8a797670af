"""The methods whose cost ``dropreg bench`` compares.

*Economical*: penalty and noise are estimated on an eighth of the rows of a batch. *Intercepted*: nothing is added to
the loss, but every function that the step calls is looked at, as it is with any method.
"""

from collections.abc import Callable

from lightning.pytorch import Callback

from lightning_dropreg.callbacks import ExplicitPenalty, ImplicitNoise, MiniBatchDropout, RDrop

__all__ = ["CLOSING", "CONFIGURED", "METHODS", "NO_DROPOUT", "PAPER", "REFERENCE"]

NO_DROPOUT = "no dropout"
REFERENCE = "dropout"
PAPER = "Algorithm 2, double_backward"

CONFIGURED = "as configured"
"""The callbacks of the configuration itself."""
CLOSING = ["Algorithm 2", "Algorithm 2, economical", "R_approx", "noise only", "MiniBatchDropout(k=4)"]
"""The methods whose cost is worth knowing before choosing one."""

_FEW = 1 / 8
"""Fraction of the rows where a method is economical."""

METHODS: dict[str, Callable[[], list[Callback]]] = {
    NO_DROPOUT: list,
    REFERENCE: list,
    "no dropout, intercepted": lambda: [ExplicitPenalty(strength=0)],
    "Algorithm 2": lambda: [ExplicitPenalty(), ImplicitNoise()],
    "Algorithm 2, economical": lambda: [ExplicitPenalty(batch_fraction=_FEW), ImplicitNoise(batch_fraction=_FEW)],
    "Algorithm 2, low_memory": lambda: [ExplicitPenalty(low_memory=True), ImplicitNoise(low_memory=True)],
    "Algorithm 2, after_backward": lambda: [ExplicitPenalty(), ImplicitNoise(injection="after_backward")],
    "Algorithm 2, after_backward, noise on 1/8": lambda: [
        ExplicitPenalty(),
        ImplicitNoise(injection="after_backward", batch_fraction=_FEW),
    ],
    "R_approx": lambda: [ExplicitPenalty()],
    "R_approx, economical": lambda: [ExplicitPenalty(batch_fraction=_FEW)],
    "R_approx, every 4 steps": lambda: [ExplicitPenalty(every_n_steps=4)],
    "noise only": lambda: [ImplicitNoise()],
    "curvature full": lambda: [ExplicitPenalty(curvature="full", strength=0.5)],
    "R-Drop": lambda: [RDrop()],
    "MiniBatchDropout(k=2, antithetic)": lambda: [MiniBatchDropout(k=2, antithetic=True)],
    "MiniBatchDropout(k=4)": lambda: [MiniBatchDropout(k=4)],
    "MiniBatchDropout(k=8, last site)": lambda: [MiniBatchDropout(k=8, sites="last")],
    "MiniBatchDropout(k=16)": lambda: [MiniBatchDropout(k=16)],
    "Algorithm 2, forward": lambda: [ExplicitPenalty(estimator="forward"), ImplicitNoise(estimator="forward")],
    "R_approx, double_backward": lambda: [ExplicitPenalty(estimator="double_backward")],
    PAPER: lambda: [ExplicitPenalty(estimator="double_backward"), ImplicitNoise(estimator="double_backward")],
}
