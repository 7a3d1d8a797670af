"""Dropout on the outputs of modules that have none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_dropreg.checks import check_choice
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.nn import LockedDropout
from lightning_dropreg.placing.patterns import match

__all__ = ["KINDS", "PlacedDropout", "add_dropout", "remove_dropout"]

KINDS: dict[str, Callable[[float], nn.Module]] = {
    "dropout": nn.Dropout,
    "locked": LockedDropout,
    "dropout1d": nn.Dropout1d,
    "dropout2d": nn.Dropout2d,
    "dropout3d": nn.Dropout3d,
    "alpha": nn.AlphaDropout,
}
_NAME = "placed_dropout"


class PlacedDropout(nn.Module):
    """The dropout that `add_dropout` gives to a module, as a child of it, so that its mode is the module's.

    Args:
        kind: See `add_dropout`.
        p: Drop probability, in ``[0, 1)``.
    """

    def __init__(self, kind: str, p: float) -> None:
        super().__init__()
        self.kind = kind
        self.drop = KINDS[kind](p)

    def forward(self, output: Any) -> Any:
        """Drop from an output.

        Args:
            output: A tensor, or a tuple, list or dict with one in first place.

        Returns:
            The same with the first tensor dropped from.

        Raises:
            InvalidArgumentError: If there is no such tensor.
        """
        if isinstance(output, Tensor):
            return self.drop(output)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            rest = (self.drop(output[0]), *output[1:])
            return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)
        if isinstance(output, list) and output and isinstance(output[0], Tensor):
            return [self.drop(output[0]), *output[1:]]
        if isinstance(output, Mapping) and output:
            name = next(iter(output))
            if isinstance(output[name], Tensor):
                output[name] = self.drop(output[name])  # type: ignore[index]
                return output
        raise InvalidArgumentError(
            f"add_dropout: a module returned {type(output).__name__}, in which no tensor stands first to drop from. "
            "Name another module."
        )


def _drop_output(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """The hook; a function of this file, so that a model with it can be pickled and copied."""
    placed = module._modules.get(_NAME)
    return output if placed is None else placed(output)


def add_dropout(model: nn.Module, patterns: Mapping[str, float], kind: str = "dropout") -> dict[str, float]:
    """Place dropout on the outputs of modules, by patterns of their paths.

    The dropout is a child of the module (``placed_dropout``) that has neither parameters nor buffers, so the keys of
    the state dict stay, and a hook lets it act. A module that has one already gets the new one in its place. Undone by
    `remove_dropout`.

    Args:
        model: The model; changed in place.
        patterns: Patterns as in a shell (``"model.layers.*.mlp"``; ``*`` also spans dots) and drop probabilities. A
            pattern means the modules whose own paths match, not what is below them.
        kind: ``"dropout"``, ``"locked"`` (one mask for all time steps of ``(batch, time, features)``), ``"dropout1d"``,
            ``"dropout2d"``, ``"dropout3d"`` or ``"alpha"``.

    Returns:
        The probability by the path of the module.

    Raises:
        InvalidArgumentError: If a probability or the kind is out of range.
        PatternError: If a pattern matches nothing; nothing is placed then.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 100), nn.Tanh())
        >>> add_dropout(net, {"1": 0.5})
        {'1': 0.5}
        >>> bool((net(torch.ones(1, 2)) == 0).any()), list(net.state_dict())
        (True, ['0.weight', '0.bias'])
        >>> remove_dropout(net)
        ['1']
    """
    check_choice("kind", kind, KINDS)
    found = [one for one in match(model, patterns) if _NAME not in one.path.split(".")]
    for one in found:
        fresh = _NAME not in one.module._modules
        placed = PlacedDropout(kind, one.p)
        placed.train(one.module.training)
        one.module.add_module(_NAME, placed)
        if fresh:
            one.module.register_forward_hook(_drop_output)
    return {one.path: one.p for one in found}


def remove_dropout(model: nn.Module) -> list[str]:
    """Take away all that `add_dropout` placed.

    Args:
        model: The model; changed in place.

    Returns:
        The paths of the modules that had some.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        >>> add_dropout(net, {"1": 0.1})
        {'1': 0.1}
        >>> remove_dropout(net)
        ['1']
    """
    removed = []
    for path, module in list(model.named_modules()):
        if _NAME in module._modules:
            del module._modules[_NAME]
            removed.append(path)
        for key in [key for key, hook in module._forward_hooks.items() if hook is _drop_output]:
            del module._forward_hooks[key]
            for options in (module._forward_hooks_with_kwargs, module._forward_hooks_always_called):
                options.pop(key, None)
    return removed
