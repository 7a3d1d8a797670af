"""Constructs that drop inside one operation, against models that do the same with plain dropout, written by hand.

The pairs share their parameters; sites, loss, exact penalty and its gradient must agree to rounding, and the estimators
must agree among each other and with the exact value over all patterns of signs.
"""

import inspect
import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from agreement import check_agreement, check_pair, gradients, run
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from lightning_dropreg import attention_dropout, drop
from lightning_dropreg.dual import REPLACEMENTS
from lightning_dropreg.errors import InvalidArgumentError, UnsupportedSiteError
from lightning_dropreg.estimators import ESTIMATORS
from lightning_dropreg.functional import dropout_loss, explicit_penalty, find_sites, implicit_noise, plain_loss
from lightning_dropreg.handlers import HANDLERS
from lightning_dropreg.inspection import inspect_step
from lightning_dropreg.interception import Interception


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


# --- recurrent networks -----------------------------------------------------------------------------------------

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


# --- attention --------------------------------------------------------------------------------------------------


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


def test_every_composite_function_of_torch_is_opened():
    """Python functions that offer themselves to modes as a whole hide what they call; none may hide a dropout."""
    drops = re.compile(r"(feature_)?(alpha_)?dropout[123]?d?_?|scaled_dot_product_attention|softmax")
    for name, function in vars(F).items():
        if inspect.isfunction(function) and function.__module__ == F.__name__:
            called = function.__code__.co_names
            if any(map(re.compile("has_torch_function").match, called)) and any(map(drops.fullmatch, called)):
                assert function in HANDLERS or function in REPLACEMENTS, name


# --- alpha dropout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("function", "shape"), [(F.alpha_dropout, (2, 2)), (F.feature_alpha_dropout, (2, 2, 2))])
def test_alpha_dropout_takes_the_values_of_torch(function, shape):
    """Over all masks: the values that torch's operation takes, and their mean where there is no noise."""
    p, x = 0.3, torch.randn(shape)
    alpha = -1.7580993408473766
    a = ((1 - p) * (1 + p * alpha**2)) ** -0.5
    kept, dropped = a * x - a * alpha * p, torch.full(shape, a * alpha - a * alpha * p)
    found = torch.stack([function(x, p, True) for _ in range(60)])
    torch.testing.assert_close(torch.minimum((found - kept).abs(), (found - dropped).abs()), torch.zeros_like(found))
    with Interception(lambda site, h: h):
        mean = function(x, p, True)
    torch.testing.assert_close(mean, (1 - p) * kept + p * dropped)
    for keep in itertools.product([0.0, 1.0], repeat=4):
        mask = torch.tensor(keep).reshape((2, 2) + (1,) * (len(shape) - 2))
        with Interception(lambda site, h: h * mask / (1 - site.p)) as mode:
            ours = function(x, p, True)
        torch.testing.assert_close(ours, torch.where(mask > 0, kept, dropped))
        assert mode.sites[0].mask_shape == mask.shape


@pytest.mark.parametrize("module", [nn.AlphaDropout, nn.FeatureAlphaDropout])
@pytest.mark.parametrize("inplace", [False, True])
def test_alpha_dropout_in_every_estimator(module, inplace):
    net = nn.Sequential(nn.Linear(2, 2), nn.SELU(), module(0.2, inplace), nn.Linear(2, 3))
    x, y = torch.randn(3, 2), torch.tensor([0, 1, 2])
    closure = lambda: F.cross_entropy(net(x), y)
    check_agreement(closure, list(net.parameters()))
    assert net[2].eval()(x) is x


# --- stochastic depth, and dropout of one's own -------------------------------------------------------------------


def of_timm(x, p):
    def drop_path(x, drop_prob=0.0, training=False, scale_by_keep=True):
        keep_prob = 1 - drop_prob
        random_tensor = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep_prob)
        if keep_prob > 0.0 and scale_by_keep:
            random_tensor.div_(keep_prob)
        return x * random_tensor

    return drop_path(x, p)


