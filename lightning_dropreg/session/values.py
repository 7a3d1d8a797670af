"""What is logged under ``dropreg/``: values of single steps where somebody reads them, and means over epochs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from lightning import LightningModule, Trainer
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_dropreg.numerics.torch_private import norms_of
from lightning_dropreg.session.stale import is_changed

__all__ = ["Values", "norm_of"]


class Values:
    """The values of one training run.

    A step in which the regularizers act logs its values; one in which they do nothing must cost nothing either.

    Args:
        trainer: The trainer, which says when something is logged.
        module: The module, which logs.
        means: Names of the values whose means over epochs are wanted.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, means: Iterable[str]) -> None:
        self.trainer = trainer
        self.module = module
        self._averaged = list(means)
        self._sums: dict[str, tuple[Tensor, int]] = {}
        self._latest: dict[str, Tensor] = {}
        self._plain = not is_changed(module, LightningModule, "log")

    def add(self, values: Mapping[str, Tensor], always: bool = False) -> None:
        """Take scalars of one step, without graphs, by name: for its log (see `log`) and for the means."""
        self.log(values, always)
        for name in self._averaged:
            if name in values:
                total, count = self._sums.get(name, (None, 0))
                self._sums[name] = values[name] if total is None else total + values[name], count + 1

    def log(self, values: Mapping[str, Tensor], always: bool = False) -> None:
        """Log the latest values where somebody reads them; one call of Lightning's ``log`` is a thousand of Python's.

        Where a value was logged before in this epoch, it only takes the place of the one before.

        A value that is not made in every step (a penalty with ``every_n_steps``) is logged as it was last.
        """
        self._latest.update(values)
        if not always and not self.are_read:
            return
        results, hook = self.trainer._results if self._plain else None, self.module._current_fx_name
        for name, value in self._latest.items():
            held = None if results is None else results.get(f"{hook}.dropreg/{name}")
            if held is None or held.has_reset or held.value.device != value.device:
                self.module.log(f"dropreg/{name}", value, on_step=True, on_epoch=False, batch_size=1)
            else:
                type(held).update(held, value, 1)  # without what torchmetrics puts around it
        self._latest.clear()

    def log_means(self) -> None:
        """Log the means since the last call, whatever ``log_every_n_steps`` is: nan where there was no value.

        Lightning's own means would cost a call of ``log`` in every step.
        """
        sums, self._sums = self._sums, {}
        for name in self._averaged if sums else ():
            total, count = sums.get(name, (torch.tensor(torch.nan), 1))
            self.module.log(
                f"dropreg/{name}_epoch",
                (total / count).to(self.module.device),
                on_step=False,
                on_epoch=True,
                batch_size=1,
                sync_dist=self.trainer.world_size > 1,
            )

    @property
    def are_read(self) -> bool:
        """Whether what is logged now is read: by the logger, or at the end of the epoch or the fit."""
        trainer = self.trainer
        last = trainer.is_last_batch or trainer.global_step + 1 == trainer.max_steps or bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        return last or self.in_logging_step

    @property
    def in_logging_step(self) -> bool:
        """Whether the logger writes this step down."""
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return every > 0 and (self.trainer.global_step % every == every - 1 or self.trainer.global_step == 0)


def norm_of(gradients: Iterable[Tensor | None]) -> Tensor:
    """Return the norm of all gradients together, sparse ones and those of FSDP2 too; None has none."""
    tensors = [t.coalesce().values() if t.is_sparse else t for t in gradients if t is not None]
    if not tensors:
        return torch.zeros(())
    norm: Tensor = torch.linalg.vector_norm(torch.stack(norms_of(tensors)))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
