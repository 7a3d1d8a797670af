"""Whether the backward has the mask of the forward."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_dropreg.auditing.findings import Finding
from lightning_dropreg.auditing.record import Record

__all__ = ["check_backward"]


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
