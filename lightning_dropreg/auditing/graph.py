"""What the graph of a step shows: the mask of the backward, and dropout on an output or right before it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_dropreg.auditing.calls import Call, LossCall, Recorder
from lightning_dropreg.auditing.masks import digest
from lightning_dropreg.numerics.torch_private import has_hooks_after_accumulation
from lightning_dropreg.passes.gradients import gradients_aside

__all__ = ["OutputDropout", "on_outputs", "other_masks"]

# what changes the shape of an output, or its form, and not what it says
_PASSING = re.compile(r"View|Reshape|Transpose|Permute|Squeeze|^T$|Copy|Clone|Alias|Softmax|Sigmoid|Slice|Select")
_REDUCING = re.compile(r"Mean|Sum|Div|Mul|Sqrt|Copy")
_REGRESSIONS = frozenset({"mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "gaussian_nll_loss"})
_ROUNDING = {torch.float16: 5e-3, torch.bfloat16: 2e-2}
_BY_HAND = "a loss of differences"
# where a linear layer has what goes into it: number of the edge, and the names of what it keeps
_LINEAR = {"Addmm": (1, "_saved_mat1", "_saved_mat2"), "Mm": (0, "_saved_self", "_saved_mat2")}


class OutputDropout(NamedTuple):
    """A dropout on what a loss is given, or right before the last layer of a regression.

    Attributes:
        loss: The loss.
        call: The dropout.
        linear: Whether a linear layer stands between them.
        ratio: Variance that the masks give to an output, over the variance that it has over the rows; None if unknown.
        rows: Number of rows.
    """

    loss: LossCall
    call: Call
    linear: bool
    ratio: float | None
    rows: int


def other_masks(watch: Recorder, module: nn.Module, loss: Tensor | None) -> tuple[list[tuple[Call, str]], str]:
    """Compare the gradient at each dropout, and what checkpoints compute again, with the masks of the forward.

    Returns:
        The calls that have another mask in the backward, and by how much; and why there is no backward, or "".
    """
    if loss is None or not loss.requires_grad or not watch.calls:
        return [], ""
    calls = [call for call in watch.calls if call.before is not None and call.after is not None]
    # what is asked for where no dropout has a gradient is only for what checkpoints compute again
    edges: list[Any] = [edge for call in calls for edge in (call.before, call.after) if edge is not None]
    edges = edges or [parameter for parameter in module.parameters() if parameter.requires_grad]
    gradients: Sequence[Tensor | None] = ()
    watch.backward, forward, why = True, len(watch.calls), ""
    try:
        gradients = torch.autograd.grad(loss, edges, allow_unused=True, retain_graph=True)
    except RuntimeError as error:
        if not _went_backward(module, loss):
            why = f"{type(error).__name__}: {error}"[:200]
    finally:
        again = watch.calls[forward:]
        del watch.calls[forward:]  # what a checkpoint computes again is no draw
        watch.backward = False
    found = [
        (call, evidence)
        for call, before, after in zip(calls, gradients[::2], gradients[1::2], strict=False)
        if before is not None and after is not None
        for evidence in _other_mask(call, before, after)
    ]
    return found + _drawn_again(watch.calls, again, {call.place.path for call, _ in found}), why


def _went_backward(module: nn.Module, loss: Tensor) -> bool:
    """Whether a whole backward could be run: reentrant checkpoints refuse any other, and it must set nothing off."""
    parameters = list(module.parameters())
    if torch.distributed.is_initialized() or any(map(has_hooks_after_accumulation, parameters)):
        return False
    with gradients_aside(parameters), suppress(RuntimeError):
        loss.backward()
        return True
    return False


def _drawn_again(forward: Sequence[Call], again: Sequence[Call], told: set[str]) -> list[tuple[Call, str]]:
    """Compare what checkpoints compute again with what they computed first, in any order of the checkpoints."""
    found = []
    for path, call in {
        call.place.path: call for call in reversed(forward)
    }.items():  # the line is another in a backward
        first, second = (
            [one.mask.kept for one in calls if one.mask is not None and one.place.path == path]
            for calls in (forward, again)
        )
        wanted = set(map(digest, first))
        others = [kept for kept in second if digest(kept) not in wanted]
        if others and path not in told:
            evidence = f"{len(others)} of {len(second)} masks that the backward computes again are none of the forward"
            found.append((call, evidence))
    return found


def _other_mask(call: Call, before: Tensor, after: Tensor) -> Iterator[str]:
    """Compare the gradients of what went into a dropout and of what came out with its mask; what speaks against it."""
    # attention, linear in its values, can be compared only as a whole: by the products of gradient and tensor
    if call.tensors is not None:
        value, output = call.tensors
        went_in, came_out = (float((a.double() * b.double()).sum()) for a, b in ((before, value), (after, output)))
        size = float((after.double() * output.double()).abs().sum())
        if abs(went_in - came_out) > _ROUNDING.get(output.dtype, 1e-4) * size:
            yield f"gradient times values is {went_in:.4g}, gradient times output {came_out:.4g}: not equal"
        return
    if call.mask is None or call.mask.kept.shape != before.shape:
        return
    told = call.mask.known & (after.abs() > 1e-6 * after.abs().max())
    wrong = int(((before != 0) != call.mask.kept)[told].sum())
    if wrong:
        yield f"in {wrong} of {int(told.sum())} entries the gradient has another mask than the output"


def on_outputs(losses: Sequence[LossCall], calls: Sequence[Call], loss: Tensor | None) -> list[OutputDropout]:
    """Walk back in the graph from what each loss is given to the dropout that made it, if one did.

    Args:
        losses: The losses, while their graph is alive.
        calls: The dropouts.
        loss: What the step returned: where no loss function was called, a squared or absolute difference is looked for.

    Returns:
        The dropouts on outputs, and those with one linear layer between in a regression.
    """
    made = {call.after.node: call for call in calls if call.after is not None}
    found = []
    for one in losses or _by_hand(loss):
        node = _back(one.node, made)
        if node in made:
            found.append(OutputDropout(one, made[node], False, None, 0))
        elif one.name in _REGRESSIONS or one.name == _BY_HAND:
            edge, *kept = _LINEAR.get(_name(node), (None, ""))
            before = None if edge is None else _back(node.next_functions[edge][0], made)
            if before in made:
                found.append(OutputDropout(one, made[before], True, *_noise(node, kept, made[before].p)))
    return found


def _back(node: Any, made: dict[Any, Call]) -> Any:
    while node is not None and node not in made and _PASSING.search(_name(node)) and node.next_functions:
        node = node.next_functions[0][0]
    return node


def _name(node: Any) -> str:
    return "" if node is None else re.sub(r"Backward\d*$", "", node.name().lstrip("_"))


def _by_hand(loss: Tensor | None) -> Iterator[LossCall]:
    """Losses like ``(prediction - target).square().mean()``."""
    node: Any = None if loss is None else loss.grad_fn
    while _REDUCING.search(_name(node)) and node.next_functions:
        node = node.next_functions[0][0]
    if _name(node) in {"Pow", "Abs"}:
        difference = node.next_functions[0][0]
        if _name(difference) == "Sub":
            for side, _ in difference.next_functions:
                yield LossCall(_BY_HAND, side, ())


def _noise(node: Any, kept: Sequence[str], p: float | None) -> tuple[float | None, int]:
    """Compare the variance that masks give to a linear layer's output with that over the rows.

    What is kept is ``h / (1 - p)``, so that ``p`` times its square has the mean ``h^2 p / (1 - p)``.

    Returns:
        The ratio, None where it is not known, and the number of rows.
    """
    try:
        h, weight = (getattr(node, name).detach().double() for name in kept)
    except (AttributeError, RuntimeError):  # nothing is kept for a frozen weight, or it is gone
        return None, 0
    rows = h.shape[0]
    if p is None or rows < 2:
        return None, rows
    masks = float(p * (h.square() @ weight.square()).mean())
    spread = float((h @ weight).var(0).mean()) - masks
    return masks / max(spread, 1e-3 * masks, 1e-300), rows
