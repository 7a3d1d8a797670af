"""Whether the loss that a step returned is made of recognized losses, and of nothing else that depends on dropout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_dropreg.errors import InvalidArgumentError, LossNotRecognizedError
from lightning_dropreg.interception.mode import Interception
from lightning_dropreg.interception.sites import Site
from lightning_dropreg.losses import RECOGNIZED, Loss
from lightning_dropreg.numerics.graph import nodes_behind

__all__ = ["check_loss", "check_losses", "site_past_losses", "used_losses"]


def check_losses(loss: Tensor, interception: Interception) -> None:
    """Refuse a pass in which no loss was recognized, or not all of the returned loss."""
    if not interception.losses:
        raise LossNotRecognizedError(
            "The step returned a loss, but none of the loss functions that this package knows was called on the way "
            f"({', '.join(_torch_losses())} of torch.nn.functional, or the modules "
            f"around them), so the curvature of the loss in the model's output is unknown.{_refused(interception)} "
            "Compute the loss with one of them, make your own known with lightning_dropreg.recognize, or use "
            "ImplicitNoise, which needs no curvature, or curvature='full', which takes that of any loss."
        )
    if len(interception.losses) == 1 and interception.losses[0].is_all_of(loss):
        by = interception.losses[0].denominator
        if not (isinstance(by, Tensor) and by.requires_grad):  # a sum of weights that are computed with dropout
            return
    names = ", ".join(recorded.name for recorded in interception.losses)
    site, found = site_past_losses(loss, interception.losses, interception.sites, interception.site_nodes)
    if site is not None:
        raise LossNotRecognizedError(
            f"A part of the returned loss depends on the dropout site {_called(site)} by a way that does "
            f"not lead through a recognized loss function (found: {names}), so its "
            f"curvature is unknown and the penalty would miss it.{_refused(interception)} Compute that part with "
            "a loss function of torch.nn.functional that this package knows, make it known with "
            "lightning_dropreg.recognize, or leave it out of the returned loss."
        )
    if not found:
        raise LossNotRecognizedError(
            f"{names} was computed, but the returned loss does not depend on "
            "it. Return the loss that these functions gave (reduced, masked or weighted as you like)."
        )


def site_past_losses(
    loss: Tensor, losses: Sequence[Loss], sites: Sequence[Site], nodes: Sequence[Any]
) -> tuple[Site | None, bool]:
    """Look for a dropout site that acts on the returned loss past all recognized losses.

    Walks the autograd graph from the returned loss, not entering the elements of recognized losses: usually that is
    the user's reduction and nothing else. A dropout site found on the way is acted on by something unknown.

    Args:
        loss: The loss that the step returned.
        losses: The losses recognized in it.
        sites: The dropout sites.
        nodes: The node of the autograd graph at which each site's result was made; None for a constant.

    Returns:
        Such a site, or None, and whether a recognized loss was met on the way.
    """
    elements = {recorded.elements.grad_fn for recorded in losses}
    of_node = {node: site for node, site in zip(nodes, sites, strict=True) if node}
    found = False
    for node in nodes_behind(loss, ends=elements):
        if node in elements:
            found = True
        elif node in of_node:
            return of_node[node], found
    return None, found


def _torch_losses() -> list[str]:
    return sorted(known.__name__ for known in RECOGNIZED if known.__module__ == F.__name__)


def _called(site: Site) -> str:
    return f"{site.name} ({site.kind})" if site.name else f"with p={site.p:g} and shape {site.shape} ({site.kind})"


def _refused(interception: Interception) -> str:
    return f" ({'; '.join(interception.refused)}.)" if interception.refused else ""


def used_losses(total: Tensor, losses: list[Loss]) -> list[Loss]:
    """Leave out losses that the returned one does not use: to log, or of an earlier backward of a manual step.

    They count nothing, and their part of the graph may be of parameters that have changed since.

    Args:
        total: The loss that the step returned.
        losses: The losses recognized in it.

    Returns:
        Those that it uses; all of them if it uses none, which is told elsewhere.
    """
    if len(losses) < 2:
        return losses
    ends = {loss.elements.grad_fn for loss in losses}
    met: set[object] = set()
    seen: set[object] = set()
    stack: list[Any] = [total.grad_fn]
    behind: list[Any] = []
    while (stack or behind) and met != ends:
        # a loss may be in the weight of another, or behind it; usually the user's reduction tells all
        node = stack.pop() if stack else behind.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in ends:
            met.add(node)
        (behind if node in ends else stack).extend(following for following, _ in node.next_functions)
    return [loss for loss in losses if loss.elements.grad_fn in met] or losses


def check_loss(loss: object) -> None:
    """Refuse what is not a differentiable scalar loss: a tensor of one floating-point element that needs a gradient."""
    if not isinstance(loss, Tensor):
        found = type(loss).__name__
    elif loss.numel() != 1 or not loss.is_floating_point():
        found = f"a {loss.dtype} tensor of shape {tuple(loss.shape)}"
    elif not loss.requires_grad:
        found = "a tensor that does not require a gradient"
    elif loss.grad_fn is None and not isinstance(loss, nn.Parameter):
        # torch.tensor(value, requires_grad=True): a number that has lost where it comes from
        found = "a leaf, which has no graph, so it does not depend on the parameters"
    else:
        return
    raise InvalidArgumentError(
        f"The step must return a scalar loss that depends on parameters; it returned {found}. Return the loss before "
        ".item() or .detach(), reduced to one number."
    )
