"""Planted faults: for each id modules in which exactly that is wrong, and where."""

import random

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Body(nn.Module):
    """A network around something, with a loss."""

    def __init__(self, inner, **more):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(16, 32), inner, nn.Linear(32, 3)
        for name, module in more.items():
            self.add_module(name, module)

    def forward(self, x):
        return F.softmax(self.last(self.inner(torch.tanh(self.first(x)))), -1).square().sum(-1).mean()


class Layer(nn.Module):
    def __init__(self, p=0.4):
        super().__init__()
        self.p = p


class Always(Layer):
    def forward(self, h):
        return F.dropout(h, self.p)


class AttentionAlways(Layer):
    def forward(self, h):
        q = h.unsqueeze(0)
        return F.scaled_dot_product_attention(q, q, q, dropout_p=self.p)[0]


class UnscaledDropout(Layer):
    def forward(self, h):
        return h * (torch.rand_like(h) >= self.p) if self.training else h


class UndoneDropout(nn.Dropout):
    def forward(self, h):
        return super().forward(h) * (1 - self.p)


class KeepDropout(Layer):
    def forward(self, h):
        return h * (torch.rand_like(h) < self.p) / self.p if self.training else h


class KeepAsDrop(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = 0.1

    def forward(self, h):
        return F.dropout(h, 1 - self.dropout, self.training)


class OtherRate(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = 0.1

    def forward(self, h):
        return F.dropout(h, training=self.training)


class Seeded(Layer):
    def forward(self, h):
        torch.manual_seed(0)
        return F.dropout(h, self.p, self.training)


class KeptDropout(Layer):
    mask = None

    def forward(self, h):
        if not self.training:
            return h
        if self.mask is None:
            self.mask = (torch.rand_like(h) >= self.p) / (1 - self.p)
        return h * self.mask


class SmallMaskDropout(Layer):
    def forward(self, h):
        return h * (torch.rand(h.shape[1:]) >= self.p) / (1 - self.p) if self.training else h


class Forgets(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, h):
        return h


class Dead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_dropout = 0.2

    def forward(self, h):
        return h


class Zeroing(nn.Dropout):
    """Sets its probability to 0 in place of asking for its mode."""

    def forward(self, h):
        if not self.training:
            self.p = 0.0
        return super().forward(h)


class ByNumpy(nn.Module):
    def forward(self, h):
        return h + float(np.random.rand())


class ByTorch(nn.Module):
    def forward(self, h):
        return h + torch.randn_like(h)


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.rnn = nn.GRU(32, 32, 1)
        self.rnn.dropout = 0.3

    def forward(self, h):
        return self.rnn(h)[0]


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.4)

    def forward(self, h):
        return checkpoint(self.drop, h, use_reentrant=False, preserve_rng_state=False)


class TwoMasks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h * (torch.rand_like(h) >= 0.4) / 0.6

    @staticmethod
    def backward(ctx, grad):
        return grad * (torch.rand_like(grad) >= 0.4) / 0.6


class FusedDropout(Layer):
    def forward(self, h):
        return TwoMasks.apply(h) if self.training else h


class ByHand(nn.Module):
    """Dropout as people write it, in the middle of a forward."""

    def __init__(self, draw, act=lambda h, mask: h * mask / 0.6, always=False):
        super().__init__()
        self.draw, self.act, self.always = draw, act, always

    def forward(self, h):
        return self.act(h, self.draw(h)) if self.training or self.always else h


def coins(h):
    return torch.tensor([[random.random() < 0.6 for _ in row] for row in h])


class Reentrant(Checkpointed):
    def forward(self, h):
        return checkpoint(self.drop, h, use_reentrant=True, preserve_rng_state=False)


class Recomputed(Checkpointed):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, h):
        return checkpoint(lambda h: self.drop(torch.tanh(self.drop(h))), h, use_reentrant=self.reentrant)


