"""What is audited: a module with its steps, or a closure."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dropreg.errors import InvalidArgumentError, UnsupportedModuleError
from lightning_dropreg.numerics.context import modes_kept, nothing, patched
from lightning_dropreg.passes.batches import fresh_batch

__all__ = ["Subject", "loss_in", "subject_of"]

_STAGES = {"validation_step": "validation", "test_step": "test", "predict_step": "prediction"}
_FRAMEWORKS = ("lightning.", "pytorch_lightning.")


@dataclass
class Subject:
    """What is audited.

    Attributes:
        name: What to call it.
        train: Runs the training step once and returns what it returns.
        evaluate: What runs in evaluation mode, by the name of the stage.
        roots: The outermost modules.
        hooks: The module's own hooks around an evaluation: before and after.
        configure_optimizers: Returns the optimizers; None if that is not known.
        stand_in: Whether the evaluation is but the training step in evaluation mode.
    """

    name: str
    train: Callable[[], Any]
    evaluate: dict[str, Callable[[], Any]]
    roots: list[nn.Module]
    hooks: tuple[list[Callable[[], Any]], list[Callable[[], Any]]] = field(default_factory=lambda: ([], []))
    configure_optimizers: Callable[[], Any] | None = None
    stand_in: bool = False

    @property
    def holder(self) -> nn.Module:
        """One module that has all the roots below it."""
        return self.roots[0] if len(self.roots) == 1 else nn.ModuleList(self.roots)

    @contextmanager
    def in_evaluation(self) -> Iterator[None]:
        """Put the modules in evaluation mode, without gradients, and back."""
        with modes_kept(*self.roots), torch.no_grad():
            for root in self.roots:
                root.eval()
            yield


def loss_in(output: Any) -> Tensor | None:
    """Return the scalar loss in what a step returned; None if there is none.

    Example:
        >>> loss_in({"loss": torch.tensor(1.0)})
        tensor(1.)
    """
    if isinstance(output, Mapping):
        output = output.get("loss")
    elif not isinstance(output, Tensor):
        output = getattr(output, "loss", None)
    return output if isinstance(output, Tensor) and output.numel() == 1 else None


def subject_of(module: Any, batch: Any, validation_batch: Any) -> Subject:
    """Find out what is to be audited."""
    if hasattr(module, "training_step") and isinstance(module, nn.Module):
        return _of_lightning_module(module, batch, validation_batch)
    if isinstance(module, nn.Module):

        def run(batch: Any = batch) -> Any:
            copied = fresh_batch(batch, tensors=True)
            return module(**copied) if isinstance(copied, Mapping) else module(copied)

        return Subject(
            type(module).__name__,
            run,
            {"evaluation mode": lambda: run(validation_batch)},
            [module],
            stand_in=True,
        )
    if not callable(module):
        raise InvalidArgumentError(
            f"audit needs a LightningModule, an nn.Module or a closure that returns the loss; found "
            f"{type(module).__name__}."
        )
    takes_batch = batch is not None and _positional(module) > 0
    call = (lambda: module(fresh_batch(batch, tensors=True))) if takes_batch else module
    roots = _modules_of(module)
    again = {"evaluation mode": call} if roots else {}
    return Subject(getattr(module, "__name__", type(module).__name__), call, again, roots, stand_in=True)


def _of_lightning_module(module: Any, batch: Any, validation_batch: Any) -> Subject:
    if not getattr(module, "automatic_optimization", True):
        raise UnsupportedModuleError(
            f"{type(module).__name__} optimizes manually (automatic_optimization=False), so its training_step cannot "
            "be repeated without training. Audit a closure that computes the loss."
        )

    def runs(name: str, on: Any) -> Callable[[], Any]:
        def run() -> Any:
            step = getattr(module, name)
            with patched(*((module, log, nothing) for log in ("log", "log_dict") if hasattr(type(module), log))):
                return step(*(fresh_batch(on, tensors=True), 0)[: _positional(step) or 1])

        return run

    own = [name for name in _STAGES if _is_own(module, name)]
    evaluate = {_STAGES[name]: runs(name, validation_batch) for name in own}
    hooks: tuple[list[Callable[[], Any]], list[Callable[[], Any]]] = ([], [])
    for into, names in zip(hooks, (("model_eval", "start", "epoch_start"), ("epoch_end", "end")), strict=True):
        into += [getattr(module, f"on_validation_{name}") for name in names if _is_own(module, f"on_validation_{name}")]
    stand_in = "validation_step" not in own
    if stand_in:
        evaluate["evaluation mode"] = runs("training_step", validation_batch)
    return Subject(
        type(module).__name__,
        runs("training_step", batch),
        evaluate,
        [module],
        hooks,
        module.configure_optimizers if _is_own(module, "configure_optimizers") else None,
        stand_in,
    )


def _is_own(module: Any, name: str) -> bool:
    """Whether a module has a method of its own, not the framework's."""
    method = getattr(module, name, None)
    return method is not None and not getattr(method, "__module__", "").startswith(_FRAMEWORKS)


def _positional(function: Callable[..., Any]) -> int:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 1
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return 2
    return sum(
        parameter.kind in {parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD} for parameter in parameters
    )


def _modules_of(function: Any) -> list[nn.Module]:
    """The modules that a closure refers to."""
    found: dict[int, nn.Module] = {}

    def look(value: Any, depth: int) -> None:
        if isinstance(value, nn.Module):
            found[id(value)] = value
        elif depth and isinstance(value, functools.partial):
            for inner in (value.func, *value.args, *value.keywords.values()):
                look(inner, depth - 1)
        elif depth and inspect.ismethod(value):
            look(value.__self__, depth - 1)
            look(value.__func__, depth - 1)
        elif depth and inspect.isfunction(value):
            names = inspect.getclosurevars(value)
            for inner in (*names.nonlocals.values(), *names.globals.values(), *(value.__defaults__ or ())):
                look(inner, depth - 1)
        elif depth and isinstance(value, (list, tuple, dict)) and len(value) < 64:
            for inner in value.values() if isinstance(value, dict) else value:
                look(inner, depth - 1)
        elif depth and hasattr(value, "__dict__") and not (inspect.ismodule(value) or inspect.isclass(value)):
            look(dict(vars(value)), depth - 1)

    look(function, 3)
    inner = {id(child) for module in found.values() for child in module.modules() if child is not module}
    return [module for key, module in found.items() if key not in inner]
