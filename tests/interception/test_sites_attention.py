"""Attention and transformers, against models that do the same with plain dropout, written by hand."""

import pytest
import torch
import torch.nn.functional as F
from agreement import check_agreement, check_pair, gradients, run
from torch import nn

from lightning_dropreg import attention_dropout
from lightning_dropreg.functional import find_sites, plain_loss
from lightning_dropreg.interception.mode import Interception


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def attention_by_hand(q, k, v, p, mask=None, causal=False, scale=None, gqa=False):
    if gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    scores = torch.einsum("...le,...se->...ls", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[-2:]).tril() > 0
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -1e9)
    if mask is not None:
        scores = scores + mask
    return F.dropout(scores.softmax(-1), p) @ v


ATTENTION = {
    "plain": {},
    "causal": {"causal": True},
    "bool": {"mask": torch.tensor([[True, False, True, True], [False, True, True, False], [True, True, True, True]])},
    "float": {"mask": torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)},
    "scale": {"scale": 0.3},
    "gqa": {"gqa": True, "causal": True},
}


@pytest.mark.parametrize("name", ATTENTION)
def test_fused_attention(name):
    options = ATTENTION[name]
    w = torch.randn(3, 2, 2).requires_grad_()
    heads = 4 if options.get("gqa") else 2
    x, y = torch.randn(2, heads, 3, 2), torch.randn(2, heads, 4, 2)
    target = torch.randn(2, heads, 3, 2)

    def inputs():
        keys = y[:, :2] if options.get("gqa") else y
        return x @ w[0], keys @ w[1], keys @ w[2]

    def closure():
        out = F.scaled_dot_product_attention(
            *inputs(), options.get("mask"), 0.25, options.get("causal", False), scale=options.get("scale"),
            enable_gqa=options.get("gqa", False),
        )  # fmt: skip
        return F.mse_loss(out, target)

    by_hand = lambda: F.mse_loss(attention_by_hand(*inputs(), 0.25, **options), target)
    check_pair(closure, by_hand, [w])
    check_agreement(closure, [w])
    (site,) = find_sites(closure)
    assert (site.kind, site.shape, site.p) == ("attention", (2, heads, 3, 4), 0.25)


def test_fused_attention_of_a_query_that_sees_nothing():
    q, k, v = torch.randn(3, 1, 2, 2).requires_grad_()
    mask = torch.tensor([[True, False], [False, False]])
    plain = F.scaled_dot_product_attention(q, k, v, mask)
    with Interception(lambda site, h: h) as mode:
        ours = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=0.5)
    assert mode.sites
    torch.testing.assert_close(ours, plain)
    assert (ours[0, 1] == 0).all()


@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention(need_weights):
    net = nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True)
    x, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.ones(3, 3).triu(1) > 0

    def closure():
        return F.mse_loss(net(x, x, x, need_weights=need_weights, attn_mask=mask)[0], target)

    def by_hand():
        q, k, v = (
            t.reshape(2, 3, 2, 2).transpose(1, 2)
            for t in F.linear(x, net.in_proj_weight, net.in_proj_bias).chunk(3, -1)
        )
        if need_weights:  # torch folds heads into the batch here
            q, k, v = (t.reshape(4, 3, 2) for t in (q, k, v))
        h = attention_by_hand(q, k, v, 0.2, mask=~mask).reshape(2, 2, 3, 2)
        return F.mse_loss(net.out_proj(h.transpose(1, 2).reshape(2, 3, 4)), target)

    check_pair(closure, by_hand, list(net.parameters()))
    check_agreement(closure, list(net.parameters()))
    assert [site.kind for site in find_sites(closure)] == ["attention"]
    net.eval()
    assert find_sites(closure) == []


def test_attention_ignored_by_choice():
    net = nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True)
    x = torch.randn(2, 3, 4)
    closure = lambda: F.mse_loss(F.dropout(net(x, x, x, need_weights=True)[0], 0.1), x)
    assert [site.kind for site in find_sites(closure)] == ["attention", "dropout"]
    with attention_dropout("ignore"):
        assert [site.kind for site in find_sites(closure)] == ["dropout"]
        fused = lambda: F.scaled_dot_product_attention(x, x, net.in_proj_weight[None, :3] + x * 0, dropout_p=0.5).sum()
        assert find_sites(fused) == []
    assert len(find_sites(closure)) == 2
    with pytest.raises(ValueError, match="attention='no' is unknown"), attention_dropout("no"):
        pass


TRANSFORMER_SITES = [
    ("layers.{}.self_attn", "attention", 0.1),
    ("layers.{}.dropout1", "dropout", 0.1),
    ("layers.{}.dropout", "dropout", 0.1),
    ("layers.{}.dropout2", "dropout", 0.1),
]


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_encoder(norm_first):
    block = nn.TransformerEncoderLayer(4, 2, 5, 0.1, batch_first=True, norm_first=norm_first)
    net = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
    x, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    closure = lambda: F.mse_loss(net(x), target)
    expected = [(name.format(layer), kind, p) for layer in range(2) for name, kind, p in TRANSFORMER_SITES]
    assert [(s.name, s.kind, s.p) for s in find_sites(closure)] == expected
    a, f = run("antithetic", closure), run("forward", closure)
    torch.testing.assert_close(a.penalty, f.penalty, rtol=1e-5, atol=1e-8)
    parameters = list(net.parameters())
    net.eval()
    torch.testing.assert_close(plain_loss(closure), F.mse_loss(net(x), target))
    with torch.no_grad():
        assert net(x).shape == x.shape  # the fast path, untouched
    net.train()
    assert gradients(a.penalty, parameters).isfinite().all()


def test_transformer_decoder():
    net = nn.TransformerDecoderLayer(4, 2, 5, 0.1, batch_first=True)
    x, memory = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    closure = lambda: F.mse_loss(net(x, memory), torch.zeros(2, 3, 4))
    assert [(s.name, s.kind) for s in find_sites(closure)] == [
        ("self_attn", "attention"),
        ("dropout1", "dropout"),
        ("multihead_attn", "attention"),
        ("dropout2", "dropout"),
        ("dropout", "dropout"),
        ("dropout3", "dropout"),
    ]
    assert [s.shape for s in find_sites(closure)][2] == (2, 2, 3, 5)
    torch.testing.assert_close(
        run("antithetic", closure).penalty, run("forward", closure).penalty, rtol=1e-5, atol=1e-8
    )
