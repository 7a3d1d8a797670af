"""Models that people train, unmodified, at tiny size with random weights.

For each: the sites against a list written by hand from its source, one step of Algorithm 2 and one of ``DROPOUT_4`` by
a Trainer, and with strength 0 the loss of the model with its dropout switched off.
"""

import copy
import re

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from fits import make_trainer
from torch import nn
from torch.utils.data import DataLoader

import lightning_dropreg as dr
from lightning_dropreg.errors import UnsupportedOperationError
from lightning_dropreg.functional import explicit_penalty, find_sites


class Client(L.LightningModule):
    """Nothing but a network and its loss."""

    def __init__(self, net, loss):
        super().__init__()
        self.net, self.loss = net, loss

    def training_step(self, batch, batch_idx):
        return self.loss(self.net, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def tokens(*shape):
    return torch.arange(torch.Size(shape).numel()).reshape(shape) * 7 % 11


def lightning_lstm():
    from lightning.pytorch.demos.lstm import LightningLSTM, SimpleLSTM

    class Tiny(LightningLSTM):
        def __init__(self):
            L.LightningModule.__init__(self)
            self.model, self.hidden = SimpleLSTM(11, 6, 6, 3, 0.2), None

        def prepare_data(self):
            """Nothing to download."""

    sites = [("model.drop", "dropout", 0.2), *[("model.rnn", "lstm_dropout", 0.2)] * 2, ("model.drop", "dropout", 0.2)]
    return Tiny(), (tokens(3, 5), tokens(3, 5)), sites


def lightning_transformer():
    from lightning.pytorch.demos import LightningTransformer, Transformer

    class Tiny(LightningTransformer):
        def __init__(self):
            L.LightningModule.__init__(self)
            self.model = Transformer(11, 8, 2, 8, 1, 0.2)

        def prepare_data(self):
            """Nothing to download."""

    encoder = [("self_attn", "attention"), ("dropout1", "dropout"), ("dropout", "dropout"), ("dropout2", "dropout")]
    decoder = [
        ("self_attn", "attention"),
        ("dropout1", "dropout"),
        ("multihead_attn", "attention"),
        ("dropout2", "dropout"),
        ("dropout", "dropout"),
        ("dropout3", "dropout"),
    ]
    sites = [
        *[("model.pos_encoder.dropout", "dropout", 0.2)] * 2,
        *[(f"model.transformer.encoder.layers.0.{name}", kind, 0.2) for name, kind in encoder],
        *[(f"model.transformer.decoder.layers.0.{name}", kind, 0.2) for name, kind in decoder],
    ]
    return Tiny(), (tokens(3, 5), tokens(3, 5)), sites


def huggingface(model, batch, sites):
    return Client(model, lambda net, batch: net(**batch).loss), batch, [(f"net.{n}", k, p) for n, k, p in sites]


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2, embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.3
    )
    sites = [("transformer.drop", "dropout", 0.1)]
    for layer in ("transformer.h.0", "transformer.h.1"):
        sites += [
            (f"{layer}.attn", "attention", 0.2),
            (f"{layer}.attn.resid_dropout", "dropout", 0.3),
            (f"{layer}.mlp.dropout", "dropout", 0.3),
        ]
    return huggingface(transformers.GPT2LMHeadModel(config), {"input_ids": tokens(2, 6), "labels": tokens(2, 6)}, sites)


def gpt2_checkpointed():
    client, batch, sites = gpt2()
    client.net.gradient_checkpointing_enable({"use_reentrant": False})
    return client, batch, sites


