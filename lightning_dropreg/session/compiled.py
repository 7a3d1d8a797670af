"""What is refused of compiled parts of a model; how they run is in `lightning_dropreg.passes.compiled`."""

from __future__ import annotations

from contextlib import AbstractContextManager

from torch import nn

from lightning_dropreg.errors import UnsupportedModuleError
from lightning_dropreg.estimators import AUTO
from lightning_dropreg.numerics.torch_private import keeping_donated_buffers
from lightning_dropreg.passes.compiled import CompiledParts
from lightning_dropreg.step.plan import Plan

__all__ = ["compiled_problems", "keeping_buffers"]


def compiled_problems(module: nn.Module, plan: Plan) -> list[UnsupportedModuleError]:
    """Find compiled parts that cannot stay so.

    Args:
        module: The module that is trained.
        plan: What is to be done with every batch.

    Returns:
        One error for each part.
    """
    others = plan.estimators - {"antithetic", AUTO}
    return [
        UnsupportedModuleError(
            f"{name or 'The module itself'} is compiled by torch.compile, and a compiled graph has one backward and no "
            f"forward mode, which estimator={sorted(others)[0]!r} needs. Use estimator='antithetic', or train it "
            "uncompiled."
        )
        for name in (CompiledParts(module).parts if others else ())
    ]


def keeping_buffers() -> AbstractContextManager[None]:
    """Let what is compiled meanwhile be differentiated more than once: the norm of the noise takes a backward too."""
    return keeping_donated_buffers()
