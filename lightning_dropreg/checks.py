"""Whether a value that somebody passed is what it must be, whatever it is."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from lightning_dropreg.errors import InvalidArgumentError, MissingDependencyError, UnknownArgumentError

__all__ = [
    "SITES",
    "SpellsArguments",
    "below_floor",
    "check_choice",
    "check_count",
    "check_draws",
    "check_flags",
    "check_instance",
    "check_integer",
    "check_names",
    "check_path",
    "check_step_size",
    "check_strength",
    "is_integer",
    "is_number",
    "is_one_of",
    "is_probability",
    "make_directory",
    "need_matplotlib",
]

T = TypeVar("T")

SMALLEST_STEP = 1e-8
SITES = ("all", "last")


class SpellsArguments:
    """A base of classes that answer a misspelt keyword argument with the nearest one they have.

    Example:
        >>> from lightning_dropreg import ExplicitPenalty
        >>> ExplicitPenalty(strenght=2.0)
        Traceback (most recent call last):
        lightning_dropreg.errors.UnknownArgumentError: ExplicitPenalty takes no 'strenght'. Did you mean 'strength'?
    """

    def __new__(cls: type[T], *args: Any, **kwargs: Any) -> T:
        """Look at the names before ``__init__`` does."""
        check_names(cls.__name__, kwargs, cls.__init__)
        return object.__new__(cls)


def check_names(owner: str, given: Iterable[str], function: Any) -> None:
    """Refuse names that a function has no argument for.

    Args:
        owner: Who was given them, for the message.
        given: The names.
        function: What takes them; a class, too.

    Raises:
        UnknownArgumentError: If there is one.
    """
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = [name for name in parameters if name != "self"]
    for name in given:
        if name not in known:
            close = get_close_matches(str(name), known, 1)
            hint = f"Did you mean {close[0]!r}?" if close else f"It has: {', '.join(known) or 'none'}."
            raise UnknownArgumentError(f"{owner} takes no {name!r}. {hint}")


def check_draws(k: object, antithetic: object) -> None:
    """Refuse a number of draws below 1, and pairs of an odd number."""
    check_count("k", k)
    if not isinstance(antithetic, bool):
        raise InvalidArgumentError(f"antithetic={antithetic!r} must be True or False.")
    if antithetic and k % 2:  # type: ignore[operator]
        raise InvalidArgumentError(f"k={k} with antithetic=True: the draws come in pairs, so k must be even.")


def check_choice(name: str, value: object, names: Collection[str]) -> None:
    """Refuse what is none of the names that there are."""
    if not is_one_of(value, names):
        raise InvalidArgumentError(f"{name}={value!r} is unknown; choose one of {', '.join(names)}.")


def check_instance(name: str, value: object, kind: type | tuple[type, ...], wanted: str) -> None:
    """Refuse what is of another type.

    Args:
        name: Name of the argument, for the message.
        value: What was passed.
        kind: What it must be.
        wanted: The same in words.

    Raises:
        InvalidArgumentError: If it is not.

    Example:
        >>> check_instance("modules", "encoder", list, "a list of patterns")
        Traceback (most recent call last):
        lightning_dropreg.errors.InvalidArgumentError: modules must be a list of patterns; found str 'encoder'.
    """
    if not isinstance(value, kind):
        raise InvalidArgumentError(f"{name} must be {wanted}; found {type(value).__name__} {str(value)[:40]!r}.")


def check_flags(**flags: object) -> None:
    """Refuse what is neither True nor False."""
    for name, value in flags.items():
        check_instance(name, value, bool, "True or False")


def check_integer(name: str, value: object) -> None:
    """Refuse what is no integer."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidArgumentError(f"{name}={value!r} must be an integer.")


def check_count(name: str, value: object, minimum: int = 1) -> None:
    """Refuse what is not an integer of at least `minimum`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise InvalidArgumentError(f"{name}={value!r} must be an integer of at least {minimum}.")


def check_path(name: str, value: object) -> Path:
    """Return the path of a file or folder; refuse what is none."""
    check_instance(name, value, (str, os.PathLike), "a path (a string or a pathlib.Path)")
    return Path(value)  # type: ignore[arg-type]


def make_directory(name: str, path: str | os.PathLike[str]) -> Path:
    """Make a directory at once, so that what cannot be written is found out before anything takes time.

    Args:
        name: Of the argument, for the message.
        path: Where it is to be; it may be there.

    Returns:
        Its path.

    Raises:
        InvalidArgumentError: If it cannot be made or written to.
    """
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgumentError(
            f"{name}={str(path)!r} cannot be made a directory: {type(error).__name__}: {error}."
        ) from error
    if not os.access(directory, os.W_OK):
        raise InvalidArgumentError(f"{name}={str(path)!r} is a directory that cannot be written to.")
    return directory


def check_strength(strength: float, name: str = "strength") -> float:
    """Refuse a negative or non-finite strength.

    Returns:
        The strength.

    Raises:
        InvalidArgumentError: If it is one.
    """
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 <= strength < float("inf"):
        raise InvalidArgumentError(
            f"{name}={strength!r} must be a finite number of at least 0; 1 is the value of the paper's definition."
        )
    return float(strength)


def is_integer(value: object, floor: int) -> bool:
    """Whether `value` is an integer of at least `floor` (and no bool)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= floor


def check_step_size(step_size: float) -> None:
    """Refuse what is no step of a finite difference.

    Args:
        step_size: Step of an antithetic pair, relative to the size of the noise, from 1e-8 to 1.

    Raises:
        InvalidArgumentError: If it is anything else.
    """
    if not is_number(step_size) or not SMALLEST_STEP <= step_size <= 1:
        raise InvalidArgumentError(
            f"step_size={step_size!r} must be a number from {SMALLEST_STEP} to 1: below that a difference is nothing "
            "but rounding. 0.1 keeps the error of the penalty below about 1 %."
        )


def is_number(value: object) -> bool:
    """Whether `value` is a finite real number (and no bool)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_probability(value: Any) -> bool:
    """Whether `value` is in ``[0, 1)``, as a drop probability must be."""
    return is_number(value) and 0 <= value < 1


def is_one_of(value: object, names: object) -> bool:
    """Whether `value` is one of `names`; what cannot be looked up is not."""
    return isinstance(value, str) and value in names  # type: ignore[operator]


def below_floor(given: Mapping[str, Any], floors: Mapping[str, int]) -> list[str]:
    """Say which arguments are no integers of at least their floor.

    Args:
        given: The arguments.
        floors: The least value of some.

    Returns:
        One phrase for each that is not.

    Example:
        >>> below_floor({"width": 0, "depth": 2}, {"width": 1, "depth": 1})
        ['width=0 (an integer of at least 1)']
    """
    return [
        f"{name}={given[name]!r} (an integer of at least {floor})"
        for name, floor in floors.items()
        if not is_integer(given[name], floor)
    ]


def check_drop_prob(p: float, kind: str) -> None:
    """Refuse a drop probability for which the noise has no finite variance."""
    try:
        valid = bool(0.0 <= p < 1.0)
    except TypeError:
        valid = False
    if not valid:
        raise InvalidArgumentError(
            f"{kind} was called with drop probability {p}; the variance p/(1-p) of its noise is finite only for "
            "0 <= p < 1. Lower the probability."
        )


def need_matplotlib() -> None:
    """Refuse to go on without matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "Figures need matplotlib, which is not installed. Install the extra `plot`: "
            "pip install 'lightning-dropreg[plot]'."
        ) from error
