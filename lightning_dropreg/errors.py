"""The errors of the package: what was found, where, and what to do about it.

Everything derives from `DropregError`, so ``except DropregError`` catches whatever this package refuses.
"""

__all__ = [
    "CheckpointSettingsError",
    "CompiledPartError",
    "CompiledPartWarning",
    "CompositionError",
    "CorpusNotFoundError",
    "DivergenceError",
    "DropregError",
    "InconsistentPassesError",
    "InvalidArgumentError",
    "KinkedNetworkWarning",
    "LossNotRecognizedError",
    "MissingDependencyError",
    "NoDropoutSiteError",
    "NoDropoutWarning",
    "NoisySearchWarning",
    "NonFinitePenaltyError",
    "NotRepeatableError",
    "PatternError",
    "UnboundedPenaltyWarning",
    "UnknownArgumentError",
    "UnreadableTextError",
    "UnsupportedModuleError",
    "UnsupportedOperationError",
    "UnsupportedRowsError",
    "UnsupportedSiteError",
    "VocabularyMismatchError",
    "WideStepWarning",
]


class DropregError(Exception):
    """Base of every error raised by this package."""


class InvalidArgumentError(DropregError, ValueError):
    """An argument is outside its range or names something that does not exist."""


class UnknownArgumentError(InvalidArgumentError, TypeError):
    """A constructor was given an argument that it does not have; the message names the nearest."""


class NoDropoutSiteError(DropregError):
    """No dropout with a positive drop probability was reached, so there is nothing to regularize."""


class UnsupportedSiteError(DropregError):
    """A dropout of a kind that the package does not understand was reached."""


class LossNotRecognizedError(DropregError):
    """The loss, or a part of it that dropout acts on, was not computed by a function the package knows."""


class UnsupportedOperationError(DropregError):
    """The model uses an operation that the chosen estimator cannot differentiate."""


class InconsistentPassesError(DropregError):
    """Two passes over one batch did not do the same thing, so they cannot be compared."""


class NotRepeatableError(InconsistentPassesError):
    """The step does something else when it is called again with the same batch and from the same state."""


class NonFinitePenaltyError(DropregError):
    """The explicit penalty or the implicit noise is NaN or infinite."""


class CompositionError(DropregError):
    """The callbacks of a Trainer do not make sense together."""


class PatternError(InvalidArgumentError):
    """A pattern of module paths matches nothing that it could act on; the message names the nearest paths."""


class MissingDependencyError(DropregError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""


class UnsupportedModuleError(DropregError):
    """A LightningModule or Trainer is set up in a way that a callback cannot work with."""


class UnsupportedRowsError(UnsupportedModuleError):
    """Some of the rows of a batch do not stand for all of it, as ``batch_fraction`` supposes."""


class CompiledPartError(DropregError):
    """A compiled part of a model did in its graph something else than it did when it was looked at.

    Args:
        message: What it did.
        part: Path of the part.

    Attributes:
        part: The same.
    """

    def __init__(self, message: str, part: str) -> None:
        super().__init__(message)
        self.part = part


class CheckpointSettingsError(DropregError):
    """A run is to be resumed from a checkpoint that was written with other settings."""


class DivergenceError(DropregError):
    """Penalty or noise stayed far above the loss or the gradient; see `lightning_dropreg.DivergenceDetector`."""


class CorpusNotFoundError(DropregError, FileNotFoundError):
    """The files of a text corpus are not where they are looked for."""


class UnreadableTextError(DropregError, ValueError):
    """A file that should hold text is damaged, in another encoding, or no text."""


class VocabularyMismatchError(DropregError, ValueError):
    """A checkpoint was trained with other words than the data has."""


class UnboundedPenaltyWarning(UserWarning):
    """A penalty that can become negative without bound is trained with and not watched, or one has become negative."""


class KinkedNetworkWarning(UserWarning):
    """The noise of finite steps is larger than ``xi_approx``, because the network has kinks (ReLU)."""


class WideStepWarning(UserWarning):
    """The finite step of an antithetic pair is so wide that penalty or noise are another with half of it."""


class CompiledPartWarning(UserWarning):
    """A part that `torch.compile` has made runs uncompiled, because its graph was seen to do something else."""


class NoDropoutWarning(UserWarning):
    """Every dropout of the first step has drop probability 0, so nothing is regularized; it may rise later."""


class NoisySearchWarning(UserWarning):
    """An optimizer that remembers gradients from step to step (LBFGS) gets them with noise that changes every step."""
