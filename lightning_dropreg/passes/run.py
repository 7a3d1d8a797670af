"""One forward pass with a chosen rule at the dropout sites."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_dropreg.errors import DropregError, InvalidArgumentError, NoDropoutSiteError, UnsupportedSiteError
from lightning_dropreg.interception.mode import Interception
from lightning_dropreg.interception.sites import Rule, Site
from lightning_dropreg.losses import Loss
from lightning_dropreg.numerics.context import holding
from lightning_dropreg.numerics.dual import REPLACEMENTS
from lightning_dropreg.passes.recognition import check_loss, check_losses, used_losses
from lightning_dropreg.passes.rules import Tangent, Tap, focused

__all__ = ["Closure", "Pass", "Recount", "Witness", "dormant_sites", "is_dormant", "recounted", "run_pass", "witnessed"]

Closure = Callable[[], Tensor]
"""Runs forward and loss of a model and returns the scalar loss."""
_dormant: ContextVar[bool] = ContextVar("dormant_sites", default=False)


def dormant_sites() -> AbstractContextManager[None]:
    """Let passes reach no site at all: a schedule holds the probabilities of the model's dropouts at 0 for now.

    Dropout modules called with probability 0 are seen and need no telling; recurrent networks and attention are called
    with 0 where nobody ever wanted dropout, so only who set them to 0 knows better.

    Returns:
        Does so for the length of a ``with``.
    """
    return holding(_dormant, True)


def is_dormant() -> bool:
    """Whether a `dormant_sites` is in force."""
    return _dormant.get()


def recounted(recount: Recount | None) -> AbstractContextManager[None]:
    """Let `recount` say what the loss of every pass inside is, None letting it be; unknown losses are no error then."""
    return holding(_recount, recount)


def witnessed(witness: Witness) -> AbstractContextManager[None]:
    """Let `witness` see every pass that is run inside, its own too, with its graph, before anything is made of it."""
    return holding(_witness, witness)


@dataclass
class Pass:
    """What one pass gave.

    Attributes:
        loss: The scalar loss that the closure returned.
        losses: The recognized losses in it, if they were recorded.
        sites: The dropout sites that were reached.
        in_bfloat16: Whether any was reached in bfloat16.
        kinks: How often the loss has operations with a kink behind a site, by name; if they were looked for.
        unknown: What drew random numbers and is no dropout that is known, and where; if it was looked for.
        reads_gradients: Whether the closure looked at the ``.grad`` of a tensor.
        site_nodes: See `lightning_dropreg.interception.mode.Interception`; while the pass is `recounted`.
    """

    loss: Tensor
    losses: list[Loss]
    sites: list[Site]
    in_bfloat16: bool = False
    kinks: dict[str, int] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    reads_gradients: bool = False
    site_nodes: list[Any] = field(default_factory=list)

    def release(self) -> None:
        """Let go of the graph: the losses, and that of the loss."""
        self.losses, self.site_nodes = [], []
        if isinstance(self.loss, Tensor):
            self.loss = self.loss.detach()


Recount = Callable[[Pass], Tensor]
"""Says what the loss of a pass is to be."""
_recount: ContextVar[Recount | None] = ContextVar("recount", default=None)
Witness = Callable[[Closure, Rule, Pass], None]
"""Sees a pass."""
_witness: ContextVar[Witness | None] = ContextVar("witness", default=None)


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
    recount = _recount.get()
    with Interception(
        focused(rule),
        # torch's cross entropy has no tangent that has a backward, ours has
        record_losses=record_losses or dual or recount is not None,
        lenient=not (record_losses or dual),
        name_sites=name_sites,
        replacements=REPLACEMENTS if dual or (isinstance(rule, Tap) and rule.thrice) else None,
        written_out=written_out,
        problems=problems,
    ) as interception:
        loss = closure()
    try:
        check_loss(loss)
        if record_losses:
            check_losses(loss, interception)
        if record_losses or recount is not None:
            interception.losses = used_losses(loss, interception.losses)
    except DropregError as problem:
        if problems is None:
            raise
        problems.append(problem)
    met = interception.sites or any(isinstance(p, (UnsupportedSiteError, InvalidArgumentError)) for p in problems or ())
    if need_sites and not (met or interception.inactive or is_dormant()):
        rests = ", ".join(interception.resting)
        missing = NoDropoutSiteError(
            f"No dropout was active in this step, and some is in eval mode instead of training mode: {rests}. "
            "Call .train() on the model, or on the part that it belongs to."
            if rests
            else "No dropout was reached in this step, so there is nothing to regularize. Check that the model is in "
            "training mode, that it has dropout, and that the dropout is computed by torch.nn.functional.dropout, "
            "dropout1d, dropout2d or dropout3d (or the modules around them). Dropout inside recurrent networks and "
            "attention counts where its probability is above 0."
        )
        if problems is None:
            raise missing
        problems.append(missing)
    done = Pass(
        loss,
        interception.losses,
        interception.sites,
        interception.in_bfloat16,
        reads_gradients=interception.reads_gradients,
    )
    if recount is not None:
        done.site_nodes = interception.site_nodes
        done.loss, done.site_nodes = recount(done), []
        done.losses = done.losses if record_losses else []
    witness = _witness.get()
    if witness is not None:
        witness(closure, rule, done)
    return done
