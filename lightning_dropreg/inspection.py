"""Looking at a step without training: its sites, its losses, and where a number stopped being finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_dropreg.errors import NonFinitePenaltyError
from lightning_dropreg.passes import Closure, Off, Pass, Tap, run_pass
from lightning_dropreg.sites import Directions, Site

__all__ = ["check_finite", "inspect_step"]


def inspect_step(closure: Closure, need_losses: bool) -> Pass:
    """Run a step once and raise what would keep it from being regularized.

    Taps at the sites make every way from a site to the loss visible, also from sites on inputs that need no gradient.

    Args:
        closure: Runs forward and loss and returns the scalar loss.
        need_losses: Whether its losses must be recognized (for the penalty).

    Returns:
        The pass, its sites named.
    """
    done = run_pass(closure, Tap(Directions(0)), record_losses=need_losses, name_sites=True, written_out=False)
    for loss in done.losses:
        loss.check()
    return done


class _Watch(Off):
    """No dropout, but a note of the size of each site's activations."""

    def __init__(self) -> None:
        self.largest: list[tuple[Site, float]] = []

    def __call__(self, site: Site, h: Tensor) -> Tensor:
        """See `lightning_dropreg.interception.Rule`."""
        self.largest.append((site, float(h.detach().abs().max()) if h.numel() else 0.0))
        return h


def check_finite(values: Mapping[str, Tensor | None], closure: Closure, where: str) -> None:
    """Raise if a value is not finite, and say at which site that began.

    On CUDA nothing is checked: reading a value would make every step wait for the device.

    Args:
        values: What to check, by name.
        closure: The step they came from; run again, without dropout, only to find the site.
        where: Which step that was, for the message.

    Raises:
        NonFinitePenaltyError: If a value is NaN or infinite.
    """
    bad = [name for name, v in values.items() if v is not None and v.device.type == "cpu" and not torch.isfinite(v)]
    if not bad:
        return
    watch = _Watch()
    loss = run_pass(closure, watch, name_sites=True, need_sites=False).loss.item()
    broken = [f"{site.name} ({site.kind})" for site, size in watch.largest if not size < float("inf")]
    if broken:
        cause = f"the activations are not finite from site {broken[0]} on"
    elif watch.largest:
        site, size = max(watch.largest, key=lambda pair: pair[1])
        cause = (
            f"the activations are finite at every site; the largest is {size:.3g}, at site {site.name} ({site.kind})"
        )
    else:
        cause = "no site was reached when the step was repeated"
    raise NonFinitePenaltyError(
        f"The {' and the '.join(bad)} became non-finite at {where}: {cause}, and the loss without dropout is "
        f"{loss:.4g}. Lower the learning rate or the strength, clip gradients, or use a smaller step_size."
    )
