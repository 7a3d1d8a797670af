"""Models as people have them, compiled unmodified: gradients and losses are those without compiling."""

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from compiled_models import OLD
from fits import make_trainer
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.data import DataLoader

import lightning_dropreg as dr
from lightning_dropreg import errors

SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def tokens(*shape):
    return torch.arange(torch.Size(shape).numel()).reshape(shape) * 7 % 11


def of_transformers(name, **options):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name.partition('For')[0].removesuffix('LMHeadModel')}Config")(**options)
    return getattr(transformers, name)(config)


def llama():
    model = of_transformers("LlamaForCausalLM", attention_dropout=0.1, vocab_size=11, pad_token_id=0, **SIZES)
    return model, {"input_ids": tokens(2, 6), "labels": tokens(2, 6)}


def gpt2():
    model = of_transformers("GPT2LMHeadModel", vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    return model, {"input_ids": tokens(2, 6), "labels": tokens(2, 6)}


def bert():
    model = of_transformers("BertForSequenceClassification", vocab_size=11, num_labels=3, **SIZES)
    mask = (tokens(4, 6) > 2).long()
    return model, {"input_ids": tokens(4, 6), "attention_mask": mask, "labels": torch.tensor([0, 1, 2, 0])}


def vit():
    images = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 3}
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    model = of_transformers("ViTForImageClassification", **images, **dropout, **SIZES)
    return model, {"pixel_values": torch.randn(3, 1, 8, 8), "labels": torch.tensor([0, 1, 2])}


class SelfAttention(nn.Module):
    def __init__(self, width, heads, p):
        super().__init__()
        self.qkv, self.out, self.drop = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Dropout(p)
        self.heads, self.p = heads, p

    def forward(self, x):
        b, t, width = x.shape
        q, k, v = (part.view(b, t, self.heads, -1).transpose(1, 2) for part in self.qkv(x).split(width, dim=2))
        p = self.p if self.training else 0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=p, is_causal=True)
        return self.drop(self.out(y.transpose(1, 2).contiguous().view(b, t, width)))


class SmallGPT(nn.Module):
    """As nanoGPT is made: the weights of the first layer are those of the last, and the loss is computed inside."""

    def __init__(self, vocabulary=11, width=8, layers=2, p=0.1):
        super().__init__()
        self.words, self.places, self.drop = nn.Embedding(vocabulary, width), nn.Embedding(8, width), nn.Dropout(p)
        mlp = lambda: nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(p))
        self.attention = nn.ModuleList(SelfAttention(width, 2, p) for _ in range(layers))
        self.mlps = nn.ModuleList(mlp() for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * layers + 1))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.words.weight

    def forward(self, input_ids, labels=None):
        x = self.drop(self.words(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device)))
        for number, (attention, mlp) in enumerate(zip(self.attention, self.mlps, strict=True)):
            x = x + attention(self.norms[2 * number](x))
            x = x + mlp(self.norms[2 * number + 1](x))
        logits = self.head(self.norms[-1](x))
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1), ignore_index=-1)
        return {"logits": logits, "loss": loss}


def small_gpt():
    return SmallGPT(), {"input_ids": tokens(2, 6), "labels": tokens(2, 6) // 2}


class Client(L.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net, self.seen = net, []

    def training_step(self, batch, batch_idx):
        return self.net(**batch)["loss"]

    def on_before_optimizer_step(self, optimizer):
        self.seen = [*self.seen, torch.cat([p.grad.reshape(-1) for p in self.parameters() if p.grad is not None])]

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen = [*self.seen, outputs["loss"]]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


CALLBACKS = {
    "algorithm 2": lambda: [dr.ExplicitPenalty(estimator="antithetic"), dr.ImplicitNoise(estimator="antithetic")],
    "k draws": lambda: [dr.MiniBatchDropout(2)],
}


def fit(make, how, method, backend):
    L.seed_everything(0, verbose=False)
    torch._dynamo.reset()
    counters.clear()
    net, batch = make()
    net = net.double()
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    if how == "in place":
        net.compile(backend=backend)
    elif how == "but for the loss":
        net.bert = torch.compile(net.bert, backend=backend)
    client = Client(torch.compile(net, backend=backend) if how == "wrapped" else net)
    make_trainer(CALLBACKS[method]()).fit(client.train(), DataLoader([batch] * 3, batch_size=None))
    return client.seen


CASES = [(make, "in place", "algorithm 2") for make in (llama, gpt2, bert, vit, small_gpt)]
CASES += [(bert, "but for the loss", "algorithm 2"), (bert, "wrapped", "k draws")]
CASES += [pytest.param(make, "wrapped", "k draws", marks=pytest.mark.slow) for make in (llama, gpt2, vit, small_gpt)]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("make", "how", "method"), CASES)
def test_compiled_as_uncompiled(make, how, method, backend, recwarn):
    plain, compiled = (fit(make, each, method, backend) for each in (None, how))
    assert len(plain) == 6
    # these compute their loss in float32 whatever they are given, Llama its norm too; Inductor rounds in another order
    near = 1e-6 if make in {llama, gpt2} and backend == "inductor" else 1e-10
    torch.testing.assert_close(compiled, plain, rtol=near, atol=near)
    warned = [str(w.message) for w in recwarn if w.category is errors.CompiledPartWarning]
    if OLD:
        return
    if make is bert and how == "in place":  # makes its loss inside, which Dynamo offers to no mode
        assert "other losses are seen (none)" in warned[0]
        return
    assert not warned
    assert counters["stats"]["unique_graphs"] <= 2  # what is before a loss and after it
