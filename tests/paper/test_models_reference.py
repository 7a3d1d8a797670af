"""The language models against loops in float64 that share no code with them, with a factor at every dropout site."""

import pytest
import torch
from agreement import gradients
from fits import make_trainer
from lightning.pytorch import seed_everything
from texts import numbers

import lightning_dropreg as dr
from lightning_dropreg.functional import find_sites
from lightning_dropreg.paper.data import LanguageModelingData
from lightning_dropreg.paper.models import LSTMLanguageModel, QRNNLanguageModel
from lightning_dropreg.passes import Off, run_pass

ROWS, TIME, WORDS = 2, 5, 7
SIZES = {"vocab_size": WORDS, "embedding_dim": 3, "hidden_dim": 4}
LSTM = {**SIZES, "num_layers": 3, "dropout": "locked", "weight_drop_prob": 0.4}
QRNN = {**SIZES, "num_layers": 4}


class Factors:
    """A pass that multiplies every site by a random factor of its mask's shape."""

    def __init__(self):
        self.given = []

    def __call__(self, site, h):
        self.given.append(1 + torch.randn(site.mask_shape) / 3)
        return h * self.given[-1]


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def lstm_logits(model, text, state, factors):
    """One row and one word at a time, from the equations."""
    weights = [
        [getattr(layer.module, name) for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")]
        for layer in model.layers
    ]
    # sites in the order of the computation: embedding, then weight and output of every layer
    on_input, *pairs = factors
    on_weights, on_outputs = pairs[0::2], pairs[1::2]
    logits = []
    for row in range(ROWS):
        hs, cs = [s[0][0, row] for s in state], [s[1][0, row] for s in state]
        for word in text[row]:
            x = model.embedding.weight[word] * on_input[row, 0]
            for k, (w_x, w_h, b_x, b_h) in enumerate(weights):
                gates = w_x @ x + b_x + (w_h * on_weights[k]) @ hs[k] + b_h
                n = len(hs[k])
                i, f, g, o = gates[:n], gates[n : 2 * n], gates[2 * n : 3 * n], gates[3 * n :]
                cs[k] = sigmoid(f) * cs[k] + sigmoid(i) * torch.tanh(g)
                hs[k] = sigmoid(o) * torch.tanh(cs[k])
                x = hs[k] * on_outputs[k][row, 0]
            logits.append(model.embedding.weight @ x + model.decoder.bias)
    return torch.stack(logits)


def qrnn_logits(model, text, state, factors):
    """One row and one word at a time, from the equations."""
    logits = []
    for row in range(ROWS):
        cells, before = [s[0][row] for s in state], state[0][1][row]
        for word in text[row]:
            x = model.embedding.weight[word] * factors[0][row, 0]
            for k, layer in enumerate(model.layers):
                seen = torch.cat([x, before]) if k == 0 else x
                if k == 0:
                    before = x
                z, f, o = (layer.gates.weight @ seen + layer.gates.bias).split(layer.hidden_size)
                cells[k] = sigmoid(f) * cells[k] + (1 - sigmoid(f)) * torch.tanh(z)
                x = sigmoid(o) * cells[k] * factors[k + 1][row, 0]
            logits.append(model.embedding.weight @ x + model.decoder.bias)
    return torch.stack(logits)


MODELS = {
    "lstm": (LSTMLanguageModel, LSTM, lstm_logits),
    "qrnn": (QRNNLanguageModel, QRNN, qrnn_logits),
}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient_are_those_of_plain_loops(name):
    torch.set_default_dtype(torch.float64)
    make, sizes, reference = MODELS[name]
    model = make(**sizes, init_range=0.8)
    torch.nn.init.normal_(model.decoder.bias)
    windows = torch.randint(WORDS, (ROWS, 2 * TIME + 1))
    model.training_step((windows[:, :TIME], windows[:, 1 : TIME + 1]), 0)  # leaves a state
    state = model._train_state
    text, target = windows[:, TIME:-1], windows[:, TIME + 1 :]
    rule = Factors()
    loss = run_pass(lambda: model.training_step((text, target), 1), rule).loss
    assert all(leaf.abs().sum() > 0 for pair in state for leaf in pair if leaf is not None)
    logits = reference(model, text, state, rule.given)
    expected = -torch.stack(
        [z[y] - torch.log(torch.exp(z).sum()) for z, y in zip(logits, target.flatten(), strict=True)]
    ).mean()
    torch.testing.assert_close(loss, expected)
    parameters = list(model.parameters())
    assert len(parameters) == 2 + len(model.layers) * (4 if name == "lstm" else 2)
    torch.testing.assert_close(gradients(loss, parameters), gradients(expected, parameters))


def test_the_qrnn_with_an_adaptive_softmax_is_that_with_all_log_probabilities():
    """Loss, exact penalty and their gradients, from the same parameters: log-probabilities are logits too."""
    torch.set_default_dtype(torch.float64)
    model = QRNNLanguageModel(**QRNN, init_range=0.8, cutoffs=[3, 5])
    for parameter in (model.decoder.bias, model.decoder.cluster_weight, model.decoder.cluster_bias):
        torch.nn.init.normal_(parameter)
    assert model.decoder.weight is model.embedding.weight
    text = torch.randint(WORDS, (ROWS, TIME + 1))
    text, target = text[:, :-1], text[:, 1:]
    sums = model(text)[0].exp().sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums))

    def full():
        return torch.nn.functional.cross_entropy(model(text)[0].flatten(0, 1), target.flatten())

    def adaptive():
        model._train_state = None
        return model.training_step((text, target), 0)

    parameters = list(model.parameters())
    for scalar in (lambda c: run_pass(c, Off()).loss, lambda c: dr.functional.explicit_penalty(c, estimator="exact")):
        ours, theirs = scalar(adaptive), scalar(full)
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(gradients(ours, parameters), gradients(theirs, parameters))


