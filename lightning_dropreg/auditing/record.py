"""Everything that is measured for an audit: draws of the training step, and of the evaluation."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_dropreg.auditing.calls import Call, Draw, HandMask
from lightning_dropreg.auditing.graph import OutputDropout, on_outputs, other_masks
from lightning_dropreg.auditing.masks import Mask, along, collapse, digest
from lightning_dropreg.auditing.places import Paths, Place
from lightning_dropreg.auditing.subject import Subject, loss_in
from lightning_dropreg.auditing.watch import Watch, watching
from lightning_dropreg.errors import DropregError
from lightning_dropreg.interception.mode import Interception
from lightning_dropreg.numerics.context import modes_kept
from lightning_dropreg.numerics.torch_private import stance
from lightning_dropreg.passes import Off
from lightning_dropreg.passes.isolation import Isolation
from lightning_dropreg.placing import drop_prob_attributes

__all__ = ["DRAWS", "ERROR_PROBABILITY", "Attribute", "Record", "Tally", "isolated", "measure"]

DRAWS = 8
ERROR_PROBABILITY = 1e-6
"""Probability that an audit finds a fault where there is none, all its tests taken together."""


@dataclass
class Attribute:
    """A place where a drop probability is kept."""

    path: str
    module: nn.Module
    name: str
    p: float

    @property
    def label(self) -> str:
        """Path of the attribute."""
        return f"{self.path}.{self.name}" if self.path else self.name


@dataclass
class Tally:
    """One call of a dropout over the draws.

    Attributes:
        call: The first of them.
        draws: Number of draws in which it happened.
        kept: Independent mask entries that were kept, all draws together.
        entries: Number of independent mask entries that are known.
        alike: How many entries are alike along each dimension of the tensor, in every draw.
        chance: Log of the chance of that.
        repeated: Number of draws that agree with the first one in every entry.
        compared: Number of independent entries in which draws were compared with the first, all together.
        scale: The factor of what was kept; NaN if it varies.
    """

    call: Call
    draws: int = 0
    kept: int = 0
    entries: int = 0
    alike: dict[int, int] = field(default_factory=dict)
    chance: float = 0.0
    repeated: int = 0
    compared: int = 0
    scale: float = math.nan
    readable: bool = True
    _first: tuple[Mask, Mask] | None = None
    _late: list[Mask] = field(default_factory=list)

    @property
    def p(self) -> float | None:
        """The drop probability it was called with, if it is known."""
        return self.call.p

    def add(self, call: Call) -> None:
        """Count one more draw."""
        self.draws += 1
        if call.mask is None:
            self.readable = False
            return
        if call.expected is None:
            self._late.append(call.mask)
            reduced, alike, chance = collapse(call.mask)
        else:
            shared = [dim for dim, size in enumerate(call.expected) if size < call.mask.kept.shape[dim]]
            shared = shared if len(call.expected) == call.mask.kept.ndim else []
            reduced, alike, chance = collapse(along(call.mask, shared))
            self.kept += int(reduced.kept.sum())
            self.entries += reduced.entries
        if self._first is None:
            self._first, self.alike, self.chance = (call.mask, reduced), alike, chance
            self.scale = call.mask.scale
            return
        if math.isnan(self.scale):
            self.scale = call.mask.scale
        self.alike = {dim: size for dim, size in self.alike.items() if dim in alike}
        self.chance += chance
        whole, first = self._first
        if call.mask.kept.shape != whole.kept.shape:
            return
        both = call.mask.known & whole.known
        if bool((call.mask.kept[both] == whole.kept[both]).all()) and bool(both.any()):
            self.repeated += 1
            self.compared += first.entries if first.kept.shape == reduced.kept.shape else 1

    def finish(self) -> None:
        """Count entries whose sharing only all draws together show, and let go of what takes memory."""
        mixed = [set(collapse(mask)[1]) for mask in self._late if 0 < mask.dropped < mask.entries]
        for mask in self._late:
            dims = set.intersection(*mixed) if mixed else set(range(mask.kept.ndim))
            reduced = along(mask, sorted(dims))
            self.kept += int(reduced.kept.sum())
            self.entries += reduced.entries
        self._late = []
        self._first = None
        self.call.mask = self.call.before = self.call.after = self.call.tensors = None


@dataclass
class Record:
    """What was measured.

    Attributes:
        subject: What is audited.
        paths: The paths of its modules.
        attributes: Where drop probabilities are kept, with their values.
        training: The calls of dropouts in the training step, over the draws.
        evaluation: The same in evaluation, by stage.
        ran: The modules that ran in the training step, and whether in training mode.
        arrived: The attributes whose value reached a dropout that drops.
        complements: The attributes p whose ``1 - p`` reached one.
        changed: The attributes that had another value after an evaluation, with it.
        drawn: Random numbers that are no known dropout.
        incomplete: What could not be looked at, and why.
        norms_with: Means of ``h`` and ``h^2`` over a channel of what each batch norm was given, by draw.
        norms_without: The same without dropout.
        outputs: Dropouts on what losses are given.
        mismatches: Calls whose backward has another mask, and by how much.
        hand_masks: Masks that no known dropout made, by stage (the training step is ``"training"``).
        fingerprints: Place, shape, hash and entries of the masks of the first draw.
    """

    subject: Subject
    paths: Paths
    draws: int
    alpha: float
    attributes: list[Attribute]
    training: list[Tally] = field(default_factory=list)
    evaluation: dict[str, list[Tally]] = field(default_factory=dict)
    ran: dict[nn.Module, bool] = field(default_factory=dict)
    arrived: list[Attribute] = field(default_factory=list)
    complements: list[Attribute] = field(default_factory=list)
    changed: list[tuple[Attribute, Any, str]] = field(default_factory=list)
    drawn: list[Draw] = field(default_factory=list)
    incomplete: dict[str, str] = field(default_factory=dict)
    norms_with: dict[Any, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    norms_without: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)
    fingerprints: list[tuple[str, tuple[int, ...], str, int]] = field(default_factory=list)
    mismatches: list[tuple[Call, str]] = field(default_factory=list)
    outputs: list[OutputDropout] = field(default_factory=list)
    hand_masks: dict[str, list[HandMask]] = field(default_factory=dict)

    @functools.cached_property
    def level(self) -> float:
        """Error probability of a single test, so that of all together is `alpha` (Bonferroni)."""
        tallies = [*self.training, *(tally for stage in self.evaluation.values() for tally in stage)]
        return self.alpha / max(1, 8 * len(tallies))

    def path(self, module: nn.Module) -> str:
        """Return the path of a module."""
        return self.paths.of(module)


def measure(subject: Subject, draws: int, alpha: float) -> Record:
    """Run everything that an audit needs, and leave no trace; `alpha` is the probability of a false finding."""
    attributes = [
        Attribute(paths.of(layer), layer, name, float(getattr(layer, name)))
        for paths in [Paths(subject.roots)]
        for root in subject.roots
        for _, layer, name in drop_prob_attributes(root)
    ]
    record = Record(subject, Paths(subject.roots), draws, alpha, attributes)
    with stance("force_eager"):
        _train(record)
        _trace(record)
        _quiet(record)
        for stage in subject.evaluate:
            _evaluate(record, stage)
    return record


@contextmanager
def isolated(subject: Subject) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Yield what runs steps one after the other, as in training; undo what they did to modules and random states."""
    with modes_kept(*subject.roots), Isolation(subject.holder) as isolation:
        yield lambda steps: isolation.run(steps, trace=False)


