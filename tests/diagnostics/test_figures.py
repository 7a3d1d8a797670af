"""Figures of diagnoses: intervals end where values cannot be, and what is not known is not drawn."""

import math

import pytest

from lightning_dropreg.diagnostics import Interval
from lightning_dropreg.diagnostics.figures import _points

pytest.importorskip("matplotlib")


def test_intervals_end_where_values_cannot_be():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    intervals = [Interval(0.9, 0.3), Interval(-0.5, 0.2), Interval(-1.1, 0.3), Interval(0.0, math.nan)]
    _points(axes, intervals, range(4), 0, "cosine", (-1, 1))
    drawn = [
        [float(x) for x, _ in segment] for segment in axes.containers[0].lines[2][0].get_segments() if len(segment)
    ]
    assert drawn[0] == pytest.approx([0.6, 1.0])
    assert drawn[1] == pytest.approx([-0.7, -0.3])
    assert drawn[2] == pytest.approx([-1.1, -0.8])
    assert all(math.isnan(x) for segment in drawn[3:] for x in segment)
