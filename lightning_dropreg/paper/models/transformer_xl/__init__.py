"""Transformer-XL (Dai et al., ACL 2019), the model of the paper's Table 2.

Read `network`, then what it is made of: `attention`, `positions`, `layer`, `memory`; `model` is the
LightningModule.
"""

from lightning_dropreg.nn.adaptive_softmax import AdaptiveSoftmax
from lightning_dropreg.paper.models.transformer_xl.model import TransformerXLLanguageModel
from lightning_dropreg.paper.models.transformer_xl.network import TransformerXL

__all__ = ["AdaptiveSoftmax", "TransformerXL", "TransformerXLLanguageModel"]
