"""What the graph shows: the mask of the backward, and dropout on the output itself."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_dropreg.auditing.findings import Finding
from lightning_dropreg.auditing.record import Record

__all__ = ["check_backward", "check_output"]


def check_backward(record: Record) -> Iterator[Finding]:
    """Find dropouts through which the gradient flows where the forward dropped, or does not where it kept.

    Yields:
        Findings ``backward-mask``.
    """
    for call, wrong, entries in record.mismatches:
        yield Finding(
            "backward-mask",
            "error",
            str(call.place),
            f"in {wrong} of {entries} entries the gradient has another mask than the output (1 draw; no chance "
            "involved).",
            "Use checkpoint(preserve_rng_state=True), or save the mask for the backward.",
        )


def check_output(record: Record) -> Iterator[Finding]:
    """Find dropout on what a loss is given, with nothing in between.

    Yields:
        Findings ``on-output``.
    """
    for loss, call in record.outputs:
        yield Finding(
            "on-output",
            "error",
            str(call.place),
            f"{loss.name} is given what comes out of this dropout, shape {loss.shape}, with no layer between (graph "
            "of 1 training step; no chance involved).",
            "Put the dropout before the last layer.",
        )
