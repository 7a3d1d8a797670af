"""Which estimators work for which dropout site and which loss of a step: found by trying, not by looking it up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dropreg.errors import DropregError, UnsupportedSiteError
from lightning_dropreg.estimators import ESTIMATORS
from lightning_dropreg.estimators.curvature import element_weights, factor, matrix, pair_quadratic_form, quadratic_form
from lightning_dropreg.inspection.derivatives import compare_derivatives, measure_targets
from lightning_dropreg.inspection.first_step import inspect_step
from lightning_dropreg.interception.sites import Site
from lightning_dropreg.losses import Loss
from lightning_dropreg.passes import Closure, Pass, focus
from lightning_dropreg.passes.gradients import gradients_aside, leaves_below
from lightning_dropreg.passes.isolation import Isolation

__all__ = ["LossSupport", "SiteSupport", "Support", "failure", "find_support"]

_CURVATURE, _STEP = "loss_hessian", 0.1
_LARGE = 2000  # outputs of a batch: `exact` takes a backward pass for each


@dataclass(frozen=True)
class SiteSupport:
    """A dropout site, and why estimators cannot treat it: the reason by estimator, nothing for those that can."""

    site: Site
    refused: Mapping[str, str]


@dataclass(frozen=True)
class LossSupport:
    """A recognized loss: its function, the shape ``(T, C)`` of its outputs, and the reason by estimator that cannot."""

    name: str
    shape: tuple[int, ...]
    refused: Mapping[str, str]


@dataclass(frozen=True)
class Support:
    """What was found in a step.

    Attributes:
        sites: Its dropout sites in order.
        losses: Its recognized losses in order.
        problems: Everything that keeps the step from being regularized, whatever the estimator.
        untried: Why an estimator was not tried on the losses, by estimator.
        kinks: How often the loss has operations with a kink behind a site, by name
            (`lightning_dropreg.inspection.kinks`).
    """

    sites: Sequence[SiteSupport]
    losses: Sequence[LossSupport]
    problems: Sequence[DropregError]
    untried: Mapping[str, str] = field(default_factory=dict)
    kinks: Mapping[str, int] = field(default_factory=dict)


def find_support(closure: Closure, *, module: nn.Module | None = None) -> Support:
    """Try every estimator on every dropout site and loss of a step.

    A step that an estimator takes as a whole needs one trial; otherwise the sites are tried one by one. Gradients,
    random state and the state of `module` are put back.

    Args:
        closure: Runs forward and loss with the model in training mode; returns the scalar loss.
        module: A module whose state must not advance.

    Returns:
        What was found.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.25))
        >>> found = find_support(lambda: nn.functional.l1_loss(net(torch.ones(5, 2)), torch.zeros(5, 3)))
        >>> [(each.site.name, dict(each.refused)) for each in found.sites]
        [('1', {})]
        >>> [(each.name, each.shape, sorted(each.refused)) for each in found.losses]
        [('l1_loss', (5, 3), ['antithetic', 'double_backward', 'exact', 'forward'])]
    """
    with Isolation(module) as isolation:

        def run() -> Tensor:
            return isolation.run(closure, trace=False)

        done, problems = inspect_step(run, need_losses=True)
        losses, untried = _losses(done)
        sites = _sites(run, done.sites, problems)
        if not problems and done.sites:
            sites = _compared(run, sites, _CURVATURE if losses else None)
            targets = measure_targets(run).problem if losses else None
            if targets is not None:
                losses = [replace(each, refused=dict.fromkeys(ESTIMATORS, str(targets))) for each in losses]
        return Support(sites, losses, problems, untried, done.kinks)


def _sites(run: Closure, sites: Sequence[Site], problems: Sequence[DropregError]) -> list[SiteSupport]:
    broken = next((str(problem) for problem in problems if isinstance(problem, UnsupportedSiteError)), "")
    if broken:  # no pass gets through
        return [SiteSupport(site, dict.fromkeys(ESTIMATORS, broken)) for site in sites]
    refused: list[dict[str, str]] = [{} for _ in sites]
    for name in ESTIMATORS if sites else ():
        if not failure(run, name):
            continue
        for index, reasons in enumerate(refused):
            with focus(index):
                reason = failure(run, name)
            if reason:
                reasons[name] = reason
    return [SiteSupport(site, reasons) for site, reasons in zip(sites, refused, strict=True)]


def failure(closure: Closure, estimator: str) -> str:
    """Say why an estimator cannot take a step; nothing if it can.

    Returns:
        The reason.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.25))
        >>> failure(lambda: net(torch.ones(5, 2)).sum(), "forward")
        ''
    """
    return _reason(_noise, closure, estimator)


def _compared(run: Closure, sites: Sequence[SiteSupport], curvature: str | None) -> list[SiteSupport]:
    """Refuse estimators where the derivatives that they follow are not those of the function."""
    names = [each.site.name for each in sites]
    refused = [dict(each.refused) for each in sites]
    for estimator in ESTIMATORS:
        if any(estimator in each for each in refused):
            continue
        found = compare_derivatives(run, estimator, curvature=curvature, names=names)
        for index in found.sites:
            refused[index][estimator] = str(found.measured.problem)
    return [SiteSupport(each.site, reasons) for each, reasons in zip(sites, refused, strict=True)]


def _noise(run: Closure, estimator: str) -> None:
    """The noise takes the same derivatives as the penalty, and any loss will do."""
    estimate = ESTIMATORS[estimator](run, curvature=None, noise=True, step_size=_STEP, mask="as_model", key=0)
    assert estimate.noise is not None
    gradient_norm(estimate.noise + estimate.loss)


def gradient_norm(value: Tensor) -> float:
    """Back-propagate as a Trainer would, leave all gradients as they were, and return the norm in all leaves."""
    leaves = leaves_below(value)
    with gradients_aside(leaves):
        value.backward()
        return math.sqrt(sum(float(leaf.grad.square().sum()) for leaf in leaves if leaf.grad is not None))


def _losses(done: Pass) -> tuple[list[LossSupport], dict[str, str]]:
    outputs = sum(loss.outputs.numel() for loss in done.losses)
    untried = (
        {"exact": f"exact was not tried: it takes {outputs:,} backward passes, one for each output"}
        if outputs > _LARGE
        else {}
    )
    found = []
    for loss in done.losses:
        reasons = {name: _reason(_try, name, loss, done.loss) for name in ESTIMATORS if name not in untried}
        refused = {name: reason for name, reason in reasons.items() if reason}
        found.append(LossSupport(loss.name, tuple(loss.outputs.shape), refused))
    return found, untried


def _try(estimator: str, loss: Loss, total: Tensor) -> None:
    """Do with a loss what the estimator does with it."""
    loss.check()
    [weights] = element_weights(total, [loss])
    z = loss.outputs
    if estimator == "antithetic":
        pair_quadratic_form(_CURVATURE, loss, loss, weights, _STEP)
    elif estimator == "forward":
        quadratic_form(_CURVATURE, loss, z, torch.ones_like(z), loss.per_element(loss.elements), weights)
    elif estimator == "double_backward":
        factor(_CURVATURE, loss, weights, torch.Generator(z.device).manual_seed(0))
    else:
        matrix(_CURVATURE, loss, weights)


def _reason(attempt: Callable[..., None], *args: Any) -> str:
    """Why `attempt` fails; empty if it does not."""
    try:
        attempt(*args)
    except DropregError as error:
        return str(error)
    except (RuntimeError, NotImplementedError) as error:  # torch's own
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return ""
