"""Whether the processes of a distributed run draw masks of their own."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from lightning_dropreg.auditing.findings import Finding
from lightning_dropreg.auditing.record import Record

__all__ = ["check_ranks"]


def check_ranks(record: Record) -> Iterator[Finding]:
    """Compare the masks of the first draw over the ranks of the default process group, if there is one.

    Yields:
        A finding ``ranks-share-masks``, where masks of equal shape are equal.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() < 2:
        return
    gathered: list[list[tuple[str, tuple[int, ...], str, int]]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(gathered, record.fingerprints)
    mine, *others = gathered
    for other in others:
        pairs = [(a, b) for a, b in zip(mine, other, strict=False) if a[1] == b[1] and a[3] > 64]
        same = [a for a, b in pairs if a[2] == b[2]]
        if same:
            entries = sum(one[3] for one in same)
            yield Finding(
                "ranks-share-masks",
                "warning",
                same[0][0],
                f"{len(same)} of {len(pairs)} masks ({entries} entries) are equal on two of {len(gathered)} ranks, of "
                "which the first is this.",
                "Seed every rank differently: torch.manual_seed(seed + rank) after seed_everything.",
            )
            return
