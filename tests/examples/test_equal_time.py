"""What a run had come to by a certain time."""

import pytest

from examples.benchmarks.equal_time import reached

RECORD = {
    "seeds": [1, 2],
    "steps": [10, 20, 30],
    "cpu_seconds": 6.0,
    "each_held_out": [[3.0, 2.0], [2.0, 2.5], [1.0, 1.0]],
    "each_test": [[3.1, 2.1], [2.1, 2.6], [1.1, 1.2]],
    "test": [1.1, 1.2],
}


@pytest.mark.parametrize(
    ("seconds", "test", "step", "until"),
    [
        (2.0, [3.1, 2.1], [10, 10], 10),
        (4.5, [2.1, 2.1], [20, 10], 20),  # by held-out loss, each seed by itself
        (99.0, [1.1, 1.2], [30, 30], 30),
    ],
)
def test_only_what_fits_into_the_time_counts(seconds, test, step, until):
    found = reached(RECORD, seconds)
    assert (found["test"], found["best_step"], found["until"]) == (test, step, until)
