"""What an audit tells: findings, each with its evidence and its repair."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["SEVERITIES", "Finding"]

SEVERITIES = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that an audit found.

    Attributes:
        id: What kind of thing, for example ``"frozen-mask"``.
        severity: ``"error"`` (dropout does not do what was configured), ``"warning"`` (it does, and that is rarely
            wanted) or ``"note"`` (worth knowing).
        where: Path of the module, and file and line.
        evidence: What was measured: numbers, draws, and the probability of being wrong where chance is involved.
        repair: What to do, in one line.
    """

    id: str
    severity: str
    where: str
    evidence: str
    repair: str

    def as_dict(self) -> dict[str, Any]:
        """Return the finding as plain values."""
        return asdict(self)
