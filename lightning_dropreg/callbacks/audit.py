"""An audit of dropout at the beginning of a fit."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_dropreg.auditing import Finding, audit
from lightning_dropreg.checks import SpellsArguments
from lightning_dropreg.errors import UnsupportedModuleError
from lightning_dropreg.numerics.context import modes_kept

__all__ = ["DropoutAudit"]


class DropoutAudit(SpellsArguments, Callback):
    """Audits dropout once, on the first training batch, and leaves the run bit-identical.

    The evaluation steps are audited again with the first validation batch. In a distributed run the masks of the ranks
    are compared. Findings are told as one warning, and if there are none, what was looked at is logged; see
    `lightning_dropreg.audit`.

    Attributes:
        findings: What was found.

    Example:
        >>> DropoutAudit().findings
        []
    """

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self._batch: Any = None
        self._modes: list[tuple[nn.Module, bool]] = []
        self._trained = self._validated = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Audit the first training step."""
        if not self._trained:
            self._trained = True
            self._audit(trainer, pl_module, batch, None)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Audit the first validation step of the fit."""
        if not self._validated and self._trained:
            self._validated = True
            self._audit(trainer, pl_module, self._batch, batch)
            self._batch = None

    def _audit(self, trainer: Trainer, module: LightningModule, batch: Any, validation_batch: Any) -> None:
        if validation_batch is None:
            self._batch, self._modes = batch, [(child, child.training) for child in module.modules()]
        context = trainer.precision_plugin.train_step_context()
        try:
            with modes_kept(module), torch.inference_mode(False), context:
                for child, training in self._modes:
                    child.training = training
                found = audit(module, batch, validation_batch=validation_batch)
        except UnsupportedModuleError as error:
            rank_zero_warn(f"DropoutAudit: {error}")
            return
        known = {(one.id, one.where) for one in self.findings}
        new = [one for one in found if (one.id, one.where) not in known]
        self.findings += new
        told = [one for one in new if one.severity != "note"]
        if not self.findings and validation_batch is None:
            rank_zero_info(f"DropoutAudit: no finding in {type(module).__name__}. {found.coverage}")
        if told:
            lines = [f"  {one.severity} {one.id} at {one.where}: {one.evidence} {one.repair}" for one in told]
            count = "1 finding" if len(told) == 1 else f"{len(told)} findings"
            rank_zero_warn("\n".join([f"DropoutAudit: {count} in {type(module).__name__}:", *lines]))
