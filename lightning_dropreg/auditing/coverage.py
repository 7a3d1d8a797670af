"""What an audit looked at, and what there was no occasion for: no finding means something only with that."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from lightning_dropreg.auditing.findings import Finding
from lightning_dropreg.auditing.record import Record

__all__ = ["Coverage", "Findings", "coverage_of"]


@dataclass(frozen=True)
class Coverage:
    """What an audit looked at.

    Attributes:
        dropouts: Number of calls of dropouts in a training step.
        draws: Number of training steps that were run to look at their masks.
        checks: Ids of the findings that were looked for.
        left_out: Ids that were not, each with the reason.
        zero: Number of places with a drop probability, if all of them are 0; else 0.
    """

    dropouts: int = 0
    draws: int = 0
    checks: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    zero: int = 0

    def __str__(self) -> str:
        """What was looked at, in a sentence or two."""
        told = f"{_count(len(self.checks), 'check')} over {_count(self.dropouts, 'dropout')} in {self.draws} draws"
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            reasons.setdefault(reason, []).append(name)
        left = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
        told += f". Not applicable: {left}." if left else ". All were applicable."
        if self.zero:
            told += f" Every p is 0 ({_count(self.zero, 'place')}): nothing is ever dropped."
        return told


class Findings(list[Finding]):
    """The findings of an audit, a list, with what was looked at."""

    def __init__(self, found: Iterable[Finding], coverage: Coverage) -> None:
        super().__init__(found)
        self.coverage = coverage


def coverage_of(record: Record) -> Coverage:
    """Say what could be looked at in a record."""
    calls = [tally.call for tally in record.training if not tally.call.inner]
    dropping = [tally for tally in record.training if tally.call.drops]
    positive = any(attribute.p > 0 for attribute in record.attributes)
    idle = "nothing is dropped in a training step"
    masks = "" if any(t.readable and t.entries for t in dropping) else "no mask can be read" if dropping else idle
    backward = record.incomplete.get("backward", "") if dropping else idle
    configured = "" if positive else "no p above 0 is configured"
    evaluated = "" if record.evaluation else "no evaluation step could be run"
    norms = "" if record.norms_with else "no batch norm"
    searched = "" if record.subject.configure_optimizers is not None else "no optimizers"
    distributed = torch.distributed
    ranks = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    reasons = {
        "unreached": configured,
        "eval-in-train": configured,
        "stuck-at-zero": configured or evaluated,
        "wrong-rate": masks,
        "wrong-scale": masks,
        "frozen-mask": masks,
        "drops-everything": masks,
        "backward-mask": backward,
        "on-output": "" if dropping else idle,
        "active-in-eval": evaluated,
        "variance-shift": norms,
        "noise-on-line-search": searched if dropping else idle,
        "ranks-share-masks": "" if ranks else "one process",
        "hand-made": "",
    }
    return Coverage(
        len(calls),
        record.draws,
        tuple(name for name, reason in reasons.items() if not reason),
        {name: reason for name, reason in reasons.items() if reason},
        0 if positive or dropping else len(record.attributes),
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
