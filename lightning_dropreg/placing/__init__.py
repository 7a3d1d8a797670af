"""Dropout set by patterns of module paths, and placed where a model has none."""

from lightning_dropreg.placing.adding import PlacedDropout, add_dropout, remove_dropout
from lightning_dropreg.placing.patterns import Match, match
from lightning_dropreg.placing.probabilities import drop_prob_attributes, matched_drop_probs, set_drop_prob

__all__ = [
    "Match",
    "PlacedDropout",
    "add_dropout",
    "drop_prob_attributes",
    "match",
    "matched_drop_probs",
    "remove_dropout",
    "set_drop_prob",
]
