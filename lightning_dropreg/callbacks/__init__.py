"""The plug-in for `lightning.Trainer`: thin hooks around `lightning_dropreg.step`."""

from lightning_dropreg.callbacks.diagnostics import DropoutDiagnostics
from lightning_dropreg.callbacks.explicit_penalty import ExplicitPenalty
from lightning_dropreg.callbacks.implicit_noise import ImplicitNoise
from lightning_dropreg.callbacks.minibatch_dropout import MiniBatchDropout

__all__ = ["DropoutDiagnostics", "ExplicitPenalty", "ImplicitNoise", "MiniBatchDropout"]
