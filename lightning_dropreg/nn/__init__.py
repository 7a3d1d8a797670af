"""Layers that drop in other ways than `torch.nn.Dropout`, all of them dropout sites; and parts of the models."""

from lightning_dropreg.nn.adaptive_softmax import AdaptiveSoftmax
from lightning_dropreg.nn.embedding_dropout import EmbeddingDropout
from lightning_dropreg.nn.locked_dropout import LockedDropout
from lightning_dropreg.nn.qrnn import QRNN, linear_recurrence
from lightning_dropreg.nn.weight_drop import WeightDrop

__all__ = ["QRNN", "AdaptiveSoftmax", "EmbeddingDropout", "LockedDropout", "WeightDrop", "linear_recurrence"]
