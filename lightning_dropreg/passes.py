"""One forward pass with a chosen noise at the dropout sites.

Every algorithm of the paper is a composition of such passes: `Off` (the model without dropout), `Perturb`
(``h (1 + step r)``), `Tangent` (the same to first order, in dual numbers), `Tap` (a handle on each site for
back-propagation) and `Drop` (dropout itself).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from lightning_dropreg.dual import REPLACEMENTS, make_dual
from lightning_dropreg.errors import (
    DropregError,
    InvalidArgumentError,
    LossNotRecognizedError,
    NoDropoutSiteError,
    UnsupportedSiteError,
)
from lightning_dropreg.interception import Interception, RepeatableRule, Rule
from lightning_dropreg.losses import RECOGNIZED, Loss
from lightning_dropreg.sites import Directions, KeyedGenerators, Site, fold_key, noise_dtype

__all__ = [
    "Closure",
    "Drop",
    "Off",
    "Pass",
    "Perturb",
    "Tangent",
    "Tap",
    "dormant_sites",
    "draws_of_dropout",
    "focus",
    "is_dormant",
    "run_pass",
]

Closure = Callable[[], Tensor]
"""Runs forward and loss of a model and returns the scalar loss."""


class Off:
    """No dropout."""

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.Rule`."""
        return h

    def again(self, index: int, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.RepeatableRule`."""
        return h


class Perturb:
    """``h (1 + step r)`` with the batch's directions ``r``."""

    def __init__(self, directions: Directions, step: float) -> None:
        self.directions = directions
        self.step = step

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.Rule`."""
        return (h * (1 + self.step * self.directions.draw(site, h))).to(h.dtype)

    def again(self, index: int, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.RepeatableRule`."""
        return (h * (1 + self.step * self.directions.at(index))).to(h.dtype)


class Tangent:
    """``h`` with the tangent ``h r``: forward-mode dual numbers."""

    def __init__(self, directions: Directions) -> None:
        self.directions = directions

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.Rule`."""
        primal, tangent = forward_ad.unpack_dual(h)
        push = (primal * self.directions.draw(site, h)).to(h.dtype)
        return make_dual(primal, push if tangent is None else tangent + push)


class Tap:
    """``h (1 + t)`` with ``t = 0``: the derivative in ``t`` is ``J_i`` times ``h_i``, summed over a shared mask.

    Attributes:
        taps: The ``t`` of each site, in order.
        sites: The sites.
        draws: Directions ``r`` for the sites, drawn in the same order as in the other passes; empty without.
    """

    def __init__(self, directions: Directions, draw: bool = False) -> None:
        self.directions = directions
        self.draw = draw
        self.taps: list[Tensor] = []
        self.sites: list[Site] = []
        self.draws: list[Tensor] = []

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.Rule`."""
        shape = self.directions.shape_of(site)
        tap = torch.zeros(shape, dtype=noise_dtype(h.dtype), device=h.device, requires_grad=True)
        self.taps.append(tap)
        self.sites.append(site)
        if self.draw:
            self.draws.append(self.directions.draw(site, h))
        return (h * (1 + tap)).to(h.dtype)

    def again(self, index: int, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.RepeatableRule`."""
        return (h * (1 + self.taps[index])).to(h.dtype)


class Drop:
    """Dropout itself, with masks drawn from generators of our own so that the global random state is not touched.

    Args:
        key: Seed of the masks.
        mirrored: Whether the masks are the antithetic counterparts of those that the key gives otherwise: made from
            ``1 - u`` where those are made from the uniform numbers ``u``.
    """

    def __init__(self, key: int, mirrored: bool = False) -> None:
        self.key = key
        self.mirrored = mirrored
        self.sites: list[Site] = []

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.Rule`."""
        self.sites.append(site)
        return self.again(len(self.sites) - 1, h)

    def again(self, index: int, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.RepeatableRule`."""
        site = self.sites[index]
        # a seed for every site, so that no mask need be kept
        generator = KeyedGenerators(fold_key(self.key, index)).on(h.device)
        shape = tuple(site.mask_shape)
        # faster on a CPU than bernoulli_; 24 random bits are more than a drop probability has
        uniform = torch.rand(shape, generator=generator, dtype=torch.float32, device=h.device)
        kept = uniform < 1 - site.p if self.mirrored else uniform >= site.p
        return h * kept.to(h.dtype).div_(1 - site.p)


def draws_of_dropout(key: int, k: int, antithetic: bool) -> list[Drop]:
    """Return the rules of `k` draws of dropout.

    Args:
        key: Seed of the batch.
        k: Number of draws; even, if `antithetic`.
        antithetic: Whether every second draw has the counterparts of the masks of the one before. With drop probability
            1/2 these are the complements, and the two draws deviate from the model without dropout in exactly opposite
            directions; with another q the correlation of a mask and its counterpart is ``-min(q, 1-q) / max(q, 1-q)``.

    Returns:
        The rules.
    """
    if antithetic:
        return [Drop(fold_key(key, j // 2), mirrored=j % 2 == 1) for j in range(k)]
    return [Drop(fold_key(key, j)) for j in range(k)]


_dormant: ContextVar[bool] = ContextVar("dormant_sites", default=False)


@contextmanager
def dormant_sites() -> Iterator[None]:
    """Let passes reach no site at all: a schedule holds the probabilities of the model's dropouts at 0 for now.

    Dropout modules called with probability 0 are seen and need no telling; recurrent networks and attention are called
    with 0 where nobody ever wanted dropout, so only who set them to 0 knows better.

    Yields:
        Nothing.
    """
    token = _dormant.set(True)
    try:
        yield
    finally:
        _dormant.reset(token)


def is_dormant() -> bool:
    """Whether a `dormant_sites` is in force."""
    return _dormant.get()


class _Focus:
    """A rule that acts at one site of the pass; the others do nothing."""

    def __init__(self, rule: Rule, index: int) -> None:
        self.rule = rule
        self.index = index
        self._met = 0

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.Rule`."""
        position, self._met = self._met, self._met + 1
        return self.rule(site, h) if position == self.index else h.view_as(h)


class _RepeatableFocus(_Focus):
    """The same for a rule that can do the same thing again."""

    def again(self, index: int, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.RepeatableRule`."""
        return self.rule.again(0, h) if index == self.index else h.view_as(h)  # type: ignore[attr-defined]


_focus: ContextVar[int | None] = ContextVar("focus", default=None)


@contextmanager
def focus(index: int) -> Iterator[None]:
    """Let only site number `index` be a dropout site in the passes run inside, to see what it needs by itself.

    Yields:
        Nothing.
    """
    token = _focus.set(index)
    try:
        yield
    finally:
        _focus.reset(token)


@dataclass
class Pass:
    """What one pass gave.

    Attributes:
        loss: The scalar loss that the closure returned.
        losses: The recognized losses in it, if they were recorded.
        sites: The dropout sites that were reached.
        in_bfloat16: Whether any was reached in bfloat16.
        kinks: How often the loss has operations with a kink behind a site, by name; if they were looked for.
        reads_gradients: Whether the closure looked at the ``.grad`` of a tensor.
    """

    loss: Tensor
    losses: list[Loss]
    sites: list[Site]
    in_bfloat16: bool = False
    kinks: dict[str, int] = field(default_factory=dict)
    reads_gradients: bool = False


def run_pass(
    closure: Closure,
    rule: Rule,
    *,
    record_losses: bool = False,
    name_sites: bool = False,
    need_sites: bool = True,
    written_out: bool | None = None,
    problems: list[DropregError] | None = None,
) -> Pass:
    """Run `closure` once with `rule` at its dropout sites.

    Args:
        closure: Runs forward and loss and returns the scalar loss.
        rule: What to do at the sites.
        record_losses: Whether the losses are taken apart; raises if none is recognized.
        name_sites: Whether the sites get names.
        need_sites: Whether reaching no dropout site is an error.
        written_out: Whether to avoid fused kernels that cannot be differentiated twice or forward; by default that
            depends on the rule.
        problems: Collects the errors instead of raising the first one.

    Returns:
        Loss, recognized losses and sites of the pass.

    Raises:
        NoDropoutSiteError: If `need_sites` and no dropout was reached, not even one whose probability is 0 for now.
        LossNotRecognizedError: If `record_losses` and no known loss function was called with an output that needs a
            gradient.
        DropregError: If there is something else wrong with the loss.
    """
    dual = isinstance(rule, Tangent)
    if written_out is None:
        written_out = isinstance(rule, (Tangent, Tap))
    index = _focus.get()
    if index is not None:
        rule = (_RepeatableFocus if isinstance(rule, RepeatableRule) else _Focus)(rule, index)
    with Interception(
        rule,
        record_losses=record_losses or dual,  # torch's cross entropy has no tangent that has a backward, ours has
        name_sites=name_sites,
        replacements=REPLACEMENTS if dual else None,
        written_out=written_out,
        problems=problems,
    ) as interception:
        loss = closure()
    try:
        check_loss(loss)
        if record_losses:
            _check_losses(loss, interception)
    except DropregError as problem:
        if problems is None:
            raise
        problems.append(problem)
    met = interception.sites or any(isinstance(p, (UnsupportedSiteError, InvalidArgumentError)) for p in problems or ())
    if need_sites and not (met or interception.inactive or is_dormant()):
        missing = NoDropoutSiteError(
            "No dropout was reached in this step, so there is nothing to regularize. Check that the model is in "
            "training mode, that it has dropout, and that the dropout is computed by torch.nn.functional.dropout, "
            "dropout1d, dropout2d or dropout3d (or the modules around them). Dropout inside recurrent networks and "
            "attention counts where its probability is above 0."
        )
        if problems is None:
            raise missing
        problems.append(missing)
    return Pass(
        loss,
        interception.losses,
        interception.sites,
        interception.in_bfloat16,
        reads_gradients=interception.reads_gradients,
    )


def _check_losses(loss: Tensor, interception: Interception) -> None:
    """Refuse a pass in which no loss was recognized, or not all of the returned loss.

    Raises:
        LossNotRecognizedError: If that is so.
    """
    if not interception.losses:
        raise LossNotRecognizedError(
            "The step returned a loss, but none of the loss functions that this package knows was called on the way "
            f"({', '.join(_torch_losses())} of torch.nn.functional, or the modules "
            f"around them), so the curvature of the loss in the model's output is unknown.{_refused(interception)} "
            "Compute the loss with one of them, make your own known with lightning_dropreg.recognize, or use "
            "ImplicitNoise, which needs no curvature."
        )
    _check_recognized(loss, interception)


def _check_recognized(loss: Tensor, interception: Interception) -> None:
    """Refuse a loss of which a part depends on dropout without being a recognized loss.

    Walks the autograd graph from the returned loss, not entering the elements of recognized losses: usually that is
    the user's reduction and nothing else. A dropout site found on the way is acted on by something unknown.

    Raises:
        LossNotRecognizedError: If there is such a part, or no recognized loss in it at all.
    """
    elements = {recorded.elements.grad_fn for recorded in interception.losses}
    sites = {node: site for node, site in zip(interception.site_nodes, interception.sites, strict=True) if node}
    names = ", ".join(recorded.name for recorded in interception.losses)
    found, seen, stack = False, set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in elements:
            found = True
        elif node in sites:
            raise LossNotRecognizedError(
                f"A part of the returned loss depends on the dropout site {_called(sites[node])} by a way that does "
                f"not lead through a recognized loss function (found: {names}), so its "
                f"curvature is unknown and the penalty would miss it.{_refused(interception)} Compute that part with "
                "a loss function of torch.nn.functional that this package knows, make it known with "
                "lightning_dropreg.recognize, or leave it out of the returned loss."
            )
        else:
            stack.extend(next_node for next_node, _ in node.next_functions)
    if not found:
        raise LossNotRecognizedError(
            f"{names} was computed, but the returned loss does not depend on "
            "it. Return the loss that these functions gave (reduced, masked or weighted as you like)."
        )


def _torch_losses() -> list[str]:
    return sorted(known.__name__ for known in RECOGNIZED if known.__module__ == F.__name__)


def _called(site: Site) -> str:
    return f"{site.name} ({site.kind})" if site.name else f"with p={site.p:g} and shape {site.shape} ({site.kind})"


def _refused(interception: Interception) -> str:
    return f" ({'; '.join(interception.refused)}.)" if interception.refused else ""


def check_loss(loss: object) -> None:
    """Refuse what is not a differentiable scalar loss.

    Raises:
        InvalidArgumentError: If `loss` is not a tensor of one floating-point element that needs a gradient.
    """
    if not isinstance(loss, Tensor):
        found = type(loss).__name__
    elif loss.numel() != 1 or not loss.is_floating_point():
        found = f"a {loss.dtype} tensor of shape {tuple(loss.shape)}"
    elif not loss.requires_grad:
        found = "a tensor that does not require a gradient"
    else:
        return
    raise InvalidArgumentError(
        f"The step must return a scalar loss that depends on parameters; it returned {found}. Return the loss before "
        ".item() or .detach(), reduced to one number."
    )
