"""Which strength is recommended, and why none is."""

import pytest
import torch

from lightning_dropreg.diagnostics.effect import EffectReport
from lightning_dropreg.diagnostics.reading import recommend_strength


def effect(truth, approximation, spread=0.01, problem=""):
    generator = torch.Generator().manual_seed(0)
    noise = spread * torch.randn(32, 1, 5, generator=generator, dtype=torch.float64)
    mean = torch.tensor([truth, approximation, approximation, approximation, approximation], dtype=torch.float64)
    return EffectReport((), 1.0, mean + noise, 0.95, problem)


@pytest.mark.parametrize(
    ("found", "trained", "words"),
    [
        (effect(0.2, 0.1), True, "as large as R_drop at 2"),
        (effect(0.2, 0.1), True, "try 1 and 2, then 1.5 and 2, on held-out data"),
        (effect(0.1, 0.1), True, "try 1, then 1.5 and 2, on held-out data"),
        (effect(0.2, 0.1), False, "The initial weights tell no more"),
        (effect(0.0, 0.1), True, "R_drop cannot be told from 0 with 32 draws"),
        (effect(0.1, 0.0), True, "R_approx cannot be told from 0"),
        (effect(-0.1, 0.1), True, "dropout lowers the loss"),
        (effect(0.9, 0.1), True, "so far from 1 that the expansion does not hold"),
        (effect(0.1, 0.1, problem="unknown loss"), True, "R_approx could not be computed"),
    ],
)
def test_a_strength_to_begin_with_and_what_else_is_known(found, trained, words):
    told = recommend_strength(found, trained)
    assert told.startswith("Strength: begin with 1")
    assert words in told
