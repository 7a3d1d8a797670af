"""Transformers side by side are what torch's own layers are with the same weights, one by one."""

import math

import pytest
import torch
from torch import nn

from examples.benchmarks.attention import BLOCKS, HEADS, WIDER, ManyTransformers
from examples.benchmarks.data import Data

SEEDS, ROWS, TIME, WORDS, SIZE = [3, 4], 5, 6, 11, 8


def data():
    torch.manual_seed(1)
    tokens = torch.randint(WORDS, (len(SEEDS), ROWS, TIME + 1))
    rows = tokens[..., :-1], tokens[..., 1:]
    return Data(rows, rows, rows, classes=WORDS)


def many(seeds=SEEDS, q=0.0):
    module = ManyTransformers(data(), seeds, widths=(SIZE,), drop_probs=(0.0, q, q)).double()
    with torch.no_grad():
        for number, seed in enumerate(seeds):  # what starts at 0 or 1 would be compared with nothing
            drawn = torch.Generator().manual_seed(seed)
            for p in [*module.biases, *module.gains, *module.shifts, module.of_words]:
                p[number] += 0.3 * torch.randn(p[number].shape, generator=drawn).double()
    return module


def alone(module, number, x):
    """Network `number` by `torch.nn.TransformerEncoderLayer`."""
    h = module.embedding[number][x] * math.sqrt(SIZE) + module.positions[number]
    mask = nn.Transformer.generate_square_subsequent_mask(TIME, dtype=torch.float64)
    for block in range(BLOCKS):
        layer = nn.TransformerEncoderLayer(
            SIZE, HEADS, WIDER * SIZE, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        ).double()
        linears = [layer.self_attn, layer.self_attn.out_proj, layer.linear1, layer.linear2]
        with torch.no_grad():
            for at, linear in enumerate(linears):
                weight, bias = (linear.in_proj_weight, linear.in_proj_bias) if at == 0 else (linear.weight, linear.bias)
                weight.copy_(module.matrices[4 * block + at][number].T)
                bias.copy_(module.biases[4 * block + at][number, 0])
            for at, norm in enumerate((layer.norm1, layer.norm2)):
                norm.weight.copy_(module.gains[2 * block + at][number, 0])
                norm.bias.copy_(module.shifts[2 * block + at][number, 0])
        h = layer(h, src_mask=mask)
    h = nn.functional.layer_norm(h, (SIZE,), module.gains[-1][number, 0], module.shifts[-1][number, 0])
    return h @ module.embedding[number].T + module.of_words[number]


def test_each_network_is_torchs():
    module, x = many(), data().train[0]
    for number in range(len(SEEDS)):
        torch.testing.assert_close(module(x)[number], alone(module, number, x[number]))


def test_a_network_gets_the_gradient_that_it_gets_alone():
    x, y = data().train
    together = many()
    together.training_step((x, y), 0).backward()
    for number, seed in enumerate(SEEDS):
        single = many([seed])
        single.training_step((x[number, None], y[number, None]), 0).backward()
        for ours, theirs in zip(together.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(ours.grad[number], theirs.grad[0])


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_on_embedding_and_sublayers_in_training_only(training, monkeypatch):
    places = []

    def noted(h, q, active):
        places.append((h.shape, q, active))
        return h

    monkeypatch.setattr("examples.benchmarks.attention.F.dropout", noted)
    module = many(q=0.3).train(training)
    module(data().train[0])
    assert places == [((len(SEEDS), ROWS, TIME, SIZE), 0.3, training)] * (1 + 2 * BLOCKS)