def bert(attention="sdpa"):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=8, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2, classifier_dropout=0.3,
        num_labels=3, attn_implementation=attention,
    )  # fmt: skip
    layer = "bert.encoder.layer.0"
    sites = [
        ("bert.embeddings.dropout", "dropout", 0.1),
        (f"{layer}.attention.self", "attention" if attention == "sdpa" else "dropout", 0.2),
        (f"{layer}.attention.output.dropout", "dropout", 0.1),
        (f"{layer}.output.dropout", "dropout", 0.1),
        ("dropout", "dropout", 0.3),
    ]
    mask = (tokens(4, 6) > 2).long()
    batch = {"input_ids": tokens(4, 6), "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 0])}
    return huggingface(transformers.BertForSequenceClassification(config), batch, sites)


def bert_eager():
    return bert("eager")


def t5():
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.1, decoder_start_token_id=0,
        pad_token_id=0,
    )  # fmt: skip
    batch = {"input_ids": tokens(2, 6), "labels": tokens(2, 4)}

    def block(path, cross):
        for number, part in enumerate(["SelfAttention", *["EncDecAttention"] * cross]):
            yield f"{path}.layer.{number}.{part}", "attention", 0.1
            yield f"{path}.layer.{number}.dropout", "dropout", 0.1
        yield f"{path}.layer.{1 + cross}.DenseReluDense.dropout", "dropout", 0.1
        yield f"{path}.layer.{1 + cross}.dropout", "dropout", 0.1

    sites = []
    for stack in ("encoder", "decoder"):
        sites += [(f"{stack}.dropout", "dropout", 0.1), *block(f"{stack}.block.0", stack == "decoder")]
        sites += [(f"{stack}.dropout", "dropout", 0.1)]
    return huggingface(transformers.T5ForConditionalGeneration(config), batch, sites)


def swin():
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=8, patch_size=2, num_channels=1, embed_dim=4, depths=[2], num_heads=[2], window_size=2, num_labels=3,
        hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2, drop_path_rate=0.4, attn_implementation="eager",
    )  # fmt: skip
    batch = {"pixel_values": torch.randn(3, 1, 8, 8), "labels": torch.tensor([0, 1, 2])}
    sites = [("swin.embeddings.dropout", "dropout", 0.1)]
    for block, rate in (("swin.encoder.layers.0.blocks.0", 0.0), ("swin.encoder.layers.0.blocks.1", 0.4)):
        sites += [(f"{block}.attention", "dropout", 0.2), (f"{block}.dropout", "dropout", 0.1)]
        sites += [(f"{block}.drop_path", "stochastic_depth", rate)] * (rate > 0)
        sites += [(f"{block}.dropout", "dropout", 0.1)]
    return huggingface(transformers.SwinForImageClassification(config), batch, sites)


def efficientnet():
    package = pytest.importorskip("efficientnet_pytorch")
    arguments = ["r1_k3_s11_e1_i4_o4_se0.25", "r2_k3_s11_e2_i4_o4_se0.25"]
    blocks = package.utils.BlockDecoder.decode(arguments)
    parameters = package.utils.efficientnet(
        width_coefficient=0.1, depth_coefficient=1.0, image_size=8, dropout_rate=0.3, drop_connect_rate=0.2,
        num_classes=3,
    )[1]  # fmt: skip
    net = package.EfficientNet(blocks, parameters)
    batch = (torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))
    # of three blocks, only the repeated one has a residual connection: the package compares the stride [1] with 1
    sites = [
        ("net._blocks.2", "stochastic_depth", 0.4 / 3),
        ("net._dropout", "dropout", 0.3),
    ]
    return Client(net, lambda net, batch: F.cross_entropy(net(batch[0]), batch[1])), batch, sites


def tabular():
    package = pytest.importorskip("rtdl_revisiting_models")
    net = package.FTTransformer(
        n_cont_features=3, cat_cardinalities=[4], d_out=1, n_blocks=1, d_block=8, attention_n_heads=2,
        attention_dropout=0.2, ffn_d_hidden=8, ffn_d_hidden_multiplier=None, ffn_dropout=0.1, residual_dropout=0.3,
    )  # fmt: skip
    batch = (torch.randn(5, 3), torch.arange(5)[:, None] % 4, torch.randn(5))
    path = "net.backbone.blocks.0"
    sites = [
        (f"{path}.attention.dropout", "dropout", 0.2),
        (f"{path}.attention_residual_dropout", "dropout", 0.3),
        (f"{path}.ffn.dropout", "dropout", 0.1),
        (f"{path}.ffn_residual_dropout", "dropout", 0.3),
    ]
    return Client(net, lambda net, batch: F.mse_loss(net(batch[0], batch[1]).squeeze(-1), batch[2])), batch, sites


def graph():
    package = pytest.importorskip("torch_geometric.nn")
    net = package.GAT(3, 4, num_layers=2, out_channels=3, dropout=0.3, heads=2, v2=True)
    edges = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])
    batch = (torch.randn(5, 3), edges, torch.tensor([0, 1, 2, 0, 1]))
    sites = [("net.convs.0", "dropout", 0.3), ("net.dropout", "dropout", 0.3), ("net.convs.1", "dropout", 0.3)]
    return Client(net, lambda net, batch: F.cross_entropy(net(batch[0], batch[1]), batch[2])), batch, sites


