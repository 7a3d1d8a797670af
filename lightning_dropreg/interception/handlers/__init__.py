"""What stands in for each function of torch that drops something: one file per kind of dropout.

A handler is called as ``handler(mode, func, *args, **kwargs)`` with the active interception (what it may ask of that is
`lightning_dropreg.interception.sites.Mode`), the function that the model called, and its arguments. It calls
``mode.site`` wherever ``func`` would drop. `HANDLERS` is the whole list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_dropreg.interception.handlers import (
    alpha,
    attention,
    composite,
    custom,
    dropout,
    recurrent,
    stochastic_depth,
)

__all__ = ["HANDLERS"]

HANDLERS: dict[Callable[..., Any], Callable[..., Any]] = {
    **composite.HANDLERS,
    **dropout.HANDLERS,
    **alpha.HANDLERS,
    **recurrent.HANDLERS,
    **attention.HANDLERS,
    **stochastic_depth.HANDLERS,
    **custom.HANDLERS,
}
"""What is done instead of each function of torch that drops."""
