"""Everything of torch that is no public interface, in one place, each with what is done where a release lacks it.

Torch may rename any of it in a release without a word (and did: 2.6, 2.7, 2.13 and 2.14 differ). What stands here is
looked up when it is used, so that ``tests/numerics/test_torch_private.py`` can take it away and see the fallback work.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

__all__ = [
    "DROPOUT_LAYERS",
    "FUSED_LOG_SOFTMAX",
    "FUSED_SOFTMAX",
    "FUSED_WEIGHT_NORM",
    "NORM_LAYERS",
    "a_mode_is_on",
    "active_modes",
    "assert_on_device",
    "can_trace_modes",
    "checkpoint_entrances",
    "has_gradient_hooks",
    "has_hooks_after_accumulation",
    "hidden_from_modes",
    "in_checkpoint",
    "is_compiled_wrapper",
    "is_made_a_graph",
    "keeping_donated_buffers",
    "keeping_side_effects_out_of_recomputation",
    "modes_aside",
    "norms_of",
    "recompile_limits",
    "set_version",
    "stance",
    "traced_from_outside_only",
    "watching_saved_tensors",
    "without_fused_recurrence",
]


def _attribute(root: Any, path: str) -> Any:
    """Follow a dotted path from `root`; None where it leads nowhere."""
    for name in path.split("."):
        root = getattr(root, name, None)
        if root is None:
            return None
    return root


def checkpoint_entrances() -> dict[str, Any]:
    """Return what `torch.utils.checkpoint.checkpoint` calls to do its work, by name in that module.

    Returns:
        The generator around a call without reentrance (``"generator"`` holds its name) and the function of a reentrant
        one (``"function"``). What a release lacks is left out: its checkpoints then are of unknown make, and refused.

    Example:
        >>> sorted(checkpoint_entrances())
        ['function', 'generator']
    """
    # since torch 2.14 the older name is a shell around the newer one, with the same first argument
    names = ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator")
    found = {
        "generator": next((name for name in names if hasattr(torch_checkpoint, name)), None),
        "function": "CheckpointFunction" if hasattr(torch_checkpoint, "CheckpointFunction") else None,
    }
    return {kind: name for kind, name in found.items() if name is not None}


class _Entered(threading.local):
    def __init__(self) -> None:
        self.hooks: list[object] = []


_entered = _Entered()
_TOP = "_autograd._top_saved_tensors_default_hooks"  # since torch 2.7
_CHECKPOINT_HOOK = "_checkpoint_hook"


def in_checkpoint() -> bool:
    """Tell whether what is computed now will be computed again by a checkpoint without reentrance.

    Returns:
        Whether it will. Where torch cannot be asked, checkpoints entered outside `watching_saved_tensors` are unknown.
    """
    top = _attribute(torch._C, _TOP)
    if top is None:
        return bool(_entered.hooks) and _CHECKPOINT_HOOK in type(_entered.hooks[-1]).__qualname__
    hooks = top(True)
    return hooks is not None and _CHECKPOINT_HOOK in getattr(hooks[0], "__qualname__", "")


@contextmanager
def watching_saved_tensors() -> Iterator[None]:
    """Keep account of the hooks on saved tensors in this thread, where torch itself cannot be asked for them."""
    if _attribute(torch._C, _TOP) is not None:
        yield
        return
    enter, leave = saved_tensors_hooks.__enter__, saved_tensors_hooks.__exit__

    def entering(self: saved_tensors_hooks) -> None:
        _entered.hooks.append(self)
        enter(self)

    def leaving(self: saved_tensors_hooks, *exception: object) -> None:
        if self in _entered.hooks:
            _entered.hooks.remove(self)
        leave(self, *exception)

    saved_tensors_hooks.__enter__ = entering  # type: ignore[method-assign]
    saved_tensors_hooks.__exit__ = leaving  # type: ignore[method-assign]
    try:
        yield
    finally:
        saved_tensors_hooks.__enter__ = enter  # type: ignore[method-assign]
        saved_tensors_hooks.__exit__ = leave  # type: ignore[method-assign]


FUSED_SOFTMAX = tuple(f for f in (_attribute(torch, "_softmax"),) if f is not None)
"""The softmax that fused code calls; empty where there is none to be called."""
FUSED_LOG_SOFTMAX = tuple(f for f in (_attribute(torch, "_log_softmax"),) if f is not None)
"""The same of its logarithm."""
FUSED_WEIGHT_NORM = tuple(f for f in (_attribute(torch, "_weight_norm"),) if f is not None)
"""What `torch.nn.utils.weight_norm` calls."""


@contextmanager
def without_fused_recurrence() -> Iterator[None]:
    """Let recurrent networks run on kernels that can be differentiated twice and forward."""
    switches = [
        (_attribute(torch._C, f"_get_{name}_enabled"), _attribute(torch._C, f"_set_{name}_enabled"))
        for name in ("mkldnn", "cudnn")
    ]
    if any(switch is None for pair in switches for switch in pair):
        # the public way, which sets all the flags of cuDNN and counts the devices each time
        with torch.backends.mkldnn.flags(enabled=False), torch.backends.cudnn.flags(enabled=False):
            yield
        return
    before = [read() for read, _ in switches]
    try:
        for _, write in switches:
            write(False)
        yield
    finally:
        for (_, write), value in zip(switches, before, strict=True):
            write(value)


def norms_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the norm of each dense tensor, by one fused operation where there is one.

    Returns:
        Scalars.

    Example:
        >>> [float(norm) for norm in norms_of([torch.tensor([3.0, 4.0]), torch.tensor([2.0])])]
        [5.0, 2.0]
    """
    if not tensors:
        return []
    fused = _attribute(torch, "_foreach_norm")
    return list(fused(list(tensors))) if fused is not None else [torch.linalg.vector_norm(t) for t in tensors]


