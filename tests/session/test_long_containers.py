"""What a step changes inside the entries of a long container is not put back, and is said."""

import warnings
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from fits import Classifier, train

import lightning_dropreg as dr

CHANGES = {
    "lists": (lambda: [[] for _ in range(1000)], lambda held: held[2].append(1)),
    "counters": (lambda: {k: Counter(a=0) for k in range(1000)}, lambda held: held[2].update(a=1)),
    "objects": (
        lambda: [SimpleNamespace(n=0) for _ in range(1000)],
        lambda held: vars(held[2]).update(n=held[2].n + 1),
    ),
    "tensors": (lambda: [torch.zeros(2) for _ in range(1000)], lambda held: held[2].add_(1)),
    "only read": (
        lambda: [{"text": str(k), "label": k, "x": torch.zeros(2)} for k in range(1000)],
        lambda held: held[2],
    ),
    "numbers": (lambda: list(range(1000)), lambda held: held.append(1)),
}


class Remembers(Classifier):
    """Keeps something of every example."""

    def __init__(self, p=0.5, kind="lists"):
        super().__init__(p)
        make, self.change = CHANGES[kind]
        self.held = make()

    def training_step(self, batch, batch_idx):
        self.change(self.held)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", CHANGES)
def test_entries_that_a_step_changes_are_said(kind):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train([dr.ExplicitPenalty(estimator="antithetic")], make=Remembers, model_options={"kind": kind})
    said = {str(each.message) for each in caught if "inside the entries of self.held" in str(each.message)}
    assert len(said) == (kind not in ("only read", "numbers"))
