"""Language models as LightningModules; none of them knows about the callbacks of this package."""

from lightning_dropreg.models.lstm import LSTMLanguageModel
from lightning_dropreg.models.transformer import TransformerLanguageModel

__all__ = ["LSTMLanguageModel", "TransformerLanguageModel"]
