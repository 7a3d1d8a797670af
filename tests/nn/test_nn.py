"""The package's own layers: what they compute, and that they are right as dropout sites."""

import copy
import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from agreement import check_agreement, check_pair, gradients
from fits import make_trainer
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

import lightning_dropreg as dr
from lightning_dropreg.errors import InvalidArgumentError, UnsupportedSiteError
from lightning_dropreg.functional import dropout_loss, explicit_penalty, find_sites
from lightning_dropreg.nn import QRNN, EmbeddingDropout, LockedDropout, WeightDrop, linear_recurrence


class Everything(nn.Module):
    """All three layers around a little LSTM and a linear layer."""

    def __init__(self):
        super().__init__()
        self.words = EmbeddingDropout(nn.Embedding(5, 2), p=0.2)
        self.lstm = WeightDrop(nn.LSTM(2, 3, batch_first=True), "weight_hh_l0", p=0.3)
        self.locked = LockedDropout(0.25)
        self.decode = WeightDrop(nn.Linear(3, 4), ["weight"], p=0.4)

    def forward(self, text):
        return self.decode(self.locked(self.lstm(self.words(text))[0])).flatten(0, 1)


def problem():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    net = Everything()
    text, target = torch.randint(5, (2, 3)), torch.randint(4, (6,))
    return net, text, lambda logits: F.cross_entropy(logits, target)


def by_hand(net, text):
    """`Everything` with a mask multiplied wherever one belongs, and the LSTM as a loop."""
    lstm, decode = net.lstm.module, net.decode.module
    x = F.embedding(text, dr.drop(net.words.embedding.weight, 0.2, (5, 1), kind="embedding_dropout"))
    w_hh = dr.drop(lstm.weight_hh_l0, 0.3, kind="drop_connect")
    h = c = torch.zeros(2, 3)
    outputs = []
    for t in range(text.shape[1]):
        gates = F.linear(x[:, t], lstm.weight_ih_l0, lstm.bias_ih_l0) + F.linear(h, w_hh, lstm.bias_hh_l0)
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    h = dr.drop(torch.stack(outputs, 1), 0.25, (2, 1, 3), kind="locked_dropout")
    return F.linear(h, dr.drop(decode.weight, 0.4, kind="drop_connect"), decode.bias).flatten(0, 1)


def test_sites_and_their_names():
    net, text, loss = problem()
    sites = find_sites(lambda: loss(net(text)))
    assert [(s.name, s.p, s.mask_shape) for s in sites] == [
        ("words", 0.2, (5, 1)),
        ("lstm.module.weight_hh_l0", 0.3, (12, 3)),
        ("locked", 0.25, (2, 1, 3)),
        ("decode.module.weight", 0.4, (4, 3)),
    ]


def test_penalty_noise_and_draws_are_those_of_masks_put_in_by_hand():
    net, text, loss = problem()
    check_pair(lambda: loss(net(text)), lambda: loss(by_hand(net, text)), list(net.parameters()))


def test_all_estimators_agree():
    net, text, loss = problem()
    check_agreement(lambda: loss(net(text)), list(net.parameters()))


def test_a_cache_of_parametrizations_does_not_give_every_draw_the_same_mask():
    net, text, loss = problem()
    parameters = list(net.parameters())

    def draws():
        value = dropout_loss(lambda: loss(net(text)), k=3, generator=torch.Generator().manual_seed(1))
        return value, gradients(value, parameters)

    alone = draws()
    with parametrize.cached():
        first, second = draws(), draws()
    for a, b, c in zip(alone, first, second):
        assert a.equal(b)
        assert a.equal(c)


def test_one_draw_for_each_call_and_none_outside():
    layer = WeightDrop(nn.Bilinear(2, 2, 2), "weight", p=0.5)
    seen = []
    layer.module.register_forward_hook(lambda module, *_: seen.extend([module.weight, module.weight]))
    for _ in range(2):
        layer(torch.ones(1, 2), torch.ones(1, 2))
    assert seen[0] is seen[1]
    assert not seen[0].equal(seen[2])
    state = torch.get_rng_state()
    lstm = WeightDrop(nn.LSTM(2, 3), "weight_hh_l0", p=0.5).double().eval()
    torch.set_rng_state(state)
    lstm.float().train()
    weight = lstm.module.weight_hh_l0
    lstm.eval()(torch.ones(4, 1, 2))
    assert weight is dict(lstm.named_parameters())["module.parametrizations.weight_hh_l0.original"]
    assert torch.get_rng_state().equal(state)


