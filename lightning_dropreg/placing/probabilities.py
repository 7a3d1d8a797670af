"""Where modules keep their drop probabilities, and how to set them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from lightning_dropreg.checks import is_probability
from lightning_dropreg.errors import PatternError
from lightning_dropreg.numerics.torch_private import DROPOUT_LAYERS
from lightning_dropreg.placing.patterns import check_patterns, covers, nearest_paths

__all__ = ["drop_prob_attributes", "matched_drop_probs", "set_drop_prob"]

# torch's own; other layers are known by their names
_ATTRIBUTES: dict[type[nn.Module], str] = {
    **dict.fromkeys(DROPOUT_LAYERS, "p"),
    nn.RNNBase: "dropout",
    nn.MultiheadAttention: "dropout",
}
_NAMES = ("Dropout", "DropPath", "StochasticDepth", "WeightDrop", "DropConnect")
_USUAL = ("p", "drop_prob", "prob")
# `dropout`, `attention_dropout`, `drop_rate`, `resid_pdrop`, ...; whole layers that are left out draw in Python
_CALLED = re.compile(r"^(?!.*(keep|layer_?drop)).*drop", re.IGNORECASE)


def drop_prob_attributes(
    module: nn.Module, modules: Sequence[str] | None = None, attributes: Sequence[str] = ()
) -> Iterator[tuple[str, nn.Module, str]]:
    """List the places below `module` where a drop probability is kept.

    They are ``p`` of torch's dropout layers and ``dropout`` of its recurrent networks and `nn.MultiheadAttention`;
    ``p``, ``drop_prob`` or ``prob`` of layers whose class is called ``...Dropout``, ``...DropPath``,
    ``...StochasticDepth``, ``...WeightDrop`` or ``...DropConnect``; and every number of a module that is called
    ``...drop...`` (``attention_dropout`` of transformers), unless it is one to keep or to leave out layers.

    Args:
        module: The model.
        modules: Patterns of module paths (``"encoder.*"``), as in a shell; what lies below a match is meant too. None
            for all.
        attributes: Further names of attributes that hold a drop probability.

    Yields:
        Path of the layer, the layer, and the name of its attribute.

    Example:
        >>> net = nn.Sequential(nn.LSTM(2, 3, num_layers=2, dropout=0.1), nn.Dropout(0.5))
        >>> [(path, name) for path, _, name in drop_prob_attributes(net)]
        [('0', 'dropout'), ('1', 'p')]
    """
    for path, layer in module.named_modules():
        if modules is not None and not any(covers(pattern, path) for pattern in modules):
            continue
        for name in _names(layer, attributes):
            yield path, layer, name


def _names(layer: nn.Module, further: Sequence[str]) -> list[str]:
    names = [name for kind, name in _ATTRIBUTES.items() if isinstance(layer, kind)]
    if not names and type(layer).__name__.endswith(_NAMES):
        names = [name for name in _USUAL if is_probability(getattr(layer, name, None))][:1]
    own = [name for name, value in vars(layer).items() if _CALLED.match(name) and is_probability(value)]
    own += [name for name in further if is_probability(getattr(layer, name, None))]
    return [*names, *[name for name in dict.fromkeys(own) if name not in names]]


def set_drop_prob(model: nn.Module, patterns: Mapping[str, float]) -> dict[str, float]:
    """Set drop probabilities by patterns of module paths.

    A pattern that matches a module means everything at and below it; it may also end in the name of the attribute
    (``"*.attention_dropout"``). Where several patterns match, the last one counts.

    Args:
        model: The model; changed in place.
        patterns: Patterns as in a shell (``*`` also spans dots) and drop probabilities in ``[0, 1)``.

    Returns:
        What was set: the new probability by the path of the attribute.

    Raises:
        InvalidArgumentError: If a probability is outside ``[0, 1)``.
        PatternError: If a pattern matches nothing, or nothing that holds a drop probability; nothing is set then.

    Example:
        >>> net = nn.Sequential(nn.LSTM(2, 3, num_layers=2, dropout=0.1), nn.Dropout(0.5), nn.Dropout(0.5))
        >>> set_drop_prob(net, {"*": 0.2, "2": 0.0})
        {'0.dropout': 0.2, '1.p': 0.2, '2.p': 0.0}
    """
    found = matched_drop_probs(model, patterns)
    for layer, name, p in found.values():
        setattr(layer, name, p)
    return {place: p for place, (_, _, p) in found.items()}


def matched_drop_probs(
    model: nn.Module, patterns: Mapping[str, float], attributes: Sequence[str] = ()
) -> dict[str, tuple[nn.Module, str, float]]:
    """Find what `set_drop_prob` would set.

    Args:
        model: The model.
        patterns: See there.
        attributes: Further names of attributes that hold a drop probability.

    Returns:
        The layer, the name of its attribute and the new probability, by the path of the attribute.

    Raises:
        InvalidArgumentError: If a probability is outside ``[0, 1)``.
        PatternError: If a pattern matches nothing, or nothing that holds a drop probability.
    """
    check_patterns(patterns)
    places = {
        f"{path}.{name}" if path else name: (layer, name)
        for path, layer, name in drop_prob_attributes(model, attributes=attributes)
    }
    for pattern in patterns:
        if not any(covers(pattern, place) for place in places):
            raise PatternError(_no_place(model, pattern, list(places)))
    wanted = {place: p for pattern, p in patterns.items() for place in places if covers(pattern, place)}
    return {place: (*places[place], float(wanted[place])) for place in places if place in wanted}


def _no_place(model: nn.Module, pattern: str, places: Sequence[str]) -> str:
    paths = [path for path, _ in model.named_modules() if path]
    covered = [path for path in paths if covers(pattern, path)]
    if covered:
        # what has an Identity where its dropout would be, as peft does
        empty = [p for p in covered if _CALLED.match(p) and isinstance(model.get_submodule(p), nn.Identity)]
        there = f", for example on {empty[0]!r}, which does nothing now" if empty else ""
        return (
            f"Nothing at or below {pattern!r} in {type(model).__name__} holds a drop probability"
            f"{nearest_paths(pattern, places)}. Use lightning_dropreg.add_dropout to place dropout there{there}."
        )
    return (
        f"No module of {type(model).__name__} has a path like {pattern!r}{nearest_paths(pattern, [*places, *paths])}."
    )