def of_torchvision(x, p):
    def stochastic_depth(input, p, mode):
        survival_rate = 1.0 - p
        size = [input.shape[0]] + [1] * (input.ndim - 1)
        noise = torch.empty(size, dtype=input.dtype, device=input.device)
        noise = noise.bernoulli_(survival_rate)
        if survival_rate > 0.0:
            noise.div_(survival_rate)
        return input * noise

    return stochastic_depth(x, p, "row")


def of_transformers(x, p):
    def drop_path(input, drop_prob=0.0, training=False):
        keep_prob = 1 - drop_prob
        shape = (input.shape[0],) + (1,) * (input.ndim - 1)
        random_tensor = keep_prob + torch.rand(shape, dtype=input.dtype, device=input.device)
        random_tensor.floor_()  # binarize
        return input.div(keep_prob) * random_tensor

    return drop_path(x, p)


def of_efficientnet(x, p):
    def drop_connect(inputs, p, training):
        keep_prob = 1 - p
        random_tensor = keep_prob
        random_tensor += torch.rand([inputs.shape[0], 1], dtype=inputs.dtype, device=inputs.device)
        binary_tensor = torch.floor(random_tensor)
        return inputs / keep_prob * binary_tensor

    return drop_connect(x, p, True)


@pytest.mark.parametrize("function", [of_timm, of_torchvision, of_transformers, of_efficientnet])
def test_stochastic_depth(function):
    a, b = nn.Linear(2, 3), nn.Linear(3, 3)
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])

    def closure(function=function):
        h = torch.tanh(a(x))
        return F.cross_entropy(b(h + function(h * 2, 0.3)), y)

    def by_hand():
        return closure(lambda h, p: drop(h, p, (4, 1)))

    parameters = [*a.parameters(), *b.parameters()]
    ours, theirs = run("exact", closure), run("exact", by_hand)
    for one, other in ((ours.penalty, theirs.penalty), (ours.noise, theirs.noise)):
        torch.testing.assert_close(one, other)
        torch.testing.assert_close(gradients(one, parameters), gradients(other, parameters))
    check_agreement(closure, parameters)
    draws = [dropout_loss(c, k=2, generator=torch.Generator().manual_seed(4)) for c in (closure, by_hand)]
    torch.testing.assert_close(*draws)
    (site,) = find_sites(closure)
    assert (site.kind, site.mask_shape) == ("stochastic_depth", (4, 1))


def test_other_drawings_are_left_alone():
    net, x = nn.Linear(3, 3), torch.randn(4, 3)

    def closure():
        augmented = x * torch.empty(4, 3).bernoulli_(0.5) + torch.floor(x) + torch.floor(x.clone()).floor_()
        return F.mse_loss(net(augmented), x)

    assert find_sites(closure) == []

    def drop_path(x):
        return x * torch.floor(0.3 + torch.rand(4, 1))

    with pytest.raises(UnsupportedSiteError, match="keep probability is not where"):
        find_sites(lambda: F.mse_loss(net(drop_path(x)), x))


def test_dropout_of_ones_own():
    net = nn.Linear(3, 2)
    x, y = torch.randn(4, 5, 3), torch.randn(4, 5, 2)
    mine = lambda: F.mse_loss(net(drop(x, 0.3, (4, 1, 3))), y)
    torchs = lambda: F.mse_loss(net(F.dropout1d(x.transpose(1, 2), 0.3).transpose(1, 2)), y)
    parameters = list(net.parameters())
    a, b = run("exact", mine), run("exact", torchs)
    torch.testing.assert_close(a.penalty, b.penalty)
    torch.testing.assert_close(gradients(a.penalty, parameters), gradients(b.penalty, parameters))
    check_agreement(mine, parameters)
    dropped = drop(torch.ones(1000, 3), 0.3, (1000, 1))
    assert {round(v, 6) for v in dropped.unique().tolist()} == {0.0, round(1 / 0.7, 6)}
    assert ((dropped == 0).all(1) | (dropped > 0).all(1)).all()
    with pytest.raises(InvalidArgumentError, match="does not fit"):
        drop(x, 0.3, (4, 2, 3))
    # DropConnect: weights are dropped from
    assert len(find_sites(lambda: F.mse_loss(F.linear(x, drop(net.weight, 0.2), net.bias), y))) == 1


