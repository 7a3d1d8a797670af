"""Dropout on attention probabilities that is left out by choice."""

from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F
from fits import Classifier, same, train

import lightning_dropreg as dr


class Attending(Classifier):
    """Attention with dropout on its probabilities, computed again in the backward, and an ordinary dropout."""

    def __init__(self, q=0.5):
        super().__init__()
        self.attention = torch.nn.MultiheadAttention(4, 2, dropout=q, batch_first=True, dtype=torch.float64)

    def training_step(self, batch, batch_idx):
        attend = lambda x: self.attention(x, x, x)[0]
        h = torch.utils.checkpoint.checkpoint(attend, batch[0][:, None], use_reentrant=False)[:, 0]
        return F.cross_entropy(self.net(h), batch[1])


class AttendingMixin(dr.ExplicitPenaltyMixin, Attending):
    explicit_penalty = MappingProxyType({"attention": "ignore"})


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: [dr.ExplicitPenalty(**o), dr.ImplicitNoise(**o)],
        lambda **o: [dr.MiniBatchDropout(2, **o), dr.ImplicitNoise(**o)],
        lambda **o: [dr.ImplicitNoise(source="dropout", injection="after_backward", **o)],
    ],
)
def test_attention_ignored_is_attention_without_dropout(make):
    without = train(make(), make=Attending, model_options={"q": 0.0})
    assert same(train(make(attention="ignore"), make=Attending), without)
    assert not same(train(make(), make=Attending), without)


def test_attention_ignored_by_a_mixin_and_with_one_draw():
    assert same(train(make=AttendingMixin), train([dr.ExplicitPenalty(attention="ignore")], make=Attending))
    by_one = train([dr.MiniBatchDropout(1, attention="ignore")], make=Attending)
    assert not same(by_one, train(make=Attending))  # not left alone, as k=1 is otherwise
