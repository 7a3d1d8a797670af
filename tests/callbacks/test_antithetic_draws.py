"""Pairs of dropout draws with opposite masks."""

import math

import pytest
import torch
import torch.nn.functional as F
from by_hand import by_hand
from fits import train

import lightning_dropreg as dr
from lightning_dropreg.errors import CompositionError, InvalidArgumentError
from lightning_dropreg.functional import dropout_loss, plain_loss
from lightning_dropreg.passes import draws_of_dropout, run_pass


@pytest.mark.parametrize("q", [0.05, 0.4, 0.5, 0.7])
def test_opposite_masks_overlap_as_little_as_they_can(q):
    """With its two marginals right that fixes the pair's distribution, and with it the correlation that is promised."""
    x = torch.ones(100_000, dtype=torch.float64, requires_grad=True)
    kept = []
    for rule in draws_of_dropout(3, 2, antithetic=True):
        run_pass(lambda: kept.append(F.dropout(x, q).detach() > 0) or F.dropout(x, q).sum(), rule)
    first, second = kept
    for mask in kept:  # wrong once in 10^8 runs of the right code; the seed is fixed
        assert abs(mask.double().mean() - (1 - q)) < 5.7 * math.sqrt(q * (1 - q) / len(x))
    assert not ((~first & ~second) if q <= 0.5 else (first & second)).any()


def test_half_of_the_entries_and_the_other_half():
    """With q = 1/2, what is linear in the masks cancels exactly, whatever is drawn."""
    x = torch.linspace(-1, 2, 50, dtype=torch.float64, requires_grad=True)

    def closure():
        return F.dropout(x, 0.5).sum()

    torch.testing.assert_close(dropout_loss(closure, k=2, antithetic=True), plain_loss(closure), rtol=1e-14, atol=0)
    assert abs(dropout_loss(closure, k=2) - plain_loss(closure)) > 0.1


def test_pairs_are_independent_of_one_another():
    x = torch.ones(1000, dtype=torch.float64, requires_grad=True)

    def closure():
        return (F.dropout(x, 0.4) * torch.arange(1000)).sum()

    def losses(rules):
        return [run_pass(closure, rule).loss.item() for rule in rules]

    antithetic = losses(draws_of_dropout(3, 6, antithetic=True))
    assert len(set(antithetic)) == 6
    assert antithetic[::2] == losses(draws_of_dropout(3, 3, antithetic=False))


def test_in_a_trainer():
    def expected(closure, key):
        return sum(run_pass(closure, rule).loss for rule in draws_of_dropout(key, 4, antithetic=True)) / 4

    by_hand([dr.MiniBatchDropout(4, antithetic=True)], expected)


def test_refused():
    with pytest.raises(InvalidArgumentError, match="k=3 with antithetic=True: the draws come in pairs"):
        dr.MiniBatchDropout(3, antithetic=True)
    with pytest.raises(InvalidArgumentError, match="antithetic='yes' must be True or False"):
        dr.MiniBatchDropout(2, antithetic="yes")
    with pytest.raises(CompositionError, match="one is there to take the noise of dropout away"):
        train([dr.MiniBatchDropout(2, antithetic=True), dr.ImplicitNoise()])
