"""The methods whose cost ``dropreg bench`` compares, each under a key that is quick to type.

*Eco*: penalty and noise are estimated on an eighth of the rows of a batch. *Intercepted*: nothing is added to the loss,
but every function that the step calls is looked at, as it is with any method.
"""

from collections.abc import Callable, Iterable, Sequence

from lightning.pytorch import Callback

from lightning_dropreg.callbacks import ExplicitPenalty, ImplicitNoise, MiniBatchDropout, RDrop
from lightning_dropreg.errors import InvalidArgumentError

__all__ = ["CLOSING", "CONFIGURED", "KEYS", "METHODS", "NO_DROPOUT", "PAPER", "REFERENCE", "named"]

NO_DROPOUT = "no dropout"
REFERENCE = "dropout"
PAPER = "Algorithm 2, double_backward"

CONFIGURED = "as configured"
"""The callbacks of the configuration itself."""
CLOSING = ["Algorithm 2", "Algorithm 2, economical", "R_approx", "noise only", "MiniBatchDropout(k=4)"]
"""The methods whose cost is worth knowing before choosing one."""

_FEW = 1 / 8
"""Fraction of the rows where a method is economical."""


def _algorithm_2(**options: object) -> Callable[[], list[Callback]]:
    return lambda: [ExplicitPenalty(**options), ImplicitNoise(**options)]  # type: ignore[arg-type]


def _r(**options: object) -> Callable[[], list[Callback]]:
    return lambda: [ExplicitPenalty(**options)]  # type: ignore[arg-type]


_TABLE: list[tuple[str, str, Callable[[], list[Callback]]]] = [
    ("none", NO_DROPOUT, list),
    ("dropout", REFERENCE, list),
    ("bare", "no dropout, intercepted", _r(strength=0)),
    ("alg2", "Algorithm 2", _algorithm_2()),
    ("alg2_quarter", "Algorithm 2, a quarter of the rows", _algorithm_2(batch_fraction=0.25, estimator="antithetic")),
    ("alg2_eco", "Algorithm 2, economical", _algorithm_2(batch_fraction=_FEW)),
    ("alg2_lean", "Algorithm 2, low_memory", _algorithm_2(low_memory=True)),
    ("alg2_anti", "Algorithm 2, antithetic", _algorithm_2(estimator="antithetic")),
    ("alg2_fwd", "Algorithm 2, forward", _algorithm_2(estimator="forward")),
    ("alg2_paper", PAPER, _algorithm_2(estimator="double_backward")),
    (
        "alg2_after",
        "Algorithm 2, after_backward",
        lambda: [ExplicitPenalty(), ImplicitNoise(injection="after_backward")],
    ),
    (
        "alg2_after_eco",
        "Algorithm 2, after_backward, noise on 1/8",
        lambda: [ExplicitPenalty(), ImplicitNoise(injection="after_backward", batch_fraction=_FEW)],
    ),
    ("r", "R_approx", _r()),
    ("r_quarter", "R_approx, a quarter of the rows", _r(batch_fraction=0.25, estimator="antithetic")),
    ("r_eco", "R_approx, economical", _r(batch_fraction=_FEW)),
    ("r_every4", "R_approx, every 4 steps", _r(every_n_steps=4)),
    ("r_anti", "R_approx, antithetic", _r(estimator="antithetic")),
    ("r_fwd", "R_approx, forward", _r(estimator="forward")),
    ("r_paper", "R_approx, double_backward", _r(estimator="double_backward")),
    ("full", "curvature full", _r(curvature="full", strength=0.5)),
    ("noise", "noise only", lambda: [ImplicitNoise()]),
    ("rdrop", "R-Drop", lambda: [RDrop()]),
    ("k2_anti", "MiniBatchDropout(k=2, antithetic)", lambda: [MiniBatchDropout(k=2, antithetic=True)]),
    ("k4", "MiniBatchDropout(k=4)", lambda: [MiniBatchDropout(k=4)]),
    ("k8_last", "MiniBatchDropout(k=8, last site)", lambda: [MiniBatchDropout(k=8, sites="last")]),
    ("k16", "MiniBatchDropout(k=16)", lambda: [MiniBatchDropout(k=16)]),
]

METHODS = {name: make for _, name, make in _TABLE}
"""Callbacks of each method, by its name."""
KEYS = {name: key for key, name, _ in _TABLE} | {CONFIGURED: "own"}
"""What is typed and shown in tables for the name of a method."""


def named(given: Iterable[str]) -> Sequence[str]:
    """Return the names of methods that were given by key or by name.

    Args:
        given: Keys or names; several keys may stand in one text, with commas.

    Returns:
        The names.

    Raises:
        InvalidArgumentError: If one is unknown.

    Example:
        >>> named(["alg2,r_eco", "noise only"])
        ['Algorithm 2', 'R_approx, economical', 'noise only']
    """
    names = {key: name for name, key in KEYS.items()}
    words = [word for one in given for word in ([one] if one in KEYS else one.split(","))]
    unknown = [word for word in words if word.strip() not in names and word not in KEYS]
    if unknown:
        raise InvalidArgumentError(f"--methods: {', '.join(unknown)} unknown; choose from {', '.join(names)}.")
    return [word if word in KEYS else names[word.strip()] for word in words]