def by_hand(x):
    return x * (torch.rand(4, 3) > 0.5) * 2


def by_an_operation_that_modes_do_not_see(x):
    return torch.ops.aten.native_dropout.default(x, 0.5, True)[0]


@pytest.mark.parametrize("function", [by_hand, by_an_operation_that_modes_do_not_see])
def test_randomness_that_is_not_understood_is_told(function):
    net, x = nn.Linear(3, 3), torch.randn(4, 3)
    closure = lambda: F.mse_loss(F.dropout(net(function(x)), 0.3), x)
    with pytest.warns(UserWarning, match=r"draws random numbers.*test_sites_handlers\.py.*lightning_dropreg\.drop"):
        inspect_step(closure, need_losses=True)


@pytest.mark.parametrize("function", [of_timm, of_torchvision, of_transformers, of_efficientnet])
def test_stochastic_depth_is_not_told(function, recwarn):
    net, x = nn.Linear(3, 3), torch.randn(4, 3)
    inspect_step(lambda: F.mse_loss(function(net(x), 0.3), x), need_losses=True)
    assert [w for w in recwarn if "random" in str(w.message)] == []


def test_understood_randomness_is_not_told(recwarn):
    net = nn.Sequential(nn.LSTM(3, 3, 2, dropout=0.3))
    attention, x = nn.TransformerEncoderLayer(3, 1, 3, 0.2), torch.randn(4, 2, 3)
    inspect_step(lambda: F.mse_loss(F.alpha_dropout(net(attention(drop(x, 0.1)))[0], 0.3, True), x), need_losses=True)
    assert [w for w in recwarn if "random" in str(w.message)] == []


# --- one module, several calls; in place ------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
def test_one_module_called_several_times(inplace):
    drop, a, b = nn.Dropout(0.3, inplace), nn.Linear(2, 3), nn.Linear(3, 3)
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 2, 0])

    def closure():
        return F.cross_entropy(b(drop(torch.sigmoid(b(drop(a(x)))) * 1.0)), y)

    def by_hand():
        return F.cross_entropy(b(F.dropout(torch.sigmoid(b(F.dropout(a(x), 0.3))), 0.3)), y)

    parameters = [*a.parameters(), *b.parameters()]
    check_pair(closure, by_hand, parameters)
    check_agreement(closure, parameters)
    noise = implicit_noise(closure)
    assert noise.isfinite()


def test_every_site_has_masks_of_its_own():
    x = torch.ones(1000, requires_grad=True)
    masks = []

    def closure():
        masks.extend((F.dropout(x, 0.5) > 0).double() for _ in range(2))
        return x.sum()

    dropout_loss(closure, k=2)
    agreements = [(a == b).double().mean() for a, b in itertools.combinations(masks, 2)]
    assert all(0.4 < agreement < 0.6 for agreement in agreements)


def test_sign_patterns_give_the_exact_penalty():
    """The mean over all directions of a site with 4 entries, no statistics."""
    net = nn.Sequential(nn.Linear(2, 2), nn.SELU(), nn.AlphaDropout(0.2), nn.Linear(2, 3))
    x, y = torch.randn(2, 2), torch.tensor([0, 2])
    closure = lambda: F.cross_entropy(net(x), y)
    total = torch.zeros(())
    for signs in itertools.product([-1.0, 1.0], repeat=4):
        r = 0.5 * torch.tensor(signs).reshape(2, 2)  # sqrt(0.2 / 0.8)
        outputs = []
        for step in (1e-4, -1e-4):
            with Interception(lambda site, h: h * (1 + step * r)):
                outputs.append(net(x))
        z, u = (outputs[0] + outputs[1]) / 2, (outputs[0] - outputs[1]) / 2e-4
        p = z.softmax(-1)
        total = total + ((p * u**2).sum() - ((p * u).sum(-1) ** 2).sum()) / 2 / 2 / 16
    torch.testing.assert_close(total, explicit_penalty(closure, estimator="exact"), rtol=1e-6, atol=1e-9)
