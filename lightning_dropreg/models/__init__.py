"""Language models as LightningModules; none of them knows about the callbacks of this package."""

from lightning_dropreg.models.lstm import LSTMLanguageModel
from lightning_dropreg.models.transformer_xl import TransformerXLLanguageModel

__all__ = ["LSTMLanguageModel", "TransformerXLLanguageModel"]
