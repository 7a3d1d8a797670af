"""What dropout does to the model, measured while it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from rich import get_console
from torch import Tensor

from lightning_dropreg.checks import (
    SpellsArguments,
    check_choice,
    check_count,
    check_flags,
    check_path,
    make_directory,
    need_matplotlib,
)
from lightning_dropreg.diagnostics import (
    Diagnosis,
    measure_effect,
    measure_noise,
    measure_penalty,
    read,
    show,
    trusted,
)
from lightning_dropreg.diagnostics.diagnosis import TOLERANCE, check_tolerance, from_plain
from lightning_dropreg.diagnostics.figures import draw
from lightning_dropreg.diagnostics.numbers import with_margin
from lightning_dropreg.diagnostics.sampling import MIN_DRAWS
from lightning_dropreg.diagnostics.statistics import check_confidence
from lightning_dropreg.errors import (
    InvalidArgumentError,
    NoDropoutSiteError,
    NotRepeatableError,
    UnsupportedModuleError,
)
from lightning_dropreg.numerics.noise import fold_key
from lightning_dropreg.passes.batches import fresh_batch, read_once
from lightning_dropreg.session.batch import SkippedError, loss_of
from lightning_dropreg.session.configured import configured
from lightning_dropreg.session.logs import LogCollector
from lightning_dropreg.session.measuring import Moving
from lightning_dropreg.session.others import goes_before_finders, is_resuming
from lightning_dropreg.session.problems import changed_parameters, fingerprints
from lightning_dropreg.session.session import Session, own_step
from lightning_dropreg.step.plan import Plan

__all__ = ["DropoutDiagnostics"]

BATCHES = ("first", "current")
LARGEST_HELD = 16 << 20
"""A checkpoint keeps the held batch if it has no more bytes than that."""


class DropoutDiagnostics(SpellsArguments, Callback):
    """Measures on one batch, at chosen moments of training, what dropout does, and leaves training as it is.

    The true explicit effect ``R_drop`` beside ``R_approx`` and its ablations, together and by site, and the gradient
    noise of dropout beside ``xi_approx``, all with confidence intervals (see `lightning_dropreg.diagnostics`). It looks
    at the model's dropout also where other callbacks of this package replace it in training; their penalty and their
    ``xi_approx`` are measured with the settings that they train with. Logged under
    ``dropreg/diagnostics/``; kept in `history`; the last one is shown as a table after training.

    A measurement takes ``3 draws (1 + sites)`` forward passes, and ``4 draws`` forward and backward passes for the
    noise. In a distributed run every process measures on a batch of its own, and the effects of the average loss are
    reported.

    Checkpoints keep `history`, so that a resumed run goes on with it, and the held batch if it is made of tensors in
    lists, tuples and dicts, of at most 16 MiB, on a single process. Otherwise another batch is held after resuming, and
    a warning says so.

    Args:
        draws: Draws of dropout for every number, at least 4.
        every_n_epochs: Measure before the first step of every n-th epoch; None for not at all.
        steps: Measure also before these optimizer steps, counted from 0.
        at_end: Measure also after the last step.
        per_site: Whether to look at every site alone too.
        noise: Whether to look at the gradient noise.
        batch: ``"first"`` holds the first training batch that is seen and measures always on that; ``"current"``
            measures on the batch of the moment (after the last step: on the last one).
        confidence: Probability with which an interval covers its value.
        tolerance: ``R_approx`` is trusted where it is within this fraction of ``R_drop`` of ``R_drop``. Where it is not
            for all sites together, a warning says so.
        figures: Directory for figures (PNG and SVG) drawn after training, or None. Needs the extra `plot`.
        verbose: Whether to print: a line for every measurement, and tables and a reading after training.

    Attributes:
        history: The measurements of the last fit, and of the fit that it resumed, in order.

    Raises:
        InvalidArgumentError: If an argument is out of range or unknown.
        MissingDependencyError: If `figures` is given and matplotlib is not installed.

    Example:
        >>> import lightning
        >>> trainer = lightning.Trainer(
        ...     callbacks=[DropoutDiagnostics(draws=16, steps=[100, 1000])], accelerator="cpu", logger=False,
        ...     enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False
        ... )
    """

    def __init__(
        self,
        draws: int = 16,
        every_n_epochs: int | None = 1,
        steps: Sequence[int] = (),
        at_end: bool = True,
        per_site: bool = True,
        noise: bool = True,
        batch: str = "first",
        confidence: float = 0.95,
        tolerance: float = TOLERANCE,
        figures: str | PathLike[str] | None = None,
        verbose: bool = True,
    ) -> None:
        check_count("draws", draws, MIN_DRAWS)
        if every_n_epochs is not None:
            check_count("every_n_epochs", every_n_epochs)
        if not isinstance(steps, (list, tuple, set, frozenset, range)):
            raise InvalidArgumentError(f"steps={steps!r} must be a list of numbers of optimizer steps.")
        for step in steps:
            check_count("steps", step, 0)
        check_choice("batch", batch, BATCHES)
        check_confidence(confidence)
        check_tolerance(tolerance)
        check_flags(at_end=at_end, per_site=per_site, noise=noise, verbose=verbose)
        if figures is not None:
            check_path("figures", figures)
            need_matplotlib()
        self.draws = draws
        self.every_n_epochs = every_n_epochs
        self.steps = frozenset(steps)
        self.at_end = at_end
        self.per_site = per_site
        self.noise = noise
        self.batch = batch
        self.confidence = confidence
        self.tolerance = float(tolerance)
        self.figures = figures
        self.verbose = verbose
        self.history: list[Diagnosis] = []
        self._held: tuple[Any, int] | None = None
        self._last_epoch = -1
        self._seed = 0
        self._loaded: dict[str, Any] | None = None
        self._alone, self._portable = True, False

    @property
    def state_key(self) -> str:
        """What the state in a checkpoint is found by: instruments that look elsewhere keep their own."""
        steps = sorted(self.steps)
        return self._generate_state_key(batch=self.batch, every_n_epochs=self.every_n_epochs, steps=steps)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in plain data."""
        return {
            "history": [asdict(diagnosis) for diagnosis in self.history],
            "held": self._held if self._held is not None and self._portable else None,
            "last_epoch": self._last_epoch,
            "seed": self._seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint says until the fit starts.

        Args:
            state_dict: What `state_dict` returned.
        """
        self._loaded = state_dict

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Come before Lightning's finders, whose checkpoint is not that of a run to go on with."""
        if stage == "fit":
            goes_before_finders(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be measured.

        Raises:
            UnsupportedModuleError: If the step cannot be repeated.
        """
        if self.figures is not None:
            need_matplotlib()  # it may have been made on another machine
            make_directory("figures", self.figures)
        if not pl_module.automatic_optimization:
            raise UnsupportedModuleError(
                f"{type(pl_module).__name__} optimizes manually (automatic_optimization=False), so its training_step "
                "cannot be repeated to look at it. Use automatic optimization, or lightning_dropreg.diagnostics with a "
                "closure that computes the loss."
            )
        session = Session(trainer, pl_module, Plan(), None)
        session.check()
        self._seed = session.seed
        self.history, self._held, self._last_epoch = [], None, -1
        self._alone = trainer.world_size == 1
        if self._loaded is not None and is_resuming(trainer):  # and not a fit of its own after a test of a checkpoint
            self._go_on(self._loaded, pl_module)
        self._loaded = None

    def _go_on(self, state: dict[str, Any], module: LightningModule) -> None:
        self.history = [from_plain(diagnosis) for diagnosis in state["history"]]
        self._last_epoch, self._seed = state["last_epoch"], state["seed"]
        if self.batch == "current":
            return
        if state["held"] is not None:
            batch, batch_idx = state["held"]
            self._held, self._portable = (move_data_to_device(batch, module.device), batch_idx), True
        elif self.history:
            rank_zero_warn(
                "DropoutDiagnostics: the checkpoint has no held batch (several processes, more than "
                f"{LARGEST_HELD >> 20} MiB, or not plain tensors), so what is measured from now on is measured on "
                "another batch than before."
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure if it is time."""
        if self._held is None or self.batch == "current":
            if self.batch == "first":  # which is copied now
                _check_can_be_read(batch)
            self._held = (fresh_batch(batch, tensors=True) if self.batch == "first" else batch), batch_idx
            self._portable = self.batch == "first" and self._alone and _size(batch) <= LARGEST_HELD
        if self._is_due(trainer):
            self._measure(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure once more, show tables and draw figures."""
        if self.at_end and self._held is not None:
            self._measure(trainer, pl_module)
        if not self._portable:  # else it may still be wanted in a checkpoint
            self._held = None
        if not self.history or not trainer.is_global_zero:
            return
        if self.verbose:
            last = self.history[-1]
            show(get_console(), last, [f"Measured at step {last.step}.", *read(last)])
        if self.figures is not None:
            for path in draw(self.history, Path(self.figures)):
                if self.verbose:
                    get_console().print(f"figure: {path}", highlight=False, soft_wrap=True)

    def _is_due(self, trainer: Trainer) -> bool:
        new_epoch = trainer.current_epoch != self._last_epoch
        self._last_epoch = trainer.current_epoch
        if any(diagnosis.step == trainer.global_step for diagnosis in self.history):
            return False  # another micro-batch of the same step
        by_epoch = self.every_n_epochs is not None and trainer.current_epoch % self.every_n_epochs == 0
        return (new_epoch and by_epoch) or trainer.global_step in self.steps

    def _measure(self, trainer: Trainer, module: LightningModule) -> None:
        assert self._held is not None
        _check_can_be_read(self._held[0])
        closure = _closure(trainer, module, *self._held)
        moving = Moving(module, own_step(module))
        generator = torch.Generator().manual_seed(fold_key(self._seed, trainer.global_rank, trainer.global_step))
        common: dict[str, Any] = {
            "draws": self.draws,
            "confidence": self.confidence,
            "generator": generator,
            "module": module,
            "reduce": _averaging(trainer),
        }
        noise, penalty, before = None, None, fingerprints(module)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        try:
            with torch.enable_grad():
                effect = measure_effect(closure, per_site=self.per_site, **common)
                trained = configured(callbacks, trainer, module, closure)
                if self.noise:
                    noise = measure_noise(closure, **trained.noise, **common)
                if trained.penalty is not None:
                    penalty = measure_penalty(closure, **trained.penalty, **common)
        except SkippedError:
            self._held = None
            return
        except NoDropoutSiteError:
            if not self.history:
                raise
            self._held = None if self.batch == "current" else self._held
            rank_zero_warn(f"DropoutDiagnostics: no dropout in the batch of step {trainer.global_step}; not measured.")
            return
        for problem in [*changed_parameters(module, before), *moving.problems()]:
            raise problem
        diagnosis = Diagnosis(
            effect,
            noise,
            tolerance=self.tolerance,
            step=trainer.global_step,
            epoch=trainer.current_epoch,
            penalty=penalty,
        )
        self.history.append(diagnosis)
        self._log(trainer, diagnosis)
        self._tell(trainer, diagnosis)

    def _log(self, trainer: Trainer, diagnosis: Diagnosis) -> None:
        metrics = {f"dropreg/diagnostics/{name}": value for name, value in diagnosis.metrics().items()}
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    def _tell(self, trainer: Trainer, diagnosis: Diagnosis) -> None:
        effect = diagnosis.effect
        verdict = trusted(effect, self.tolerance)
        values = f"R_drop {with_margin(effect.truth())}, R_approx {with_margin(effect.approximation())}"
        if self.verbose and trainer.is_global_zero:
            get_console().print(f"Dropout at step {diagnosis.step}: {values}, trust: {verdict}", highlight=False)
        before = [trusted(earlier.effect, self.tolerance) for earlier in self.history[:-1]]
        if verdict == "no" and "no" not in before:
            rank_zero_warn(
                f"At step {diagnosis.step} R_approx is not within {100 * self.tolerance:g} % of the true explicit "
                f"effect of dropout: {values}. The expansion is not to be trusted here; it gets worse as the drop "
                "probability grows."
            )


def _check_can_be_read(batch: Any) -> None:
    """Refuse a batch that the step could not read after it was looked at."""
    places = read_once(batch)
    if places:
        raise NotRepeatableError(
            f"DropoutDiagnostics runs the step on a batch before it is trained on, and there is something in it that "
            f"can be gone through once: {', '.join(places)}. Make a list of it where the batch is made (collate_fn)."
        )


def _closure(trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> Callable[[], Tensor]:
    """What runs the module's own step on a copy of the batch, logging nothing."""
    step, logs = own_step(module), LogCollector(module)
    named = is_param_in_hook_signature(step, "batch_idx", min_args=2)

    def closure() -> Tensor:
        copy = fresh_batch(batch, tensors=True)
        with logs.run(keep=False), trainer.precision_plugin.train_step_context():
            return loss_of(step(copy, batch_idx) if named else step(copy))

    return closure


def _averaging(trainer: Trainer) -> Callable[[list[Tensor]], list[Tensor]] | None:
    """What averages tensors over the processes, in one operation."""
    if trainer.world_size == 1:
        return None

    def average(tensors: list[Tensor]) -> list[Tensor]:
        flat = trainer.strategy.reduce(torch.cat([t.reshape(-1) for t in tensors]), reduce_op="mean")
        pieces = flat.split([t.numel() for t in tensors])
        return [piece.view_as(t) for piece, t in zip(pieces, tensors, strict=True)]

    return average


def _size(batch: Any) -> float:
    """Bytes of a batch that a checkpoint can keep and load with ``weights_only=True``; infinite if it cannot."""
    if type(batch) is Tensor:
        return batch.nbytes if batch.layout is torch.strided else float("inf")
    if type(batch) in (list, tuple, dict):
        return sum(map(_size, batch.values() if isinstance(batch, dict) else batch))
    return 0 if batch is None or type(batch) in (bool, int, float, str) else float("inf")
