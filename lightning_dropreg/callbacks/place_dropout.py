"""Dropout placed in a model for the length of a fit."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer

from lightning_dropreg.checks import SpellsArguments, check_choice
from lightning_dropreg.placing import add_dropout, remove_dropout
from lightning_dropreg.placing.adding import KINDS
from lightning_dropreg.placing.patterns import check_patterns

__all__ = ["PlaceDropout"]


class PlaceDropout(SpellsArguments, Callback):
    """Places dropout on the outputs of modules that have none; see `lightning_dropreg.add_dropout`.

    It is placed in ``setup``, before the strategy wraps the model, and taken away when the fit ends.

    Args:
        patterns: Patterns of module paths (``{"net.layers.*.mlp": 0.1}``) and drop probabilities.
        kind: See `lightning_dropreg.add_dropout`.

    Raises:
        InvalidArgumentError: If a probability or the kind is out of range.

    Example:
        >>> PlaceDropout({"model.layers.*.mlp": 0.1}).kind
        'dropout'
    """

    def __init__(self, patterns: dict[str, float], kind: str = "dropout") -> None:
        check_patterns(patterns)
        check_choice("kind", kind, KINDS)
        self.patterns = dict(patterns)
        self.kind = kind

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Place it."""
        if stage == "fit":
            add_dropout(pl_module, self.patterns, self.kind)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take it away."""
        remove_dropout(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take it away."""
        if stage == "fit":
            remove_dropout(pl_module)