class _Calls(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def test_an_rnn_keeps_its_fused_kernel_and_its_memory(monkeypatch):
    lstm = WeightDrop(nn.LSTM(2, 3, num_layers=2, bidirectional=True), ["weight_hh_l0", "weight_hh_l1_reverse"], 0.5)
    flattened = []
    monkeypatch.setattr(nn.LSTM, "flatten_parameters", flattened.append)
    with _Calls() as calls:
        lstm(torch.randn(4, 1, 2))
    assert calls.names.count("lstm") == 1
    assert calls.names.count("drop") == 2
    assert not flattened
    assert all(weight.is_leaf for weight in lstm.module._flat_weights)  # no graph stays behind


@pytest.mark.parametrize("make", [lambda: nn.LSTM(2, 3), lambda: nn.GRU(2, 3), lambda: nn.Linear(2, 3)])
def test_copies_are_independent_and_right(make):
    net = make()
    layer = WeightDrop(net, "weight" if isinstance(net, nn.Linear) else "weight_hh_l0", p=0.5)
    x = torch.randn(4, 1, 2)

    def run(one, seed=1):
        torch.manual_seed(seed)
        result = one(x)
        return result if isinstance(result, torch.Tensor) else result[0]

    twin = copy.deepcopy(layer)
    assert run(twin).equal(run(layer))
    assert not run(twin, 2).equal(run(layer))
    other = WeightDrop(make(), layer.weight_names, p=0.5)
    other.load_state_dict(layer.state_dict())
    assert run(other).equal(run(layer))
    with torch.no_grad():
        next(p for name, p in twin.named_parameters() if "original" in name).zero_()
    assert not run(twin).equal(run(layer))


def test_dropped_weights_in_other_parameters():
    """`torch.func.functional_call` gives the LSTM tensors that it has never seen."""
    torch.set_default_dtype(torch.float64)
    layer, plain = WeightDrop(nn.LSTM(2, 3), "weight_hh_l0", p=0.5), nn.LSTM(2, 3)
    new = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
    short = {name.replace("parametrizations.weight_hh_l0.original", "weight_hh_l0")[7:]: p for name, p in new.items()}
    x = torch.randn(4, 1, 2)
    torch.manual_seed(1)
    ours = torch.func.functional_call(layer, new, (x,))[0]
    torch.manual_seed(1)
    short["weight_hh_l0"] = dr.drop(short["weight_hh_l0"], 0.5)
    torch.testing.assert_close(ours, torch.func.functional_call(plain, short, (x,))[0])


def test_locked_dropout_shares_its_mask_over_time():
    for batch_first in (True, False):
        layer = LockedDropout(0.5, batch_first)
        h = layer(torch.ones(6, 7, 8))
        time = 1 if batch_first else 0
        assert h.eq(h.narrow(time, 0, 1)).all()
        assert set(h.unique().tolist()) == {0.0, 2.0}
        h = torch.ones(2, 3, 4)
        assert layer.eval()(h) is h


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Everything()

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.net(batch), batch.flatten() % 4)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize(
    "callbacks",
    [lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise()], lambda: [dr.MiniBatchDropout(2), dr.ImplicitNoise()]],
    ids=["algorithm 2", "algorithm 4"],
)
def test_a_run_resumed_from_a_checkpoint_is_the_uninterrupted_one(callbacks, tmp_path):
    data = torch.utils.data.DataLoader(torch.randint(5, (4, 2, 3)), batch_size=None)

    def fit(epochs, **options):
        L.seed_everything(1, verbose=False)
        model, trainer = Model(), make_trainer(callbacks(), max_epochs=epochs)
        trainer.fit(model, data, **options)
        return trainer, list(model.state_dict().values())

    trainer, half = fit(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    whole, resumed = fit(2)[1], fit(2, ckpt_path=tmp_path / "half.ckpt", weights_only=True)[1]
    assert all(a.equal(b) for a, b in zip(whole, resumed, strict=True))
    assert not any(a.equal(b) for a, b in zip(whole, half, strict=True))


def test_noise_of_some_rows_is_refused_where_all_rows_share_a_mask():
    data = torch.utils.data.DataLoader(torch.randint(5, (2, 4, 3)), batch_size=None)
    with pytest.raises(UnsupportedSiteError, match=r"net.lstm.module.weight_hh_l0.*batch_fraction=None"):
        make_trainer([dr.ImplicitNoise(batch_fraction=0.5)]).fit(Model(), data)
    make_trainer([dr.ExplicitPenalty(batch_fraction=0.5), dr.ImplicitNoise(batch_fraction=1.0)]).fit(Model(), data)


def test_the_penalty_of_some_rows_is_unbiased():
    """The mean over all pairs of four rows is that over the rows, for masks shared by rows and others."""
    torch.set_default_dtype(torch.float64)
    net, text, target = Everything(), torch.randint(5, (4, 3)), torch.randint(4, (4, 3))

    def penalty(rows):
        return explicit_penalty(lambda: F.cross_entropy(net(text[rows]), target[rows].flatten()), estimator="exact")

    pairs = [penalty([i, j]) for i in range(4) for j in range(i)]
    torch.testing.assert_close(torch.stack(pairs).mean(), penalty([0, 1, 2, 3]))


@pytest.mark.gpu
def test_on_cuda_there_is_no_warning_and_the_masks_reach_the_kernel():
    names = ["weight_hh_l0", "weight_hh_l1"]
    plain = nn.LSTM(4, 6, num_layers=2, batch_first=True).cuda()
    layer = WeightDrop(copy.deepcopy(plain), names, p=0.5)
    x = torch.randn(3, 5, 4, device="cuda")
    torch.cuda.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = layer(x)[0]
        layer(x)  # another pass must leave the first one's graph valid
        output.sum().backward()
    torch.cuda.manual_seed(1)
    with torch.no_grad():
        for name in names:
            weight = getattr(plain, name)
            weight.copy_(dr.drop(weight, 0.5))
    torch.testing.assert_close(output, plain(x)[0])


@pytest.mark.parametrize("window", [1, 2])
def test_qrnn_is_its_recurrence_and_carries_its_state(window):
    torch.set_default_dtype(torch.float64)
    layer, x = QRNN(3, 4, window), torch.randn(2, 9, 3)
    c, before, expected = torch.zeros(2, 4), torch.zeros(2, 3), []
    for t in range(9):
        seen = torch.cat([x[:, t], before], -1) if window == 2 else x[:, t]
        z, f, o = F.linear(seen, layer.gates.weight, layer.gates.bias).split(4, -1)
        c = f.sigmoid() * c + (1 - f.sigmoid()) * z.tanh()
        expected.append(o.sigmoid() * c)
        before = x[:, t]
    expected = torch.stack(expected, 1)
    output, _ = layer(x)
    torch.testing.assert_close(output, expected)
    parameters = list(layer.parameters())
    torch.testing.assert_close(gradients(output.sin().sum(), parameters), gradients(expected.sin().sum(), parameters))
    head, state = layer(x[:, :4])
    torch.testing.assert_close(torch.cat([head, layer(x[:, 4:], state)[0]], 1), expected)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 130])
