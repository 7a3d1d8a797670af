"""Parts of a model that are compiled: they stay so where there is nothing in them to see.

Nobody sees what is called inside a compiled graph, so a part with dropout in it is refused. Any other part runs as it
was compiled, hidden from the mode that looks for dropout, which would be traced into the graph otherwise.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from lightning_dropreg.errors import UnsupportedModuleError
from lightning_dropreg.estimators import AUTO
from lightning_dropreg.interception.sites import Site
from lightning_dropreg.numerics.torch_private import hidden_from_modes, is_compiled_wrapper, keeping_donated_buffers
from lightning_dropreg.step.plan import Plan

__all__ = ["as_compiled", "compiled_parts", "compiled_problems", "keeping_buffers", "uncompiled"]


def compiled_parts(module: nn.Module) -> dict[str, nn.Module]:
    """Return the compiled modules in `module`, itself included, by their paths."""
    return {name: child for name, child in module.named_modules() if _is_compiled(child)}


def compiled_problems(module: nn.Module, sites: Sequence[Site], plan: Plan) -> list[UnsupportedModuleError]:
    """Find compiled parts that cannot stay so.

    Args:
        module: The module that is trained.
        sites: Its dropout sites, named, found with `uncompiled`.
        plan: What is to be done with every batch.

    Returns:
        One error for each part.
    """
    found = []
    others = plan.estimators - {"antithetic", AUTO}
    for name, part in compiled_parts(module).items():
        called = name or "The module itself"
        prefix = name.removesuffix("._orig_mod")
        inside = [site.name for site in sites if not name or f"{site.name.split(' ')[0]}.".startswith(f"{prefix}.")]
        if inside or part is module or hasattr(part, "_compiler_ctx"):
            found.append(
                f"{called} is compiled by torch.compile, and dropout inside a compiled graph cannot be seen"
                f"{f' ({inside[0]})' if inside else ''}. Train it uncompiled, or compile parts without dropout."
            )
        elif others:
            found.append(
                f"{called} is compiled by torch.compile, and a compiled graph has one backward and no forward mode, "
                f"which estimator={sorted(others)[0]!r} needs. Use estimator='antithetic', or train it uncompiled."
            )
    return [UnsupportedModuleError(problem) for problem in found]


def uncompiled() -> AbstractContextManager[None]:
    """Let compiled modules run as they were written, to look at them."""
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return]


@contextmanager
def as_compiled(parts: Sequence[nn.Module]) -> Iterator[None]:
    """Let compiled parts of a module run hidden from an interception.

    Yields:
        Nothing.
    """
    if not parts:
        yield
        return
    kept = [(part, name, part.__dict__[name]) for part in parts for name in _calls(part) if name in part.__dict__]
    for part, name, call in kept:
        part.__dict__[name] = _hidden(call)
    try:
        yield
    finally:
        for part, name, call in kept:
            part.__dict__[name] = call


def keeping_buffers() -> AbstractContextManager[None]:
    """Let what is compiled meanwhile be differentiated more than once: the norm of the noise takes a backward too."""
    return keeping_donated_buffers()


def _hidden(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def hidden(*args: Any, **kwargs: Any) -> Any:
        with hidden_from_modes():
            return call(*args, **kwargs)

    return hidden


def _calls(part: nn.Module) -> tuple[str, ...]:
    """Names of the attributes through which a compiled module is called."""
    return ("forward",) if is_compiled_wrapper(part) else ("_compiled_call_impl",)


def _is_compiled(module: nn.Module) -> bool:
    return (
        is_compiled_wrapper(module)
        or getattr(module, "_compiled_call_impl", None) is not None
        or getattr(module, "_compiler_ctx", None) is not None
    )
