"""Compiled parts of a model in a pass: in the graph where that was seen to do the same, uncompiled elsewhere.

A part that `torch.compile` has made runs compiled if the rule of the pass can stand in a graph
(`lightning_dropreg.interception.traced`). Whether that graph does what the part does uncompiled is not taken for
granted: the first call of each kind is made aside, both ways, under noise that nothing can hide in, and sites, losses,
outputs and gradients are compared. A part that differs, or cannot be traced, runs uncompiled from then on, with a
warning that says why. After that, a call that meets other sites than those of its kind is an error to be answered by
looking again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from torch import nn

from lightning_dropreg.interception.checkpointing import uncompiled
from lightning_dropreg.numerics.torch_private import (
    is_compiled_wrapper,
    keeping_donated_buffers,
    keeping_side_effects_out_of_recomputation,
)

if TYPE_CHECKING:
    from lightning_dropreg.passes.part import Part

__all__ = ["CompiledParts", "uncompiled"]


class CompiledParts:
    """The compiled parts of a module.

    Args:
        root: The module.
    """

    def __init__(self, root: nn.Module) -> None:
        self.parts: dict[str, Part] = {}
        found = {name: part for name, part in root.named_modules() if is_compiled(part)}
        if found:  # who compiles nothing need not wait for the compiler to be imported
            from lightning_dropreg.passes.part import Part

            self.parts = {name: Part(name, part) for name, part in found.items()}
        self._running = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the parts take part in the passes that are run inside."""
        if not self.parts or self._running:
            yield
            return
        self._running += 1
        with ExitStack() as stack:
            stack.enter_context(keeping_side_effects_out_of_recomputation())
            stack.enter_context(keeping_donated_buffers())
            for part in self.parts.values():
                stack.enter_context(part.in_passes())
            try:
                yield
            finally:
                self._running -= 1


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` has made something of a module."""
    return (
        is_compiled_wrapper(module)
        or getattr(module, "_compiled_call_impl", None) is not None
        or getattr(module, "_compiler_ctx", None) is not None
    )