def assert_on_device(condition: Tensor, message: str) -> None:
    """Fail if `condition` is false, without waiting for the device that computes it, where torch can: perhaps later."""
    unread = _attribute(torch, "_assert_async")
    if unread is not None:
        unread(condition, message)
    elif not condition:
        raise RuntimeError(message)


def has_gradient_hooks(leaf: Tensor) -> bool:
    """Tell whether hooks of the user's change the gradient of a leaf.

    Returns:
        Whether it has hooks of `Tensor.register_hook`. (DDP's are on the node of the graph, and not among them.)

    Example:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> handle = weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
        >>> has_gradient_hooks(weight), handle.remove(), has_gradient_hooks(weight)
        (True, None, False)
    """
    # where torch has no such attribute nothing can be known; then hooks count as there, which costs memory at most
    return bool(getattr(leaf, "_backward_hooks", True))


def has_hooks_after_accumulation(leaf: Tensor) -> bool:
    """Tell whether something of the user's acts as soon as the ``.grad`` of a leaf is complete.

    Returns:
        Whether it has hooks of `Tensor.register_post_accumulate_grad_hook` (an optimizer step within the backward).

    Example:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> handle = weight.register_post_accumulate_grad_hook(lambda parameter: None)
        >>> has_hooks_after_accumulation(weight), has_gradient_hooks(weight)
        (True, False)
    """
    return bool(getattr(leaf, "_post_accumulate_grad_hooks", True))


def hidden_from_modes() -> AbstractContextManager[None]:
    """Hide what runs inside from all `TorchFunctionMode`s."""
    disable = _attribute(torch._C, "DisableTorchFunction")
    return nullcontext() if disable is None else disable()


_POP, _PUSH, _STACK = (f"overrides.{name}" for name in ("_pop_mode", "_push_mode", "_get_current_function_mode_stack"))
_SKIP = "_dynamo.eval_frame.skip_code"


def can_trace_modes() -> bool:
    """Whether torch has all that it takes to have a mode of ours traced into a graph; else parts run uncompiled."""
    return all(_attribute(torch, name) is not None for name in (_POP, _PUSH, _STACK, _SKIP))


def active_modes() -> list[TorchFunctionMode]:
    """Return the modes that are on, the outermost first; none where torch cannot be asked."""
    stack = _attribute(torch, _STACK)
    return [] if stack is None else list(stack())


_current_mode = _attribute(torch, "overrides._get_current_function_mode")


def a_mode_is_on() -> bool:
    """Whether a mode is to be offered what is called; in a graph `has_torch_function` does not say that."""
    return _current_mode is not None and _current_mode() is not None


def traced_from_outside_only(function: Callable[..., Any]) -> None:
    """Let Dynamo go through a function where it traces the caller, but make no graph of the function by itself.

    A mode's ``__torch_function__`` is called out of frames that Dynamo leaves alone (torch's own layers); a graph made
    of it there is guarded by too little, and answers for another function than it was made for.
    """
    skip = _attribute(torch, _SKIP)
    if skip is not None:  # see `can_trace_modes`
        skip(function.__code__)


@contextmanager
def modes_aside(kind: type[TorchFunctionMode]) -> Iterator[None]:
    """Let the modes of a class not see what runs inside, while all others do, and may be entered and left."""

    def exchange(modes: Sequence[TorchFunctionMode]) -> None:
        for _ in active_modes():
            _attribute(torch, _POP)()
        for mode in modes:
            _attribute(torch, _PUSH)(mode)

    modes = active_modes()
    exchange([mode for mode in modes if not isinstance(mode, kind)])
    try:
        yield
    finally:
        exchange(modes)