def _train(record: Record) -> None:
    subject = record.subject
    tallies: dict[tuple[Place, str, int], Tally] = {}

    def steps() -> None:
        for _ in range(record.draws):
            watch = Watch(record.paths, gradients=not tallies)
            with watching(watch):
                output = subject.train()
                if watch.gradients:
                    loss = loss_in(output)
                    record.outputs = on_outputs(watch.losses, watch.calls, loss)
                    record.mismatches, why = other_masks(watch, subject.holder, loss)
                    record.incomplete.update({"backward": why} if why else {})
            del output
            if not record.fingerprints:
                record.fingerprints = [_fingerprint(call) for call in watch.calls if call.mask is not None]
            _count(watch.calls, tallies)
            record.drawn += watch.drawn
            for module, training in watch.seen.items():
                record.ran[module] = record.ran.get(module, True) and training
            for norm, inputs in watch.norm_inputs.items():
                record.norms_with.setdefault(norm, []).append(inputs[0])

    with isolated(subject) as run, torch.enable_grad():
        run(steps)
    record.training = _done(tallies)


def _count(calls: list[Call], tallies: dict[tuple[Place, str, int], Tally]) -> None:
    met: dict[tuple[Place, str], int] = {}
    for call in calls:
        where = call.place, call.kind
        met[where] = number = met.get(where, -1) + 1
        tallies.setdefault((*where, number), Tally(call)).add(call)


