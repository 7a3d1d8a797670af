"""Recurrent networks with dropout between their layers, against single layers with plain dropout between them."""

import pytest
import torch
import torch.nn.functional as F
from agreement import check_agreement, check_pair, gradients, run
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_dropreg.estimators import ESTIMATORS
from lightning_dropreg.functional import find_sites, plain_loss


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


RECURRENT = {
    "lstm": (nn.LSTM, {}),
    "lstm_3_layers_no_bias": (nn.LSTM, {"num_layers": 3, "bias": False}),
    "lstm_bidirectional_projected": (nn.LSTM, {"bidirectional": True, "proj_size": 2}),
    "lstm_batch_first": (nn.LSTM, {"batch_first": True}),
    "gru": (nn.GRU, {"bidirectional": True}),
    "rnn_tanh": (nn.RNN, {}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu", "batch_first": True}),
}


def single_layers(net):
    """The same network as a list of single-layer ones that share its parameters."""
    layers = []
    for number in range(net.num_layers):
        size = net.input_size if number == 0 else (net.proj_size or net.hidden_size) * (2 if net.bidirectional else 1)
        extra = {"nonlinearity": net.nonlinearity} if hasattr(net, "nonlinearity") else {"proj_size": net.proj_size}
        if isinstance(net, nn.GRU):
            extra = {}
        layer = type(net)(
            size, net.hidden_size, bias=net.bias, batch_first=net.batch_first, bidirectional=net.bidirectional, **extra
        )
        for name, _ in list(layer.named_parameters()):
            setattr(layer, name, getattr(net, name.replace("_l0", f"_l{number}")))
        layers.append(layer)
    return layers


def recurrent_problem(name, packed=False, with_state=False):
    kind, options = RECURRENT[name]
    net = kind(2, 3, **{"num_layers": 2, "dropout": 0.3, **options})
    head = nn.Linear((net.proj_size or 3) * (2 if net.bidirectional else 1), 3)
    x, y = torch.randn(4, 2, 2), torch.arange(8) % 3
    layers = single_layers(net)
    states = None
    if with_state:
        rows = net.num_layers * (2 if net.bidirectional else 1)
        batch = 4 if net.batch_first else 2
        h = torch.randn(rows, batch, net.proj_size or 3)
        states = (h, torch.randn(rows, batch, 3)) if kind is nn.LSTM else h
    if packed:
        lengths = torch.tensor([2, 1, 2, 1]) if net.batch_first else torch.tensor([2, 4])
        x = pack_padded_sequence(x, lengths, batch_first=net.batch_first, enforce_sorted=False)
        y = torch.arange(len(x.data)) % 3

    def loss(output, final):
        output = output.data if packed else output.reshape(8, -1)
        cells = final if isinstance(final, tuple) else (final,)
        return F.cross_entropy(head(output), y) + sum(F.mse_loss(c, torch.zeros_like(c)) for c in cells)

    def closure():
        return loss(*net(x, states))

    def by_hand():
        h, finals = x, []
        each = 2 if net.bidirectional else 1
        for number, layer in enumerate(layers):
            if number and packed:
                h = h._replace(data=F.dropout(h.data, 0.3))
            elif number:
                h = F.dropout(h, 0.3)
            rows = slice(number * each, (number + 1) * each)
            state = None
            if states is not None:
                state = tuple(s[rows] for s in states) if kind is nn.LSTM else states[rows]
            h, final = layer(h, state)
            finals.append(final)
        joined = tuple(map(torch.cat, zip(*finals, strict=True))) if kind is nn.LSTM else torch.cat(finals)
        return loss(h, joined)

    return net, closure, by_hand, [*net.parameters(), *head.parameters()]


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("with_state", [False, True], ids=["", "state"])
def test_recurrent(name, packed, with_state):
    net, closure, by_hand, parameters = recurrent_problem(name, packed, with_state)
    check_pair(closure, by_hand, parameters)
    kind = {nn.LSTM: "lstm_dropout", nn.GRU: "gru_dropout", nn.RNN: "rnn_dropout"}[type(net)]
    assert [site.kind for site in find_sites(closure)] == [kind] * (net.num_layers - 1)
    if not with_state:
        check_agreement(closure, parameters)


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_recurrent_without_noise_is_torch(name, packed):
    net, closure, _, _ = recurrent_problem(name, packed)
    loss = plain_loss(closure)
    net.dropout = 0.0
    torch.testing.assert_close(loss, closure())
    assert find_sites(closure) == []
    net.dropout = 0.3
    assert find_sites(closure)
    net.eval()
    assert find_sites(closure) == []


def test_recurrent_float32_in_every_estimator():
    """The fast kernels for float32 have no second derivatives: estimators that need them get others."""
    torch.set_default_dtype(torch.float32)
    net = nn.LSTM(2, 3, 2, dropout=0.4)
    x = torch.randn(4, 2, 2)
    closure = lambda: F.mse_loss(net(x)[0], torch.zeros(4, 2, 3))
    values = {name: run(name, closure, step_size=0.03) for name in ESTIMATORS}
    torch.testing.assert_close(values["forward"].penalty, values["antithetic"].penalty, rtol=0.02, atol=1e-5)
    for value in values.values():
        torch.testing.assert_close(value.noise, values["exact"].noise, rtol=0.02, atol=1e-5)
        gradients(value.penalty, list(net.parameters()))
    assert torch.backends.mkldnn.enabled
    assert torch.backends.cudnn.enabled


def test_recurrent_site_names():
    model = nn.ModuleDict({"rnn": nn.LSTM(2, 3, 3, dropout=0.2)})
    model.forward = lambda x: model["rnn"](x)[0].sum()
    assert [site.name for site in find_sites(lambda: model(torch.randn(4, 2, 2)))] == ["rnn", "rnn"]