CLIENTS = [
    lightning_lstm, lightning_transformer, gpt2, gpt2_checkpointed, bert, bert_eager, t5, swin, efficientnet, tabular,
    graph,
]  # fmt: skip


WITHOUT_FORWARD_MODE = {gpt2_checkpointed: "checkpointed", efficientnet: "SwishImplementation"}


def make(client):
    torch.manual_seed(0)
    module, batch, sites = client()
    return module.train(), batch, sites


def plain(module, batch):
    """The loss with dropout switched off by hand: everything but the batch norms in evaluation mode."""
    module = copy.deepcopy(module).eval()
    for child in module.modules():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            child.train()
    module.log = lambda *args, **kwargs: None
    return module.training_step(batch, 0).detach()


def fit(module, batch, callbacks):
    trainer = make_trainer(callbacks, max_steps=1)
    trainer.fit(module, DataLoader([batch], batch_size=None))
    return trainer


@pytest.mark.parametrize("client", CLIENTS)
def test_sites(client):
    module, batch, expected = make(client)
    module.log = lambda *args, **kwargs: None
    found = find_sites(lambda: module.training_step(batch, 0), module=module)
    found = [(re.sub(r" \(.*", "", site.name), site.kind, round(site.p, 9)) for site in found]
    assert found == [(name, kind, round(p, 9)) for name, kind, p in expected]


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("callbacks", ["algorithm 2", "dropout_4", "algorithm 4"])
def test_one_step(client, callbacks, recwarn):
    module, batch, _ = make(client)
    before = [p.detach().clone() for p in module.parameters()]
    trainer = fit(module, batch, {
        "algorithm 2": lambda: [dr.ExplicitPenalty(), dr.ImplicitNoise()],
        "dropout_4": lambda: [dr.MiniBatchDropout(4)],
        "algorithm 4": lambda: [dr.MiniBatchDropout(4), dr.ImplicitNoise()],
    }[callbacks]())  # fmt: skip
    assert trainer.global_step == 1
    assert not any("random numbers" in str(warning.message) for warning in recwarn)
    after = list(module.parameters())
    assert all(p.isfinite().all() for p in after)
    assert any((p != q).any() for p, q in zip(after, before))
    metrics = trainer.callback_metrics
    assert metrics["dropreg/loss"].isfinite()
    if callbacks == "algorithm 2":
        assert metrics["dropreg/explicit_penalty"] > 0
    if callbacks != "dropout_4":
        assert metrics["dropreg/noise_norm"] > 0


@pytest.mark.parametrize("client", CLIENTS)
def test_strength_zero_is_the_plain_loss(client):
    module, batch, _ = make(client)
    expected = plain(module, batch)
    trainer = fit(module, batch, [dr.ExplicitPenalty(strength=0.0), dr.ImplicitNoise(strength=0.0)])
    torch.testing.assert_close(trainer.callback_metrics["dropreg/loss"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("client", CLIENTS)
def test_penalty_of_all_estimators(client):
    """In double precision the antithetic form is that of forward mode; the double backward is near the exact value."""
    module, batch, _ = make(client)
    module = module.double()
    module.log = lambda *args, **kwargs: None
    batch = torch.utils._pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, batch)
    step = 1e-3  # the norms of T5 are computed in single precision, come what may

    def draw(estimator):
        fresh = copy.deepcopy(module)  # the hidden state of an LSTM goes on from call to call
        closure = lambda: fresh.training_step(batch, 0)
        return explicit_penalty(
            closure, estimator=estimator, step_size=step, generator=torch.Generator().manual_seed(1), module=fresh
        )

    antithetic = draw("antithetic")
    if client in WITHOUT_FORWARD_MODE:
        with pytest.raises(UnsupportedOperationError, match=WITHOUT_FORWARD_MODE[client]):
            draw("forward")
    else:
        torch.testing.assert_close(antithetic, draw("forward"), rtol=2e-3, atol=1e-7)
    assert 0.1 < draw("double_backward") / antithetic < 10


@pytest.mark.parametrize("client", CLIENTS)
def test_the_audit_finds_nothing(client):
    module, batch, _ = make(client)
    before = copy.deepcopy(module.state_dict())
    state = torch.get_rng_state()
    found = dr.audit(module, batch)
    assert [one for one in found if one.severity != "note"] == []
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), module.state_dict().values(), strict=True))
