"""Which module and line of the user's code a call comes from."""

from __future__ import annotations

import re
import sys

from torch import nn

__all__ = ["name_caller"]

# modules that drop in one place, which their path says; the lines of other modules tell their places apart
_ONE_PLACE = ("torch.nn.modules.", "lightning_dropreg.nn.")
_OURS = (
    "lightning_dropreg.interception",
    "lightning_dropreg.session.manual",
    "lightning_dropreg.session.past",
    "lightning_dropreg.inspection.first_step",
)


def name_caller() -> str:
    """Say where in the user's code the current call comes from: module path, and the line where that is needed.

    The stack of Python frames holds the modules that are running as the ``self`` of their ``forward``s; the outermost
    of them knows the innermost one's path.

    Returns:
        For example ``"encoder.2"`` or ``"encoder (model.py:17)"``.
    """
    frame = sys._getframe(1)
    modules: list[nn.Module] = []
    line = ""
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name == "lightning_dropreg.passes.run":  # what lies further out is not the pass's
            break
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and not (modules and modules[-1] is owner):
            modules.append(owner)
        if not line and not name.startswith(("torch.", *_OURS)):
            line = f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    if not modules:
        return line
    paths = {id(module): path for path, module in modules[-1].named_modules(remove_duplicate=False)}
    path = paths.get(id(modules[0])) or type(modules[0]).__name__
    # a parametrization is known by the name of its weight
    path = re.sub(r"parametrizations\.(\w+)\.\d+$", r"\1", path)
    return path if type(modules[0]).__module__.startswith(_ONE_PLACE) else f"{path} ({line})"
