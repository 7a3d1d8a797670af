"""What the callbacks that regularize have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from lightning import LightningModule, Trainer
from torch.optim import Optimizer

from lightning_dropreg.checks import SpellsArguments, check_choice, check_flags
from lightning_dropreg.errors import CheckpointSettingsError, CompositionError, InvalidArgumentError
from lightning_dropreg.estimators import AUTO
from lightning_dropreg.interception.handlers.attention import ATTENTION
from lightning_dropreg.session.others import UndoneAtEnd, callbacks_of, goes_before_finders, is_resuming
from lightning_dropreg.session.session import Session
from lightning_dropreg.step.plan import Estimation, NoiseSettings, PenaltySettings, Plan
from lightning_dropreg.step.settings import check_estimation, check_fraction

__all__ = ["RegularizerCallback", "estimation"]

_STATE_VERSION = 2
_COSTS_ONLY = {"low_memory"}  # what changes time and memory, and not the gradient


class RegularizerCallback(SpellsArguments, UndoneAtEnd):
    """Base of the callbacks: finds its companions in the Trainer and lets the first of them run the session."""

    penalty: PenaltySettings | None = None
    noise: NoiseSettings | None = None
    k: int | None = None
    attention = "site"
    low_memory = True
    antithetic = False
    sites = "all"
    alpha: float | None = None
    accept_checkpoint_settings = False
    from_mixin = False
    acts_on_training = True  # so a search for a learning rate or batch size has it too

    def __init__(self, attention: str = "site", accept_checkpoint_settings: bool = False) -> None:
        check_choice("attention", attention, ATTENTION)
        check_flags(accept_checkpoint_settings=accept_checkpoint_settings)
        self.attention = attention
        self.accept_checkpoint_settings = accept_checkpoint_settings
        self._session: Session | None = None
        self._loaded: dict[str, Any] | None = None
        self._used_seed: int | None = None
        self._found: dict[str, Any] = {}
        self._found_before: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the composition of callbacks."""
        if stage == "fit" and self._leads(trainer):
            self.plan(trainer)
            goes_before_finders(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wrap the module's training step."""
        if self._leads(trainer):
            companions = self._companions(trainer)
            states = [companion._loaded for companion in companions]
            _check_resumable(companions, states, resuming=is_resuming(trainer))
            seeds = [state["seed"] for state in states if state is not None]
            same = states[0] is not None and states[0]["settings"] == _settings_of(companions[0])
            self._found_before = dict(states[0].get("found", {})) if states[0] is not None and same else {}
            self._begin(trainer, pl_module, seeds[0] if seeds else None)

    def _begin(self, trainer: Trainer, module: LightningModule, seed: int | None) -> None:
        if self._session is not None:
            self._session.remove()
        self._session = Session(trainer, module, self.plan(trainer), seed)
        self._session.looks.found = dict(self._found_before)
        self._session.check()
        for companion in self._companions(trainer):
            companion._used_seed = self._session.seed
            companion._loaded = None  # another fit draws other noise
        self._session.install()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Count the batch, and note that the gradients in store are those of the one before."""
        if self._session is None:
            return
        if self._session.search.is_over:  # what it has left is not of the training
            self._begin(trainer, pl_module, self._session.seed)
        self._session.begin_batch()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the noise to the gradients."""
        if self._session is not None:
            self._session.after_backward()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log the norm of the gradient."""
        if self._session is not None:
            self._session.log_gradient_norm(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the means of an epoch with its last batch, before anybody asks for them at its end."""
        if self._session is None:
            return
        self._session.stale.end_batch()
        self._session.end_batch()
        if trainer.is_last_batch:
            self._session.values.log_means()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the means of an epoch that ended before its last batch."""
        if self._session is not None:
            self._session.stale.end_batch()
            self._session.values.log_means()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the settings, and the seed, so that a resumed run draws the noise of an uninterrupted one."""
        if self._used_seed is not None:  # after fit too, for Trainer.save_checkpoint
            found = self._found if self._session is None else self._session.looks.found
            settings = _settings_of(self)
            state = {"version": _STATE_VERSION, "seed": self._used_seed, "settings": settings, "found": found}
            checkpoint.setdefault("lightning_dropreg", {})[type(self).__name__] = state

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what a checkpoint says until the fit starts."""
        self._loaded = checkpoint.get("lightning_dropreg", {}).get(type(self).__name__)

    def plan(self, trainer: Trainer) -> Plan:
        """Make one plan of all the regularizers in `trainer`.

        Returns:
            The plan.

        Raises:
            CompositionError: If they do not make sense together.
        """
        companions = self._companions(trainer)
        for kind in {type(callback) for callback in companions}:
            same = [callback for callback in companions if isinstance(callback, kind)]
            if len(same) > 1:
                raise CompositionError(
                    f"The Trainer has {len(same)} callbacks of type {kind.__name__}; the effect would count that "
                    "often. Keep one (a mixin on the module brings one too)."
                )
        drawing = [callback for callback in companions if callback.k is not None]
        penalties = [callback.penalty for callback in companions if callback.penalty is not None]
        noises = [callback.noise for callback in companions if callback.noise is not None]
        if len(drawing) > 1:
            raise CompositionError(
                f"{' and '.join(type(callback).__name__ for callback in drawing)} are both in the Trainer, and each "
                "says how often dropout is drawn. Keep one."
            )
        if drawing and penalties:
            raise CompositionError(
                f"{type(drawing[0]).__name__} and ExplicitPenalty are both in the Trainer: dropout has the explicit "
                "effect, and the penalty would add it once more. Use MiniBatchDropout with ImplicitNoise (Algorithm "
                "4), or ExplicitPenalty with ImplicitNoise (Algorithm 2)."
            )
        if noises and any(callback.antithetic for callback in drawing):
            raise CompositionError(
                "MiniBatchDropout(antithetic=True) and ImplicitNoise are both in the Trainer: one is there to take the "
                "noise of dropout away, the other to bring it. Use MiniBatchDropout with ImplicitNoise (Algorithm 4), "
                "or MiniBatchDropout(antithetic=True) alone."
            )
        of_draws = [noise for noise in noises if noise.source == "dropout" and noise.injection != "after_backward"]
        if noises and not of_draws and any(callback.sites == "last" for callback in drawing):
            raise CompositionError(
                "MiniBatchDropout(sites='last') takes away noise of the last site only, and this ImplicitNoise would "
                "bring that of all. Use ImplicitNoise(source='dropout') with injection='auto' or 'loss', which takes "
                "it from the draws themselves, or MiniBatchDropout(sites='all')."
            )
        treatments = {callback.attention for callback in companions}
        if len(treatments) > 1:
            raise CompositionError(
                "The callbacks of the Trainer disagree about dropout on attention probabilities: "
                + ", ".join(f"{type(callback).__name__}(attention={callback.attention!r})" for callback in companions)
                + ". It is a site for all of them or for none: give all the same."
            )
        return Plan(
            k=drawing[0].k if drawing else None,
            low_memory=all(callback.low_memory for callback in drawing),
            antithetic=any(callback.antithetic for callback in drawing),
            sites=drawing[0].sites if drawing else "all",
            alpha=drawing[0].alpha if drawing else None,
            penalty=penalties[0] if penalties else None,
            noise=noises[0] if noises else None,
            attention=treatments.pop() if treatments else "site",
        )

    @staticmethod
    def _companions(trainer: Trainer) -> list[RegularizerCallback]:
        return [callback for callback in callbacks_of(trainer) if isinstance(callback, RegularizerCallback)]

    def _leads(self, trainer: Trainer) -> bool:
        return self._companions(trainer)[0] is self

    def undo(self) -> None:
        """Unwrap the training step."""
        self._loaded = None
        if self._session is not None:
            self._found = self._session.looks.found
            self._session.remove()
            self._session = None


def estimation(
    estimator: str, step_size: float, batch_fraction: float | str | None, batch_dim: int, mask: str, low_memory: bool
) -> Estimation:
    """Check and collect what penalty and noise have in common.

    Returns:
        The settings.

    Raises:
        InvalidArgumentError: If an argument is out of range or unknown.
    """
    check_estimation(estimator, step_size, mask)
    fraction = check_fraction(batch_fraction)
    if not isinstance(batch_dim, int) or isinstance(batch_dim, bool) or batch_dim < 0:
        raise InvalidArgumentError(f"batch_dim={batch_dim!r} must be an integer of at least 0.")
    if low_memory is True and estimator == AUTO:
        estimator = "antithetic"
    if not isinstance(low_memory, bool) or (low_memory and estimator != "antithetic"):
        raise InvalidArgumentError(
            f"low_memory={low_memory!r} with estimator={estimator!r}: it must be True or False, and True is for "
            "estimator='antithetic', whose passes can be made one after the other."
        )
    is_open = batch_fraction == AUTO
    return Estimation(estimator, float(step_size), mask, fraction, batch_dim, low_memory, fraction_is_open=is_open)


def _settings_of(callback: RegularizerCallback) -> dict[str, Any]:
    """Collect what a callback was told, in plain numbers and strings, which load with ``weights_only=True``."""
    settings: dict[str, Any] = {} if callback.k is None else {"k": callback.k}
    if callback.alpha is not None:
        settings["alpha"] = callback.alpha
    if callback.sites != "all":
        settings["sites"] = callback.sites
    if callback.antithetic:
        settings["antithetic"] = True
    for part in (callback.penalty, callback.noise):
        if part is not None:
            values = asdict(part)
            settings |= {**values, **values.pop("estimation")}
    settings.pop("estimation", None)
    if settings.pop("fraction_is_open", False):
        settings["batch_fraction"] = AUTO
    settings["attention"] = callback.attention
    return {name: value for name, value in settings.items() if name not in _COSTS_ONLY}


def _check_resumable(
    callbacks: Sequence[RegularizerCallback], states: Sequence[Mapping[str, Any] | None], resuming: bool
) -> None:
    """Refuse to continue a run with other settings than its checkpoint has for each callback."""
    if not resuming or all(callback.accept_checkpoint_settings for callback in callbacks):
        return
    problems = []
    for callback, state in zip(callbacks, states, strict=True):
        name = type(callback).__name__
        if callback.accept_checkpoint_settings:
            continue
        if state is None:
            problems.append(f"it was written without {name}")
        elif state.get("version") != _STATE_VERSION:
            problems.append(f"the state of {name} in it has version {state.get('version')}, not {_STATE_VERSION}")
        else:
            problems += _differences(name, state["settings"], _settings_of(callback))
    if problems:
        raise CheckpointSettingsError(
            f"This run would go on differently than the checkpoint's: {'; '.join(problems)}. Give the callbacks the "
            "checkpoint's settings, or accept_checkpoint_settings=True if the change is meant (on the command line: "
            "--accept_checkpoint_settings=true)."
        )


def _differences(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{name} had {key}={old.get(key)!r} and has {key}={new.get(key)!r}" for key in keys]
