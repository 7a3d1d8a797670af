"""What a callback leaves in a checkpoint, and whether a run may continue from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from lightning_dropreg.errors import CheckpointSettingsError
from lightning_dropreg.estimators import AUTO
from lightning_dropreg.step.settings import NoiseSettings, PenaltySettings

__all__ = ["STATE_VERSION", "check_resumable", "settings_of"]

STATE_VERSION = 2
_COSTS_ONLY = {"low_memory"}  # what changes time and memory, and not the gradient


class Regularizer(Protocol):
    """What a callback of this package was told; see `lightning_dropreg.step.plan.Plan`."""

    penalty: PenaltySettings | None
    noise: NoiseSettings | None
    k: int | None
    antithetic: bool
    sites: str
    alpha: float | None
    attention: str
    accept_checkpoint_settings: bool


def settings_of(callback: Regularizer) -> dict[str, Any]:
    """Collect what a callback was told, in plain numbers and strings, which load with ``weights_only=True``.

    Args:
        callback: One of the package's callbacks.

    Returns:
        Its settings by name.

    Example:
        >>> from lightning_dropreg import MiniBatchDropout
        >>> settings_of(MiniBatchDropout(k=3))["k"]
        3
    """
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
    if hasattr(callback, "attention"):
        settings["attention"] = callback.attention
    return {name: value for name, value in settings.items() if name not in _COSTS_ONLY}


def check_resumable(
    callbacks: Sequence[Regularizer], states: Sequence[Mapping[str, Any] | None], resuming: bool
) -> None:
    """Refuse to continue a run with other settings than it began with.

    Args:
        callbacks: The package's callbacks in the Trainer.
        states: What the checkpoint holds for each.
        resuming: Whether there is a checkpoint at all.

    Raises:
        CheckpointSettingsError: If there is, and it was written with other settings.
    """
    if not resuming or all(callback.accept_checkpoint_settings for callback in callbacks):
        return
    problems = []
    for callback, state in zip(callbacks, states, strict=True):
        name = type(callback).__name__
        if callback.accept_checkpoint_settings:
            continue
        if state is None:
            problems.append(f"it was written without {name}")
        elif state.get("version") != STATE_VERSION:
            problems.append(f"the state of {name} in it has version {state.get('version')}, not {STATE_VERSION}")
        else:
            problems += _differences(name, state["settings"], settings_of(callback))
    if problems:
        raise CheckpointSettingsError(
            f"This run would go on differently than the checkpoint's: {'; '.join(problems)}. Give the callbacks the "
            "checkpoint's settings, or accept_checkpoint_settings=True if the change is meant (on the command line: "
            "--accept_checkpoint_settings=true)."
        )


def _differences(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{name} had {key}={old.get(key)!r} and has {key}={new.get(key)!r}" for key in keys]
