"""Whether a value that somebody passed is what it must be, whatever it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["below_floor", "is_integer", "is_number", "is_one_of", "is_probability"]


def is_integer(value: object, floor: int) -> bool:
    """Whether `value` is an integer of at least `floor` (and no bool)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= floor


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