def test_linear_recurrence_is_a_loop(steps):
    a, b, c = torch.rand(2, steps, 3).double(), torch.randn(2, steps, 3).double(), torch.randn(2, 3).double()
    a[0] *= 1e-200  # products vanish without a NaN, in the gradient too
    a.requires_grad_()
    expected, last = [], c
    for t in range(steps):
        last = a[:, t] * last + b[:, t]
        expected.append(last)
    ours, theirs = linear_recurrence(a, b, c), torch.stack(expected, 1)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradients(ours.sin().sum(), [a]), gradients(theirs.sin().sum(), [a]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LockedDropout(1.0), "drop probability 1.0"),
        (lambda: EmbeddingDropout(nn.Embedding(3, 2), -0.1), "drop probability"),
        (lambda: EmbeddingDropout(nn.Embedding(3, 2, sparse=True)), "sparse"),
        (lambda: WeightDrop(nn.Linear(2, 2), "weight_hh_l0"), "it has weight, bias"),
        (lambda: WeightDrop(nn.Linear(2, 2), []), "different parameters"),
        (lambda: WeightDrop(nn.Linear(2, 2), "weight", 1.5), "drop probability 1.5"),
        (lambda: QRNN(2, 0), "at least 1"),
        (lambda: LockedDropout(0.5)(torch.ones(2, 3)), "batch, time and features"),
    ],
)
def test_arguments_out_of_range(make, message):
    with pytest.raises(InvalidArgumentError, match=message):
        make()
