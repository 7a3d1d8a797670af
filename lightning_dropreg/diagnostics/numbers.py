"""Numbers with their uncertainty, for people to read."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lightning_dropreg.diagnostics.statistics import Interval

__all__ = ["common_exponent", "percent_range", "with_margin"]

NOT_MEASURED = "-"


def with_margin(interval: Interval, exponent: int = 0) -> str:
    """Write a value and half its interval, with the digits that mean something.

    The margin gets one digit, or two if the first is a 1.

    Args:
        interval: The interval.
        exponent: Write in units of ``10**exponent``.

    Returns:
        For example ``"0.41 ±0.02"``; ``"-"`` for what was not measured.

    Example:
        >>> with_margin(Interval(0.41321, 0.0211)), with_margin(Interval(0.0041321, 0.0000122), -3)
        ('0.41 ±0.02', '4.132 ±0.012')
        >>> with_margin(Interval(12.0, 0.0)), with_margin(Interval(8123.4, 512.0)), with_margin(Interval(7e6, 9e5))
        ('12 ±0', '8100 ±500', '7.0e+06 ±9e+05')
    """
    value, margin = interval.value / 10**exponent, interval.margin / 10**exponent
    if math.isnan(value):
        return NOT_MEASURED
    if not margin or math.isnan(margin):
        return f"{value:.4g} ±{margin:g}"
    power = math.floor(math.log10(margin))
    place = -power + (margin < 2 * 10**power)  # of the last digit that means something
    largest = max(abs(value), margin)
    if place > 4 or largest >= 1e5:
        digits = max(0, math.floor(math.log10(largest)) - power)
        return f"{value:.{digits}e} ±{margin:.0e}"
    decimals = max(0, place)
    return f"{round(value, place):.{decimals}f} ±{round(margin, place):.{decimals}f}"


def common_exponent(intervals: Iterable[Interval]) -> int:
    """Return a power of ten in which numbers that belong together are easy to read: 0, or that of the largest.

    Example:
        >>> common_exponent([Interval(3e-4, 1e-5), Interval(1e-6, 1e-6)]), common_exponent([Interval(0.2, 0.1)])
        (-4, 0)
    """
    sizes = [abs(interval.value) for interval in intervals if interval.value and not math.isnan(interval.value)]
    power = math.floor(math.log10(max(sizes))) if sizes else 0
    return 0 if -1 <= power <= 3 else power


def percent_range(interval: Interval) -> str:
    """Write a fraction and its interval in percent.

    Returns:
        For example ``"61 % (58 to 64)"``.
    """
    if math.isnan(interval.value):
        return NOT_MEASURED
    return f"{100 * interval.value:.0f} % ({100 * interval.low:.0f} to {100 * interval.high:.0f})"
