"""Random states are put back, also where they are found unchanged by looking at memory."""

import random

import numpy
import pytest
import torch

from lightning_dropreg.passes.randomness import RandomState

DRAWS = {
    "torch": lambda: torch.rand(1).item(),
    "python": random.random,
    "python normal": lambda: random.gauss(0, 1),  # two are made at a time, and the second is kept
    "numpy": numpy.random.rand,
    "numpy normal": numpy.random.randn,  # as well
}


@pytest.mark.parametrize("before", range(4))
@pytest.mark.parametrize("name", DRAWS)
def test_a_state_is_put_back(name, before):
    draw = DRAWS[name]
    for _ in range(before):
        draw()
        RandomState()
    state = RandomState()
    assert state.is_current()
    drawn = []
    for count in (1, 2, 3, 1):
        drawn.append([draw() for _ in range(count)])
        assert not state.is_current()
        state.again().restore()
        assert not state.is_current()
        state.restore()
        assert state.is_current()
    assert all(values == drawn[2][: len(values)] for values in drawn)
    assert len(set(drawn[2])) == 3


def test_what_others_set_is_seen():
    first = RandomState()
    held = random.getstate(), numpy.random.get_state()
    values = random.random(), numpy.random.rand()
    random.setstate(held[0])
    numpy.random.set_state(held[1])
    assert first.is_current()
    assert (random.random(), numpy.random.rand()) == values
