"""What in a module or a Trainer keeps the callbacks from working, found without running anything."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.distributed.tensor import DTensor
from torch.nn.parameter import UninitializedParameter

from lightning_dropreg.errors import DropregError, InvalidArgumentError, UnsupportedModuleError
from lightning_dropreg.estimators import AUTO
from lightning_dropreg.numerics.graph import nodes_behind
from lightning_dropreg.passes.compiled import CompiledParts
from lightning_dropreg.session.ranks import unsupported_strategy
from lightning_dropreg.session.twins import is_a
from lightning_dropreg.step.plan import Plan

__all__ = [
    "changed_parameters",
    "compiled_problems",
    "fingerprints",
    "in_bfloat16",
    "is_line_search",
    "loss_problems",
    "module_problems",
    "takes_iterator",
]


def in_bfloat16(trainer: Trainer, module: LightningModule) -> bool:
    """Whether activations are in bfloat16."""
    return str(trainer.precision).startswith("bf16") or any(p.dtype == torch.bfloat16 for p in module.parameters())


def module_problems(trainer: Trainer, module: LightningModule, plan: Plan) -> list[UnsupportedModuleError]:
    """Find everything about the set-up that cannot work: one error for each problem, none is raised."""
    found = []
    if takes_iterator(module):
        found.append("training_step takes a dataloader_iter, which cannot be read twice. Take (batch, batch_idx).")
    if plan.noise_after_backward and any(is_line_search(o, fully=True) for o in trainer.optimizers):
        found.append(
            "ImplicitNoise adds to the gradients after the backward, and the optimizer searches along a line with "
            "values of the loss, which do not have the noise. Use injection='loss', or an optimizer without a line "
            "search."
        )
    strategy = type(trainer.strategy).__name__
    plain = is_a(trainer.strategy, SingleDeviceStrategy, DDPStrategy)
    if not module.automatic_optimization and not plain:
        found.append(
            f"The module optimizes manually, and its strategy is {strategy}, with which parameters cannot be put back "
            "to what they were before an optimizer's step. Use one device or DDP, or automatic optimization."
        )
    else:
        found += [f"{problem[0].upper()}{problem[1:]}" for problem in unsupported_strategy(trainer.strategy, plan)]
    for name, part in () if plan.untouched else module.named_modules():
        if isinstance(part, torch.jit.ScriptModule) and part.training and any(True for _ in part.buffers()):
            found.append(
                f"{name} is a TorchScript module with buffers in training mode (batch norm, say), which cannot be put "
                "back for every pass over a batch. Call .eval() on it, or use the module that it was made of."
            )
            break
    return [UnsupportedModuleError(problem) for problem in found]


def compiled_problems(module: nn.Module, plan: Plan) -> list[UnsupportedModuleError]:
    """Find compiled parts that a plan cannot do with; one error for each."""
    others = plan.estimators - {"antithetic", AUTO}
    return [
        UnsupportedModuleError(
            f"{name or 'The module itself'} is compiled by torch.compile, and a compiled graph has one backward and no "
            f"forward mode, which estimator={sorted(others)[0]!r} needs. Use estimator='antithetic', or train it "
            "uncompiled."
        )
        for name in (CompiledParts(module).parts if others else ())
    ]


def is_line_search(optimizer: torch.optim.Optimizer, fully: bool = False) -> bool:
    """Whether an optimizer is of LBFGS's kind; with `fully`, whether it compares values of the loss as well."""
    searches = any(group.get("line_search_fn") for group in optimizer.param_groups)
    return searches or (not fully and "LBFGS" in type(optimizer).__name__.upper())


def takes_iterator(module: LightningModule) -> bool:
    """Whether ``training_step`` fetches its batches itself."""
    return "dataloader_iter" in inspect.signature(module.training_step).parameters


def fingerprints(module: nn.Module) -> dict[str, tuple[int, int]]:
    """What shows that a parameter was changed: where it lies, and a checksum of its bits and of their order.

    Not its version: a parametrization that the step registers writes a parameter's own values into it.

    Returns:
        A mark for each parameter, by name.
    """
    return {name: (p.data_ptr(), _checksum(p.detach())) for name, p in module.named_parameters() if _has_values(p)}


def _checksum(values: Tensor) -> int:
    """Sum over the bits in words, each times a number that belongs to its place, modulo 2^64."""
    words, total = values.flatten().view(_WORDS[min(values.element_size(), 8)]), 0
    for start in range(0, words.numel(), _CHUNK):
        part = words[start : start + _CHUNK].long()
        places = torch.arange(start + 1, start + 1 + part.numel(), device=part.device) * _MIXER
        total += int(((part ^ part >> 32) * ((places ^ places >> 32) * _MIXER)).sum())
    return total % (1 << 64)


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20
_MIXER = 0x9E3779B97F4A7C15 - (1 << 64)  # odd; from the golden ratio


def changed_parameters(module: nn.Module, before: Mapping[str, object]) -> list[UnsupportedModuleError]:
    """Find parameters that a step changed by itself, given their `fingerprints` before it: one error or none."""
    changed = [name for name, mark in fingerprints(module).items() if mark != before.get(name, mark)] if before else []
    if not changed:
        return []
    return [
        UnsupportedModuleError(
            f"training_step changes parameters ({', '.join(changed)}), and it runs several times for a batch. "
            "Change them in on_train_batch_end (a moving average, say)."
        )
    ]


def loss_problems(trainer: Trainer, module: nn.Module, loss: Tensor) -> list[DropregError]:
    """Find a loss whose graph leads to no parameter, so that nothing would be trained: one error or none."""
    parameters = {p for p in module.parameters() if p.requires_grad}
    parameters.update(
        p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]
    )
    sharded = any(isinstance(p, DTensor) for p in parameters)  # the graph has what was gathered of them
    if loss.grad_fn is None or sharded or _leads_to(loss, parameters):
        return []
    return [
        InvalidArgumentError(
            f"The loss of {type(module).__name__} does not depend on any of its parameters that need a gradient: on "
            "the way there it was detached (.detach(), .item(), torch.tensor(...), no_grad). Return the loss as it was "
            "computed."
        )
    ]


def _leads_to(loss: Tensor, parameters: set[nn.Parameter]) -> bool:
    """Whether a parameter is in the graph, as far as that can be seen: not into functions of one's own."""
    return any(
        isinstance(node, BackwardCFunction) or getattr(node, "variable", None) in parameters
        for node in nodes_behind(loss)
    )


def _has_values(parameter: nn.Parameter) -> bool:
    # what FSDP2 shards is gathered and let go around every forward
    unknown = isinstance(parameter, (UninitializedParameter, DTensor)) or parameter.is_meta
    return not unknown and parameter.layout is torch.strided
