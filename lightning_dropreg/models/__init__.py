"""Language models as LightningModules; none of them knows about the callbacks of this package."""

from lightning_dropreg.models.lstm import LSTMLanguageModel
from lightning_dropreg.models.qrnn import QRNNLanguageModel
from lightning_dropreg.models.transformer import TransformerLanguageModel
from lightning_dropreg.models.transformer_xl import TransformerXLLanguageModel

__all__ = ["LSTMLanguageModel", "QRNNLanguageModel", "TransformerLanguageModel", "TransformerXLLanguageModel"]
