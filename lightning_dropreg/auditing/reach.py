"""Dropout that is configured and does not act: never reached, left in evaluation mode, or lost after an evaluation."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_dropreg.auditing.findings import Finding
from lightning_dropreg.auditing.places import Place, defined_at, made_at
from lightning_dropreg.auditing.record import Attribute, Record
from lightning_dropreg.auditing.watch import is_dropout
from lightning_dropreg.numerics.torch_private import DROPOUT_LAYERS

__all__ = ["check_modes", "check_reached", "check_restored"]


def check_reached(record: Record) -> Iterator[Finding]:
    """Find what is configured with ``p > 0`` and never dropped anything in a training step.

    Every probability was given a value of its own, and the ones that reached a dropout are known by it. A number that
    is only called like a drop probability counts as passed on if a dropout below its module has the same value.

    Yields:
        Findings ``unreached`` and ``wrong-rate``.
    """
    dropping = [tally for tally in record.training if tally.call.drops]
    acted = {tally.call.layer for tally in dropping}
    for attribute in record.attributes:
        layer = attribute.module
        if attribute.p == 0 or attribute in record.arrived:
            continue
        if is_dropout(layer) and layer in acted and attribute not in record.complements:
            continue
        if not all(module.training for module in (layer, _runner(record, layer))):
            continue  # check_modes tells
        where = str(Place(attribute.label, _line(record, attribute)))
        if attribute in record.complements:
            yield Finding(
                "wrong-rate",
                "error",
                where,
                f"a dropout is called with {1 - attribute.p:g} where {attribute.label} = {attribute.p:g}: the "
                "probability to keep (traced in 1 training step, no chance involved).",
                "Pass the drop probability itself, not 1 - p.",
            )
            continue
        own = isinstance(layer, (*DROPOUT_LAYERS, nn.RNNBase, nn.MultiheadAttention)) or is_dropout(layer)
        below = {id(child) for child in layer.modules()}
        if not own and any(tally.p == attribute.p and id(tally.call.layer) in below for tally in dropping):
            continue
        instead = [tally for tally in dropping if not own and tally.call.layer is layer]
        if instead and not any(instead[0].p == other.p for other in record.arrived):
            yield Finding(
                "wrong-rate",
                "error",
                str(instead[0].call.place),
                f"{attribute.label} = {attribute.p:g} reaches no dropout, and a dropout with p = {instead[0].p:g} is "
                "called here (traced in 1 training step, no chance involved).",
                f"Pass p=self.{attribute.name} to the dropout.",
            )
            continue
        runner = _runner(record, layer)
        ran = runner in record.ran or runner in record.subject.roots
        yield Finding(
            "unreached",
            ("error" if own else "warning") if ran else "note",
            where,
            f"p = {attribute.p:g} is configured, and 0 dropouts had it in {record.draws} training steps"
            + ("." if ran else f" (nor did {record.path(runner)} run at all)."),
            _repair(layer),
        )


def _runner(record: Record, layer: nn.Module) -> nn.Module:
    """The module whose forward ought to run the layer; containers have none."""
    if not (is_dropout(layer) or isinstance(layer, nn.Identity)):
        return layer
    above = record.paths.parent(layer)
    while isinstance(above, (nn.ModuleList, nn.ModuleDict)):
        above = record.paths.parent(above)
    return layer if above is None else above


def _line(record: Record, attribute: Attribute) -> str:
    if type(attribute.module).__module__.startswith("torch.nn"):
        return made_at(record.paths, attribute.module)
    return defined_at(attribute.module, attribute.name)


def _repair(layer: nn.Module) -> str:
    if isinstance(layer, nn.RNNBase) and layer.num_layers == 1:
        return "A recurrent network drops between its layers, and this has one: add num_layers, or a Dropout after it."
    return "Call it in forward, or remove it from the configuration."


def check_modes(record: Record) -> Iterator[Finding]:
    """Find what is in evaluation mode while it trains, the topmost module of each part: ``eval-in-train``."""
    silent = [one for one in record.attributes if one.p > 0 and record.ran.get(one.module) is False]
    silent += [
        one for one in record.attributes if one.p > 0 and one.module not in record.ran and not one.module.training
    ]
    tops: dict[int, tuple[nn.Module, list[Attribute]]] = {}
    for attribute in silent:
        if attribute in record.arrived:
            continue
        top, above = attribute.module, record.paths.parent(attribute.module)
        while above is not None and not record.ran.get(above, above.training):
            top, above = above, record.paths.parent(above)
        tops.setdefault(id(top), (top, []))[1].append(attribute)
    for top, attributes in tops.values():
        frozen = not any(parameter.requires_grad for parameter in top.parameters())
        frozen = frozen and any(True for _ in top.parameters())
        first, more = attributes[0], len(attributes) - 1
        yield Finding(
            "eval-in-train",
            "note" if frozen else "warning",
            str(Place(record.path(top), made_at(record.paths, top))),
            f"{first.label} = {first.p:g}{f' and {more} more drop probabilities' * bool(more)}: in evaluation mode in "
            f"{record.draws} training steps{', all its parameters frozen' * frozen}.",
            "Call .train() on it before training (from_pretrained leaves a model in evaluation mode).",
        )


def check_restored(record: Record) -> Iterator[Finding]:
    """Find drop probabilities that an evaluation leaves changed: ``stuck-at-zero``."""
    for attribute, value, stage in record.changed:
        yield Finding(
            "stuck-at-zero",
            "error",
            str(Place(attribute.label, _line(record, attribute))),
            f"p = {attribute.p:g} before {stage} and {value} after it (1 evaluation, no chance involved).",
            "Use .eval() and .train() in place of setting p, or put p back when the evaluation ends.",
        )