def test_the_sites_are_the_papers():
    model = LSTMLanguageModel(**LSTM)
    text = torch.zeros(ROWS, TIME, dtype=torch.long)
    sites = find_sites(lambda: model.training_step((text, text), 0), module=model)
    assert [(s.name, s.p, s.mask_shape) for s in sites] == [
        ("dropouts.0", 0.4, (2, 1, 3)),
        ("layers.0.module.weight_hh_l0", 0.4, (16, 4)),
        ("dropouts.1", 0.4, (2, 1, 4)),
        ("layers.1.module.weight_hh_l0", 0.4, (16, 4)),
        ("dropouts.2", 0.4, (2, 1, 4)),
        ("layers.2.module.weight_hh_l0", 0.4, (12, 3)),
        ("dropouts.3", 0.4, (2, 1, 3)),
    ]
    model = QRNNLanguageModel(**QRNN, input_drop_prob=0.2, output_drop_prob=0.3)
    sites = find_sites(lambda: model.training_step((text, text), 0), module=model)
    assert [s.p for s in sites] == [0.2, 0.1, 0.1, 0.1, 0.3]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "callbacks",
    [
        lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise()],
        lambda: [dr.MiniBatchDropout(2), dr.ImplicitNoise()],
        lambda: [dr.MiniBatchDropout(2), dr.ImplicitNoise(source="dropout")],
    ],
    ids=["algorithm 2", "algorithm 4", "section 3.1"],
)
def test_two_batches_under_all_callbacks(name, callbacks):
    make, sizes, _ = MODELS[name]
    seed_everything(1, verbose=False)
    model = make(**sizes)
    before = [p.clone() for p in model.parameters()]
    data = LanguageModelingData(numbers(200), batch_size=2, eval_batch_size=1, window=5, vocab_size=WORDS)
    make_trainer(callbacks(), limit_train_batches=2, gradient_clip_val=0.25).fit(model, datamodule=data)
    assert all(not a.equal(b) and torch.isfinite(b).all() for a, b in zip(before, model.parameters(), strict=True))


def test_the_weights_at_the_start_do_not_depend_on_what_is_dropped():
    def weights(**options):
        seed_everything(3, verbose=False)
        model = LSTMLanguageModel(**SIZES, num_layers=3, **options)
        return [p for _, p in sorted(model.named_parameters(), key=lambda pair: tuple(pair[1].shape))]

    plain, dropped = weights(drop_prob=0.0), weights(dropout="locked", weight_drop_prob=0.4)
    assert sorted(p.sum().item() for p in plain) == sorted(p.sum().item() for p in dropped)


def test_a_step_is_in_proportion_to_the_length_of_the_window():
    def step(window, length):
        seed_everything(1, verbose=False)
        optimizer = lambda parameters: torch.optim.SGD(parameters, lr=30)
        model = LSTMLanguageModel(**SIZES, window=window, optimizer=optimizer)
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        text = torch.randint(WORDS, (2, length + 1), generator=torch.Generator().manual_seed(1))
        loader = torch.utils.data.DataLoader([(text[:, :-1], text[:, 1:])], batch_size=None)
        trainer = make_trainer(gradient_clip_val=0.25)
        trainer.fit(model, loader)
        assert trainer.optimizers[0].param_groups[0]["lr"] == 30
        return torch.cat([p.detach().flatten() for p in model.parameters()]) - before

    torch.testing.assert_close(step(10, 5), step(None, 5) / 2)
    torch.testing.assert_close(step(10, 20), step(None, 20) * 2)
