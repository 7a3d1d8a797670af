"""Which parts of a model have dropout that does nothing, because they are in evaluation mode."""

from __future__ import annotations

from torch import nn

from lightning_dropreg.errors import NoDropoutSiteError
from lightning_dropreg.numerics.torch_private import DROPOUT_LAYERS

__all__ = ["dropout_at_rest", "naming_what_rests"]

_RATES = ("p", "dropout", "dropout_p", "drop_prob", "drop_rate", "dropout_rate", "prob")
"""Where layers that call a functional dropout keep its probability."""
_SHOWN = 5


def dropout_at_rest(module: nn.Module) -> list[str]:
    """Find the parts of a model that are in evaluation mode and have dropout in them.

    Args:
        module: The model.

    Returns:
        Paths of the outermost such parts (``"encoder"``); the name of the class for the model itself.

    Example:
        >>> net = nn.ModuleDict({"body": nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)).eval(), "head": nn.Dropout()})
        >>> dropout_at_rest(net)
        ['body']
    """
    found: list[str] = []
    for path, part in module.named_modules():
        inside = any(not outer or path.startswith(f"{outer}.") for outer in found)
        if not inside and not part.training and any(not m.training and _drops(m) for m in part.modules()):
            found.append(path)
    return [path or type(module).__name__ for path in found]


def _drops(layer: nn.Module) -> bool:
    if isinstance(layer, DROPOUT_LAYERS) or "drop" in type(layer).__name__.lower():
        return getattr(layer, "p", None) != 0
    rates = [getattr(layer, name, None) for name in _RATES]
    return any(isinstance(rate, float) and 0 < rate < 1 for rate in rates)


def naming_what_rests(problem: NoDropoutSiteError, module: nn.Module) -> NoDropoutSiteError:
    """Let an error name the parts in evaluation mode, if there are any that have dropout."""
    parts = dropout_at_rest(module)
    if not parts:
        return problem
    listed = ", ".join(parts[:_SHOWN]) + (f" and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else "")
    return NoDropoutSiteError(
        f"No dropout was reached in this step: {listed} {'is' if len(parts) == 1 else 'are'} in eval mode, where "
        "dropout does nothing (from_pretrained leaves models so, and Lightning keeps that). Call .train() on "
        f"{'it' if len(parts) == 1 else 'them'}, in on_fit_start for example."
    )
