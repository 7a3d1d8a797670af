"""Language models as LightningModules; none of them knows about the callbacks of this package."""

from lightning_dropreg.paper.models.lstm import LSTMLanguageModel
from lightning_dropreg.paper.models.qrnn import QRNNLanguageModel
from lightning_dropreg.paper.models.transformer import TransformerLanguageModel
from lightning_dropreg.paper.models.transformer_xl import TransformerXLLanguageModel

__all__ = ["LSTMLanguageModel", "QRNNLanguageModel", "TransformerLanguageModel", "TransformerXLLanguageModel"]