def set_version(tensor: Tensor, version: int) -> None:
    """Let a tensor count the changes made in place from another number on.

    Autograd compares that number with what it was when the tensor was saved. Where torch has no way to set it, a
    backward through what was saved raises, and nothing is wrong without a word.

    Example:
        >>> weight = torch.zeros(2).add_(1)
        >>> set_version(weight, 0)
        >>> weight._version
        0
    """
    write = _attribute(torch._C, "_autograd._unsafe_set_version_counter")
    if write is None or tensor._version == version:
        return
    try:
        write((tensor,), (version,))
    except TypeError:  # before torch 2.7
        write(tensor, version)


def keeping_donated_buffers() -> AbstractContextManager[None]:
    """Let what is compiled meanwhile be differentiated more than once."""
    return _patched("_functorch.config", "donated_buffer", False)


def keeping_side_effects_out_of_recomputation() -> AbstractContextManager[None]:
    """Let what is compiled meanwhile take note of things inside checkpoints, once; without, the graph breaks there."""
    return _patched("_dynamo.config", "skip_fwd_side_effects_in_bwd_under_checkpoint", True)


def many_graphs() -> AbstractContextManager[None]:
    """Let one function have as many graphs as there are rules that it runs under, in one process (8 otherwise)."""
    return _patched("_dynamo.config", "recompile_limit", 100)


def stance(name: str) -> AbstractContextManager[None]:
    """Say what is to become of what is compiled, as `torch.compiler.set_stance` does, as often as one likes."""
    kind = _attribute(torch, "_dynamo.eval_frame.DynamoStance")
    if kind is None or not _loses_none():
        return torch.compiler.set_stance(name)  # type: ignore[no-any-return]
    return _patched("_dynamo.eval_frame", "_stance", kind(name))


@cache
def _loses_none() -> bool:
    """Whether `set_stance` takes a reference from None each time (torch 2.6): after some thousand, Python 3.11 dies."""
    ask = _attribute(torch, "_C._dynamo.eval_frame.get_eval_frame_callback") or (lambda: None)
    before = sys.getrefcount(None)
    for _ in range(100):
        ask()
    return before - sys.getrefcount(None) > 50


@contextmanager
def _patched(path: str, name: str, value: Any) -> Iterator[None]:
    # not by config.patch, of which each call leaves a context variable behind for good (torch 2.13)
    config = _attribute(torch, path)
    with ExitStack() as undone:
        if hasattr(config, name):
            undone.callback(setattr, config, name, getattr(config, name))
            setattr(config, name, value)
        yield


def dynamo_counts(kind: str) -> Counter[str]:
    """What Dynamo has counted so far of a kind, by the first line of each name; nothing where a release does not."""
    counters = _attribute(torch, "_dynamo.utils.counters") or {kind: {}}
    return Counter({str(name).partition("\n")[0]: count for name, count in counters[kind].items()})


def recompile_limits() -> tuple[type[Exception], ...]:
    """What Dynamo raises where one function would have too many graphs; nothing where a release has no name for it."""
    names = ("RecompileLimitExceeded", "FailOnRecompileLimitHit")  # of torch 2.6, and since
    return tuple(filter(None, (_attribute(torch, f"_dynamo.exc.{name}") for name in names)))


def is_made_a_graph() -> bool:
    """Whether what runs now runs to be made a graph of (its tensors are fake), long after Dynamo went through it."""
    context = _attribute(torch, "_guards.TracingContext.try_get")
    return context is not None and context() is not None


def is_compiled_wrapper(module: nn.Module) -> bool:
    """Whether `module` is what `torch.compile` made of another module."""
    known = _attribute(torch, "_dynamo.eval_frame.OptimizedModule")
    return isinstance(module, known) if known is not None else type(module).__name__ == "OptimizedModule"


# ---------------------------------------------------------------- layers
def _layers(base: str, known: str) -> tuple[type[nn.Module], ...]:
    """A common base class that torch keeps to itself; without it the classes that are known to have it."""
    found = _attribute(nn, base)
    return tuple(getattr(nn, name) for name in known.split()) if found is None else (found,)


DROPOUT_LAYERS = _layers(
    "modules.dropout._DropoutNd", "Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout"
)
"""Torch's dropout layers, for `isinstance`."""
NORM_LAYERS = _layers(
    "modules.batchnorm._NormBase",
    "BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm InstanceNorm1d InstanceNorm2d InstanceNorm3d",
)
"""Torch's layers with the statistics of batches."""
