"""Know, control or replace what dropout does.

Wherever a model drops entries of a tensor (a *dropout site*), this package can put a *rule* of its own in the place of
dropout for the length of one run of your unchanged training step (a *pass*): drop nothing, drop with another mask, take
a small step in a random direction. From such passes it makes the explicit effect of dropout, as a penalty, and the
implicit one, as noise in the gradient: Wei, Kakade and Ma, *The Implicit and Explicit Regularization Effects of
Dropout* (ICML 2020).

`ExplicitPenalty`, `ImplicitNoise` and `MiniBatchDropout` are callbacks for any PyTorch Lightning Trainer, the mixins
bring them with a LightningModule, and `functional`, the file to read first, is the same without Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if (
    TYPE_CHECKING
):  # what stands here is imported when it is asked for: `functional` needs no Lightning, `--help` nothing
    from lightning_dropreg import errors, functional
    from lightning_dropreg.auditing import audit
    from lightning_dropreg.callbacks import (
        DivergenceDetector,
        DropoutAudit,
        DropoutDiagnostics,
        DropProbSchedule,
        ExplicitPenalty,
        ImplicitNoise,
        MaxNorm,
        MiniBatchDropout,
        MonteCarloDropout,
        PlaceDropout,
        RDrop,
    )
    from lightning_dropreg.interception.handlers.attention import attention_dropout
    from lightning_dropreg.interception.handlers.custom import drop
    from lightning_dropreg.losses import recognize
    from lightning_dropreg.mixins import ExplicitPenaltyMixin, ImplicitNoiseMixin, MiniBatchDropoutMixin
    from lightning_dropreg.nn.pretraining import scale_pretrained_for_dropout
    from lightning_dropreg.placing import add_dropout, remove_dropout, set_drop_prob

__all__ = [
    "DivergenceDetector",
    "DropProbSchedule",
    "DropoutAudit",
    "DropoutDiagnostics",
    "ExplicitPenalty",
    "ExplicitPenaltyMixin",
    "ImplicitNoise",
    "ImplicitNoiseMixin",
    "MaxNorm",
    "MiniBatchDropout",
    "MiniBatchDropoutMixin",
    "MonteCarloDropout",
    "PlaceDropout",
    "RDrop",
    "add_dropout",
    "attention_dropout",
    "audit",
    "drop",
    "errors",
    "functional",
    "recognize",
    "remove_dropout",
    "scale_pretrained_for_dropout",
    "set_drop_prob",
]

__version__ = "0.1.0"

_ROOMS = {
    "auditing",
    "callbacks",
    "diagnostics",
    "errors",
    "functional",
    "losses",
    "metrics",
    "mixins",
    "nn",
    "uncertainty",
}
_CALLBACKS = "lightning_dropreg.callbacks"
_MIXINS = "lightning_dropreg.mixins"
_WHERE = {
    **{name: _MIXINS for name in __all__ if name.endswith("Mixin")},
    **dict.fromkeys(("add_dropout", "remove_dropout", "set_drop_prob"), "lightning_dropreg.placing"),
    "attention_dropout": "lightning_dropreg.interception.handlers.attention",
    "audit": "lightning_dropreg.auditing",
    "drop": "lightning_dropreg.interception.handlers.custom",
    "recognize": "lightning_dropreg.losses",
    "scale_pretrained_for_dropout": "lightning_dropreg.nn.pretraining",
}


def __getattr__(name: str) -> Any:
    if name in _ROOMS or name == "auditing":
        return import_module(f"lightning_dropreg.{name}")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_WHERE.get(name, _CALLBACKS)), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
