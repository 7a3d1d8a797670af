"""Masks that are not what dropout's should be: their rate, their scale, whether they are new, and off in evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from lightning_dropreg.auditing.chance import binomial_tail, log_agreement, percent, power_of_ten
from lightning_dropreg.auditing.findings import Finding
from lightning_dropreg.auditing.record import Record, Tally

__all__ = ["check_backward", "check_certain", "check_evaluation", "check_frozen", "check_ranks", "check_rates"]

_LEAST = 0.002  # a smaller difference of rates does no harm, and fused kernels round p


def check_rates(record: Record) -> Iterator[Finding]:
    """Compare the share of kept entries with ``1 - p``: ``wrong-rate``, and the mask's mean with 1: ``wrong-scale``."""
    for tally in record.training:
        frozen = _is_frozen(record, tally)
        if not tally.readable or not tally.entries or frozen:
            continue
        kept, n = tally.kept, tally.entries
        rate = kept / n
        p = tally.p
        if p is not None and tally.call.training and abs(rate - (1 - p)) > _LEAST:
            chance = binomial_tail(kept, n, 1 - p)
            if chance < record.level:
                yield Finding(
                    "wrong-rate",
                    "error",
                    str(tally.call.place),
                    f"p = {p:g}, but {kept} of {n} entries are kept ({percent(rate)}, not {percent(1 - p)}) in "
                    f"{tally.draws} draws; by chance {power_of_ten(_log(chance))}.",
                    "Keep an entry with probability 1 - p (a uniform number of at least p).",
                )
        if not 0 < rate < 1 or math.isnan(tally.scale):
            continue
        if abs(tally.scale * rate - 1) < max(_LEAST, 0.02):
            continue
        chance = binomial_tail(kept, n, min(1.0, 1 / tally.scale)) if tally.scale > 0 else 0.0
        if chance < record.level:
            yield Finding(
                "wrong-scale",
                "error",
                str(tally.call.place),
                f"what is kept is multiplied by {tally.scale:.4g} and {percent(rate)} of {n} entries are kept in "
                f"{tally.draws} draws: the mean of the mask is {tally.scale * rate:.4g}, not 1; by chance "
                f"{power_of_ten(_log(chance))}.",
                "Divide what is kept by 1 - p.",
            )


def check_frozen(record: Record) -> Iterator[Finding]:
    """Find masks that are alike in all draws, or along a dimension where they should not be: ``frozen-mask``."""
    level = math.log(record.level)
    for tally in record.training:
        if _is_frozen(record, tally):
            yield Finding(
                "frozen-mask",
                "error",
                str(tally.call.place),
                f"the mask is the same in {tally.repeated + 1} of {tally.draws} draws ({tally.entries} entries "
                f"compared); by chance {power_of_ten(log_agreement(_rate(tally), tally.compared))}.",
                "Draw a new mask in every call; look for a seed that is set in the step, or a mask that is kept.",
            )
        expected = tally.call.expected
        for dim, size in tally.alike.items():
            if expected is None or expected[dim] == 1 or tally.chance > level:
                continue
            yield Finding(
                "frozen-mask",
                "warning",
                str(tally.call.place),
                f"all {size} entries along dimension {dim} share their mask in {tally.draws} draws; by chance "
                f"{power_of_ten(tally.chance)}.",
                "Draw the mask in the full shape, or use a dropout that says so (LockedDropout, Dropout2d).",
            )


def _is_frozen(record: Record, tally: Tally) -> bool:
    if not tally.readable or tally.draws < 2 or tally.repeated < tally.draws - 1 or not tally.compared:
        return False
    rate = _rate(tally)
    return 0 < rate < 1 and log_agreement(rate, tally.compared) < math.log(record.level)


def _rate(tally: Tally) -> float:
    return 1 - tally.kept / max(1, tally.entries)


def _log(chance: float) -> float:
    return math.log(chance) if chance > 0 else -math.inf


def check_evaluation(record: Record) -> Iterator[Finding]:
    """Find dropout that drops in evaluation mode: ``active-in-eval``."""
    for stage, tallies in record.evaluation.items():
        for tally in tallies:
            call = tally.call
            if not call.drops or call.inner:
                continue
            # what stands in for an evaluation is the training step, which may drop by itself
            if record.subject.stand_in and stage == "evaluation mode" and call.layer in {None, *_steps(record)}:
                continue
            n = tally.entries
            seen = f"{n - tally.kept} of {n} entries are dropped" if n else "it was asked to drop"
            yield Finding(
                "active-in-eval",
                "error",
                str(call.place),
                f"in {stage}, {seen} ({call.kind}, p = {call.p if call.p is None else format(call.p, 'g')}, "
                f"{tally.draws} draws; no chance involved).",
                "Pass training=self.training (for attention: dropout_p=p if self.training else 0.0).",
            )
        for mask in record.hand_masks.get(stage, ()):
            if not (record.subject.stand_in and mask.layer in {None, *_steps(record)}):
                yield Finding(
                    "active-in-eval",
                    "error",
                    str(mask.place),
                    f"in {stage}, a mask made by hand drops {mask.dropped} of {mask.entries} entries, others each time "
                    "(2 draws; no chance involved).",
                    "Draw it only if self.training.",
                )


def _steps(record: Record) -> list[object]:
    return [root for root in record.subject.roots if hasattr(root, "training_step")]


def check_certain(record: Record) -> Iterator[Finding]:
    """Find dropouts that drop everything: ``drops-everything``."""
    for tally in record.training:
        if tally.readable and tally.entries and tally.kept == 0 and tally.p == 1.0:
            yield Finding(
                "drops-everything",
                "error",
                str(tally.call.place),
                f"p = 1: 0 of {tally.entries} entries are kept in {tally.draws} draws.",
                "Lower p; to switch a part off, remove it.",
            )


def check_backward(record: Record) -> Iterator[Finding]:
    """Find dropouts whose gradient flows where the forward dropped, or not where it kept: ``backward-mask``."""
    for call, evidence in record.mismatches:
        yield Finding(
            "backward-mask",
            "error",
            str(call.place),
            f"{evidence} (1 draw; no chance involved).",
            "Use checkpoint(preserve_rng_state=True), or save the mask for the backward.",
        )


def check_ranks(record: Record) -> Iterator[Finding]:
    """Compare the masks of the first draw over the ranks, if there are several: ``ranks-share-masks``."""
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