class ReluByHand(nn.Module):
    """What is 0 here depends on a dropout before, and another random number is drawn."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.2)

    def forward(self, h):
        h = self.drop(h).roll(1) + float(np.random.rand()) * 0
        return h * (h > 0)


class Autoencoder(Body):
    """Masks its loss, not what it computes: also in evaluation, and rightly so."""

    def __init__(self):
        super().__init__(nn.Dropout(0.1))

    def forward(self, x):
        losses = (self.last(self.inner(torch.tanh(self.first(x)))) - x[:, :3]).square()
        masked = torch.rand(losses.shape) > 0.5
        filled = losses.masked_fill(~masked, 1.0) + losses.mean() * torch.where(masked, losses, 0.0)
        return (losses * masked).sum() / masked.sum() + 0 * filled.mean()


class BeforeOutput(Body):
    """Dropout right before the last layer of a regression."""

    def __init__(self, loss, p=0.5):
        super().__init__(nn.Identity(), drop=nn.Dropout(p))
        self.loss = loss

    def forward(self, x):
        return self.loss(self.last(self.drop(torch.relu(self.first(x)))), x[:, :3])


class Stepping(L.LightningModule):
    """A module with an optimizer."""

    def __init__(self, optimizer):
        super().__init__()
        self.net, self.optimizer = Body(nn.Dropout(0.4)), optimizer

    def training_step(self, batch, batch_idx):
        return self.net(batch)

    def configure_optimizers(self):
        return {"optimizer": self.optimizer(self.parameters())}


class SAM(torch.optim.SGD):
    """Called like one that evaluates the loss twice."""


class OnOutput(Body):
    def __init__(self, loss):
        super().__init__(nn.Identity(), drop=nn.Dropout(0.3))
        self.loss = loss

    def forward(self, x):
        return self.loss(self.drop(self.last(self.inner(self.first(x)))))


def frozen_part():
    body = Body(nn.Sequential(nn.Linear(32, 32), nn.Dropout(0.2)))
    body.inner.eval()
    return body


def frozen_layer():
    body = Body(nn.Dropout(0.2))
    body.inner.eval()
    return body


def before_norm(p):
    return Body(nn.Sequential(nn.Dropout(p), nn.BatchNorm1d(32)))


# id, its module, and what its place begins with
ZOO = [
    ("unreached", lambda: Body(Forgets()), "inner.drop.p (zoo.py:"),
    ("unreached", lambda: Body(Dead()), "inner.attention_dropout (zoo.py:"),
    ("unreached", lambda: Body(OneLayer()), "inner.rnn.dropout (zoo.py:"),
    ("active-in-eval", lambda: Body(Always()), "inner (zoo.py:"),
    ("active-in-eval", lambda: Body(AttentionAlways()), "inner (zoo.py:"),
    ("wrong-rate", lambda: Body(KeepDropout()), "inner (zoo.py:"),
    ("wrong-rate", lambda: Body(KeepAsDrop()), "inner.dropout (zoo.py:"),
    ("wrong-rate", lambda: Body(OtherRate()), "inner (zoo.py:"),
    ("wrong-scale", lambda: Body(UnscaledDropout()), "inner (zoo.py:"),
    ("wrong-scale", lambda: Body(UndoneDropout(0.4)), "inner (zoo.py:"),
    ("frozen-mask", lambda: Body(Seeded()), "inner (zoo.py:"),
    ("frozen-mask", lambda: Body(KeptDropout()), "inner (zoo.py:"),
    ("frozen-mask", lambda: Body(SmallMaskDropout()), "inner (zoo.py:"),
    ("backward-mask", lambda: Body(Checkpointed()), "inner.drop (zoo.py:"),
    ("backward-mask", lambda: Body(FusedDropout()), "inner (zoo.py:"),
    ("on-output", lambda: OnOutput(lambda z: F.cross_entropy(z, z.argmax(-1))), "drop (zoo.py:"),
    ("on-output", lambda: OnOutput(lambda z: F.mse_loss(z.reshape(-1), torch.ones(z.numel()))), "drop (zoo.py:"),
    ("backward-mask", lambda: Body(Reentrant()), "inner.drop (zoo.py:"),
    ("on-output", lambda: OnOutput(lambda z: (z - 1).square().mean()), "drop (zoo.py:"),
    ("on-output", lambda: BeforeOutput(F.mse_loss), "drop (zoo.py:"),
    ("on-output", lambda: BeforeOutput(lambda z, y: (y - z).abs().mean()), "drop (zoo.py:"),
    ("variance-shift", lambda: before_norm(0.5), "inner.1 (zoo.py:"),
    ("variance-shift", lambda: before_norm(0.3), "inner.1 (zoo.py:"),
    ("stuck-at-zero", lambda: Body(Zeroing(0.4)), "inner.p (zoo.py:"),
    ("stuck-at-zero", lambda: Body(nn.Sequential(Zeroing(0.2))), "inner.0.p (zoo.py:"),
    ("eval-in-train", frozen_part, "inner (zoo.py:"),
    ("eval-in-train", frozen_layer, "inner (zoo.py:"),
    ("hand-made", lambda: Body(ByNumpy()), "inner (zoo.py:"),
    ("hand-made", lambda: Body(ByTorch()), "inner (zoo.py:"),
    ("hand-made", lambda: Body(ByHand(lambda h: torch.rand(h.shape) > 0.4)), "inner (zoo.py:"),
    ("hand-made", lambda: Body(ByHand(lambda h: torch.bernoulli(torch.full_like(h, 0.6)))), "inner (zoo.py:"),
    ("hand-made", lambda: Body(ByHand(lambda h: torch.from_numpy(np.random.rand(*h.shape) > 0.4))), "inner (zoo.py:"),
    ("hand-made", lambda: Body(ByHand(coins, lambda h, mask: torch.where(mask, h, 0.0))), "inner (zoo.py:"),
    ("active-in-eval", lambda: Body(ByHand(coins, always=True)), "inner (zoo.py:"),
    ("noise-on-line-search", lambda: Stepping(torch.optim.LBFGS), "Stepping"),
    ("noise-on-line-search", lambda: Stepping(SAM), "Stepping"),
    ("drops-everything", lambda: Body(nn.Dropout(1.0)), "inner (zoo.py:"),
    ("drops-everything", lambda: Body(nn.Sequential(nn.Tanh(), nn.Dropout1d(1.0))), "inner.1 (zoo.py:"),
]
# nothing is wrong in these, though some look like it
CLEAN = {
    "dropout": lambda: Body(nn.Dropout(0.4)),
    "reentrant checkpoint": lambda: Body(Recomputed(True)),
    "checkpoint": lambda: Body(Recomputed(False)),
    "mask that follows a dropout": lambda: Body(ReluByHand()),
    "masked loss": Autoencoder,
    "little noise before a regression": lambda: BeforeOutput(F.mse_loss, 0.05),
}
