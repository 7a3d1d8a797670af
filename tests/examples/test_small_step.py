"""The benchmark of small steps runs; what it measures is not looked at here."""

from examples.benchmarks.small_step import METHODS, PLAIN, measure


def test_two_rounds():
    found = measure(rounds=2, steps=2, warm=3)
    assert list(found) == list(METHODS)
    assert found[PLAIN]["ratio"] == 1
    assert all(method["milliseconds of a step"] > 0 for method in found.values())