def _done(tallies: dict[tuple[Place, str, int], Tally]) -> list[Tally]:
    for tally in tallies.values():
        tally.finish()
    return list(tallies.values())


def _fingerprint(call: Call) -> tuple[str, tuple[int, ...], str, int]:
    assert call.mask is not None
    kept = call.mask.kept
    return str(call.place), tuple(kept.shape), digest(kept), call.mask.entries


def _quiet(record: Record) -> None:
    """Let the step run without dropout, for what batch norm would see in evaluation and for masks made by hand."""
    watches = [Watch(record.paths, masks=False, by_hand=True) for _ in range(2 if record.drawn else 1)]

    def steps() -> None:
        for watch in watches:
            with watching(watch), Interception(Off()):
                record.subject.train()

    if not record.norms_with and not record.drawn:
        return
    with isolated(record.subject) as run, torch.set_grad_enabled(bool(record.drawn)), suppress(DropregError):
        run(steps)
    record.norms_without = {norm: inputs[0] for norm, inputs in watches[0].norm_inputs.items()}
    record.hand_masks["training"] = _new_masks(watches)


def _new_masks(watches: Sequence[Watch]) -> list[HandMask]:
    """The masks that are others in the second of two runs, at the same place."""
    if len(watches) < 2:
        return []
    first, second = (watch.hand_masks for watch in watches)
    return [a for a, b in zip(first, second, strict=False) if a.place == b.place and a.content != b.content]


def _trace(record: Record) -> None:
    """Give every attribute a value of its own, and see which of them reach a dropout."""
    positive = [attribute for attribute in record.attributes if attribute.p > 0]
    marked = {number: attribute.p * (1 - 1e-6 * (number + 1)) for number, attribute in enumerate(positive)}

    def step() -> list[Call]:
        for number, attribute in enumerate(positive):
            setattr(attribute.module, attribute.name, marked[number])
        watch = Watch(record.paths, masks=False)
        with watching(watch):
            record.subject.train()
        return watch.calls

    try:
        with isolated(record.subject) as run, torch.no_grad():
            calls = run(step)
    finally:
        for attribute in positive:
            setattr(attribute.module, attribute.name, attribute.p)
    reached = [call.p for call in calls if call.drops and call.p is not None]
    for number, attribute in enumerate(positive):
        if any(_is(p, marked[number]) for p in reached):
            record.arrived.append(attribute)
        elif any(_is(1 - p, marked[number]) for p in reached):
            record.complements.append(attribute)


def _is(value: float, wanted: float) -> bool:
    return abs(value - wanted) < 1e-9 * wanted


def _evaluate(record: Record, stage: str) -> None:
    subject = record.subject
    tallies: dict[tuple[Place, str, int], Tally] = {}
    values: list[tuple[Attribute, Any]] = []
    watches = [Watch(record.paths, by_hand=bool(record.drawn)) for _ in range(2)]

    def steps() -> None:
        with subject.in_evaluation():
            before, after = subject.hooks if stage == "validation" else ([], [])
            for hook in before:
                _try(hook)
            for watch in watches:
                with watching(watch):
                    subject.evaluate[stage]()
                _count(watch.calls, tallies)
            for hook in after:
                _try(hook)
            values.extend((one, getattr(one.module, one.name, None)) for one in record.attributes)

    try:
        with isolated(subject) as run:
            run(steps)
    except Exception as error:  # a step that needs what an audit does not have is no fault of its dropout
        record.incomplete[stage] = f"{type(error).__name__}: {error}"[:200]
        return
    finally:
        for attribute in record.attributes:
            setattr(attribute.module, attribute.name, attribute.p)
    record.evaluation[stage] = _done(tallies)
    record.hand_masks[stage] = _new_masks(watches)
    record.changed += [(one, value, stage) for one, value in values if value != one.p]


def _try(hook: Callable[[], Any]) -> None:
    try:
        hook()
    except Exception:  # it may need a Trainer
        return
