"""What the package does, without Lightning: read this file first.

A *dropout site* is a place where a model drops entries of a tensor, with `torch.nn.functional.dropout` or one of its
many relatives. A *rule* says what happens there instead: nothing, dropout with a mask of ours, a small step in a random
direction. A *pass* is one run of your own code under one rule (`lightning_dropreg.passes.run_pass`). Each function
takes your code as a `closure`, which runs forward and loss and returns the loss; makes a few passes of it that differ
in nothing but the rule; and puts their losses together, as `lightning_dropreg.step.plan` and
`lightning_dropreg.estimators` say. The callbacks do the same with a ``training_step``.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from lightning_dropreg.functional import regularize
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 2))
    >>> x, y = torch.randn(16, 3), torch.randint(2, (16,))
    >>> closure = lambda: nn.functional.cross_entropy(net(x), y)
    >>> regularize(closure).total.backward()  # Algorithm 2, from two passes

The closure runs once or several times per call, always from the same global random state; the noise at the sites does
not touch that state beyond one number drawn for each call. A `module` given along has its batch-norm statistics, hidden
states and metrics advanced once.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_dropreg.checks import (
    SITES,
    check_choice,
    check_count,
    check_draws,
    check_flags,
    check_strength,
)
from lightning_dropreg.errors import InvalidArgumentError, UnboundedPenaltyWarning
from lightning_dropreg.estimators import AUTO
from lightning_dropreg.estimators.curvature import FULL, UNBOUNDED
from lightning_dropreg.estimators.r_drop import RDropped, r_drop
from lightning_dropreg.inspection.choice import too_small
from lightning_dropreg.inspection.support import find_support
from lightning_dropreg.interception.sites import Site
from lightning_dropreg.passes import Closure, Off, run_pass
from lightning_dropreg.passes.isolation import Isolation
from lightning_dropreg.step.closures import OnRows, run_plan
from lightning_dropreg.step.plan import Estimation, NoiseSettings, PenaltySettings, Plan
from lightning_dropreg.step.settings import AUTO_FRACTION, check_curvature, check_estimation, check_fraction

__all__ = [
    "RDropped",
    "Regularized",
    "dropout_loss",
    "explicit_penalty",
    "find_sites",
    "find_support",
    "implicit_noise",
    "plain_loss",
    "r_drop",
    "regularize",
]


class Regularized(NamedTuple):
    """What `regularize` found in one batch: scalars with an autograd graph.

    Attributes:
        loss: The loss without dropout (from an antithetic pair up to ``O(step_size**2)``).
        penalty: The explicit penalty, without its strength; None if there is none.
        noise: The scaled scalar whose gradient is ``xi_approx``, as it is in `total`; None if there is none.
        total: ``loss + strength * penalty + noise``, to be differentiated.
    """

    loss: Tensor
    penalty: Tensor | None
    noise: Tensor | None
    total: Tensor


def regularize(
    closure: Closure,
    *,
    penalty: bool = True,
    noise: bool = True,
    strength: float = 1.0,
    noise_strength: float = 1.0,
    curvature: str = "loss_hessian",
    estimator: str = "antithetic",
    step_size: float = 0.1,
    mask: str = "as_model",
    batch_fraction: float | str | None = None,
    rows: OnRows | None = None,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    module: nn.Module | None = None,
) -> Regularized:
    """Compute loss, penalty and noise of one batch from one set of passes: Algorithm 2 for a loop of your own.

    By default the closure runs twice.

    Args:
        closure: Runs forward and loss with the model in training mode; returns the scalar loss.
        penalty: Whether the explicit penalty is wanted.
        noise: Whether the implicit noise is wanted.
        strength: Factor of the penalty, at least 0; 1 is the second-order value.
        noise_strength: Factor of the noise's standard deviation, at least 0.
        curvature: See `explicit_penalty`, as for the next three; ``"full"`` takes a third pass.
        estimator: See there.
        step_size: See there.
        mask: See there.
        batch_fraction: Fraction ``f`` of the rows, drawn afresh every time, on which penalty and noise are estimated,
            in ``(0, 1]``: one pass over the batch and two over these rows. The loss must be a mean over the rows, and
            for the noise no mask may be shared between rows, which is tried the first time. None for all rows.
            ``"auto"`` for a quarter, unless the batch or the model is so small, or the model is recurrent (it takes as
            many steps in time for few rows as for all), that fewer rows take as long; the model is `module`.
        rows: What runs forward and loss on some rows, given their numbers: ``lambda i: loss(net(x[i]), y[i])``.
        batch_size: Number of rows; needed with `batch_fraction`, as is `rows`.
        generator: Source of the seed of the noise; the global one by default. Processes of one group draw different
            noise from equal generators.
        module: A module whose state must advance once although the closure is called several times.

    Returns:
        Loss, penalty, noise and their total.

    Raises:
        InvalidArgumentError: If an argument is out of range or unknown, or the closure returns no scalar loss.
        NoDropoutSiteError: If nothing was dropped.
        LossNotRecognizedError: If the curvature of the loss is unknown.
        UnsupportedSiteError: If there is a kind of dropout that the package does not understand, or rows share the
            noise of one with `batch_fraction`.
        UnsupportedRowsError: If some of the rows do not stand for all, with `batch_fraction`.
        UnsupportedOperationError: If the model has an operation that the estimator cannot differentiate.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 2))
        >>> x, y = torch.randn(16, 3), torch.randint(2, (16,))
        >>> found = regularize(lambda: nn.functional.cross_entropy(net(x), y), strength=2.0, module=net)
        >>> torch.equal(found.total, found.loss + 2.0 * found.penalty + found.noise)
        True
    """
    check_flags(penalty=penalty, noise=noise)
    fraction = check_fraction(batch_fraction)
    if batch_fraction is not None:
        check_count("batch_size", batch_size)
        if rows is None:
            raise InvalidArgumentError(
                f"batch_fraction={batch_fraction!r} needs rows=, what runs forward and loss on the rows of given "
                "numbers: lambda i: loss(net(x[i]), y[i])."
            )
    if batch_fraction == AUTO and module is not None and not any(isinstance(m, nn.RNNBase) for m in module.modules()):
        count = batch_size or 0
        small = too_small(count, count, sum(p.numel() for p in module.parameters() if p.requires_grad))
        fraction = None if small else AUTO_FRACTION
    how = _how(estimator, step_size, mask, fraction)
    plan = Plan(
        penalty=_penalty(strength, curvature, how) if penalty else None,
        noise=NoiseSettings(check_strength(noise_strength, "noise_strength"), "taylor", "loss", how) if noise else None,
    )
    found = run_plan(plan, closure, generator, module, rows, batch_size)
    return Regularized(found.loss, found.penalty, found.noise, found.total)


def explicit_penalty(
    closure: Closure,
    *,
    curvature: str = "loss_hessian",
    estimator: str = "antithetic",
    step_size: float = 0.1,
    mask: str = "as_model",
    generator: torch.Generator | None = None,
    module: nn.Module | None = None,
) -> Tensor:
    r"""Estimate the explicit regularization effect of dropout, ``R_approx`` of (4.4), on one batch.

    .. math::
        R = \tfrac12 \sum_i \frac{q_i}{1-q_i} \langle J_i^\top H_{out} J_i, \mathrm{diag}(h_i^2) \rangle

    averaged over examples or tokens as the loss itself is. This is the second-order value: add it with factor 1.

    Args:
        closure: Runs forward and loss with the model in training mode; returns the scalar loss.
        curvature: ``"loss_hessian"`` (4.4), or ``"identity"`` or ``"loss_jacobian"`` (5.1), the ablations of
            section 5.2, or ``"full"``: half the second derivative of the loss in the noise, (4.2) with the term that
            (4.3) drops. That needs no recognized loss, for `estimator="antithetic"` a third pass, and is not bounded
            below: see `lightning_dropreg.ExplicitPenalty`.
            The ablations speak of *examples* and *outputs*: an example is a row of what the loss function was
            given (an entry of its first dimension), or a token where the function has one element for each, as
            ``cross_entropy`` has; an output is a logit, or another number compared with the target, and for
            ``nll_loss`` and ``kl_div`` the logit behind ``log_softmax``. ``"identity"`` takes the mean over the outputs
            of an example, ``"loss_jacobian"`` squares the derivative of the example's loss; each example counts as it
            does in the loss. How the loss is spelled makes no difference.
        estimator: ``"antithetic"``, ``"forward"``, ``"double_backward"`` or ``"exact"``; ``"auto"`` looks at the step
            (one more pass in every call, two where there are kinks) and takes one of the first two, see
            `lightning_dropreg.inspection.choice`.
        step_size: Step of the antithetic pair, relative to the size of the noise; errors fall as its square. In
            bfloat16 a wider one is taken where drop probabilities are small, see
            `lightning_dropreg.estimators.precision.bfloat16_step_size`.
        mask: ``"as_model"`` gives the noise the shape of the model's masks, ``"elementwise"`` draws each entry alone.
        generator: Source of the seed of the noise; the global one by default.
        module: A module whose state must advance once although the closure is called twice.

    Returns:
        Scalar tensor with a graph. It is nonnegative for convex losses with nonnegative weights, unless the curvature
        is ``"full"``.

    Raises:
        InvalidArgumentError: If an argument is out of range or unknown, or the closure returns no scalar loss.
        NoDropoutSiteError: If nothing was dropped.
        LossNotRecognizedError: If the curvature of the loss is unknown.
        UnsupportedSiteError: If there is a kind of dropout that the package does not understand.
        UnsupportedOperationError: If the model has an operation that the estimator cannot differentiate.

    Example:
        One linear layer under squared error, where ``R = c x^2 w^2``:

        >>> w = torch.tensor([2.0], requires_grad=True)
        >>> x = torch.ones(1, 1)
        >>> closure = lambda: nn.functional.mse_loss(nn.functional.dropout(x, 0.5) * w, torch.zeros(1, 1))
        >>> round(explicit_penalty(closure).item(), 3)
        4.0
    """
    plan = Plan(penalty=_penalty(1.0, curvature, _how(estimator, step_size, mask)))
    penalty = run_plan(plan, closure, generator, module).penalty
    assert penalty is not None
    return penalty


def implicit_noise(
    closure: Closure,
    *,
    estimator: str = "antithetic",
    step_size: float = 0.1,
    mask: str = "as_model",
    generator: torch.Generator | None = None,
    module: nn.Module | None = None,
) -> Tensor:
    r"""Draw the implicit regularization effect of dropout: a scalar whose gradient is ``xi_approx`` of (4.6).

    .. math::
        s = \sum_i J_{loss,i} (\eta_i \odot h_i), \qquad \eta_i = \pm\sqrt{q_i/(1-q_i)}

    Its parameter gradient has mean zero and, to first order in ``q``, the covariance of the gradient noise of dropout.

    Args:
        closure: Runs forward and loss with the model in training mode; returns the scalar loss (any loss will do).
        estimator: ``"antithetic"``, ``"forward"``, ``"double_backward"`` or ``"exact"``; in smooth networks the same
            noise from all, the first up to ``step_size**2``. In networks with kinks (ReLU) the first is larger: its two
            passes may lie on different sides of a kink, and the difference of their gradients is divided by the step.
            `lightning_dropreg.inspection.kinks.noise_excess` measures how much.
        step_size: See `explicit_penalty`.
        mask: See `explicit_penalty`.
        generator: See `explicit_penalty`.
        module: See `explicit_penalty`.

    Returns:
        Scalar tensor with a graph, mean zero over draws.

    Raises:
        InvalidArgumentError: If an argument is out of range or unknown, or the closure returns no scalar loss.
        NoDropoutSiteError: If nothing was dropped.
        UnsupportedSiteError: If there is a kind of dropout that the package does not understand.
        UnsupportedOperationError: If the model has an operation that the estimator cannot differentiate.

    Example:
        >>> w = torch.tensor([2.0], requires_grad=True)
        >>> x = torch.ones(1, 1)
        >>> closure = lambda: (nn.functional.dropout(x, 0.5) * w).sum()
        >>> implicit_noise(closure).backward()
        >>> round(w.grad.abs().item(), 3)  # sqrt(q/(1-q)) x
        1.0
    """
    plan = Plan(noise=NoiseSettings(1.0, "taylor", "loss", _how(estimator, step_size, mask)))
    noise = run_plan(plan, closure, generator, module).noise
    assert noise is not None
    return noise


def dropout_loss(
    closure: Closure,
    *,
    k: int = 1,
    antithetic: bool = False,
    sites: str = "all",
    generator: torch.Generator | None = None,
    module: nn.Module | None = None,
) -> Tensor:
    r"""Average the loss over `k` draws of dropout: ``DROPOUT_k``, Algorithm 1.

    .. math::
        \frac1k \sum_{j=1}^k \ell(F(x, \eta_j))

    Args:
        closure: Runs forward and loss with the model in training mode; returns the scalar loss.
        k: Number of draws, at least 1.
        antithetic: Whether the draws come in pairs with opposite masks, see `lightning_dropreg.MiniBatchDropout`.
        sites: ``"all"``, or ``"last"``: the draws differ at the last dropout site only (multi-sample dropout), and what
            comes before it runs once.
        generator: See `explicit_penalty`.
        module: See `explicit_penalty`.

    Returns:
        Scalar tensor with a graph.

    Raises:
        InvalidArgumentError: If ``k < 1``, if `k` is odd with `antithetic`, or the closure returns no scalar loss.
        NoDropoutSiteError: If nothing was dropped.
        UnsupportedSiteError: If there is a kind of dropout that the package does not understand.

    Example:
        >>> x = torch.ones(1000, requires_grad=True)
        >>> closure = lambda: nn.functional.dropout(x, 0.5).square().mean()
        >>> 1.5 < dropout_loss(closure, k=64).item() < 2.5  # E = 1/(1-q)
        True
    """
    check_draws(k, antithetic)
    check_choice("sites", sites, SITES)
    return run_plan(Plan(k=k, antithetic=antithetic, sites=sites), closure, generator, module, mean=False).total


def plain_loss(closure: Closure) -> Tensor:
    """Compute the loss without dropout, batch norm and everything else in training mode.

    Args:
        closure: Runs forward and loss with the model in training mode; returns the scalar loss.

    Returns:
        What the closure returns when no dropout drops anything.

    Raises:
        InvalidArgumentError: If the closure returns no scalar loss.

    Example:
        >>> x = torch.ones(4, requires_grad=True)
        >>> plain_loss(lambda: nn.functional.dropout(x, 0.9).sum()).item()
        4.0
    """
    return run_pass(closure, Off(), need_sites=False).loss


def find_sites(closure: Closure, *, module: nn.Module | None = None) -> list[Site]:
    """List the dropout sites that a step reaches, in order.

    Args:
        closure: Runs forward and loss with the model in training mode; returns the scalar loss.
        module: A module whose state must not advance.

    Returns:
        The sites with names: the module's path below the outermost module that runs, and file and line where a
        functional dropout is called. Empty if nothing is dropped.

    Raises:
        InvalidArgumentError: If the closure returns no scalar loss.
        UnsupportedSiteError: If there is a kind of dropout that the package does not understand.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.25))
        >>> [(site.name, site.p, site.shape) for site in find_sites(lambda: net(torch.ones(5, 2)).sum())]
        [('1', 0.25, (5, 3))]
    """
    with Isolation(module) as isolation:
        look = lambda: run_pass(closure, Off(), name_sites=True, need_sites=False)  # noqa: E731
        return isolation.run(look, trace=False).sites


def _penalty(strength: float, curvature: str, how: Estimation) -> PenaltySettings:
    check_curvature(curvature)
    if curvature == FULL:
        warnings.warn(UNBOUNDED, UnboundedPenaltyWarning, stacklevel=3)
    return PenaltySettings(check_strength(strength), curvature, 1, how)


def _how(estimator: str, step_size: float, mask: str, batch_fraction: float | None = None) -> Estimation:
    check_estimation(estimator, step_size, mask)
    return Estimation(estimator, float(step_size), mask, batch_fraction, 0)
