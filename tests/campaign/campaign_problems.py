"""Random small problems: a network with dropout, a loss, a batch of some structure. The package is not known here."""

from collections import namedtuple

import torch
import torch.nn.functional as F
from torch import nn

Pair = namedtuple("Pair", ["inputs", "labels"])

STRUCTURES = {
    "tuple": lambda x, t: (x, t),
    "list": lambda x, t: [x, t],
    "dict": lambda x, t: {"x": x, "t": t},
    "nested": lambda x, t: {"in": {"x": x}, "out": [t, None, "name"]},
    "namedtuple": Pair,
}


def ragged(x, t):
    """Rows of unlike lengths, as a collate function leaves them: a target of -100 is no target, and ends a row."""
    ends = [int((row >= 0).sum()) or 1 for row in t]  # a row without any target keeps one token
    return {"rows": [(row[:end], labels[:end]) for row, labels, end in zip(x, t, ends)], "length": t.shape[1]}


def unpack(batch):
    if isinstance(batch, dict) and "rows" in batch:
        pad = lambda row, value: torch.cat([row, row.new_full((batch["length"] - len(row), *row.shape[1:]), value)])
        rows, labels = zip(*batch["rows"])
        return torch.stack([pad(row, 0.0) for row in rows]), torch.stack([pad(row, -100) for row in labels])
    if isinstance(batch, dict):
        return (batch["in"]["x"], batch["out"][0]) if "in" in batch else (batch["x"], batch["t"])
    return batch[0], batch[1]


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -0.2 * grad


class Net(nn.Module):
    """Returns outputs and the dropped features behind which they were computed."""

    def __init__(self, kind, activation, inputs, width, outputs, q):
        super().__init__()
        self.kind, self.act, self.outputs = kind, activation, outputs
        self.a, self.b = nn.Linear(inputs, width), nn.Linear(width, outputs)
        self.mid = nn.Linear(width, width)
        self.drop, self.drop2 = nn.Dropout(q), nn.Dropout(q / 2)
        self.channels = nn.Dropout1d(q)
        self.rnn = nn.LSTM(inputs, width, batch_first=True) if kind == "lstm" else None
        self.norm = nn.BatchNorm1d(width, track_running_stats=False) if kind == "batch_norm" else nn.LayerNorm(width)
        self.register_buffer("teacher", torch.randn(width, outputs))
        if kind in CONVOLUTIONS:
            two = kind == "conv_2d"
            conv = nn.Conv2d if two else nn.Conv1d
            self.first, self.second = conv(1, width, 2, padding=1), conv(width, width, 1 if two else 2)
            self.images = nn.Dropout2d(q)
        if kind == "tied":
            self.again = nn.Linear(width, width)
            self.again.weight = self.mid.weight
        if kind in {"norm_before", "norm_behind", "norm_evaluated"}:
            self.norm = nn.BatchNorm1d(width)
            if kind == "norm_evaluated":
                self.norm.running_mean.normal_()
                self.norm.running_var.uniform_(0.5, 2.0)

    def train(self, mode=True):
        super().train(mode)
        self.norm.train(mode and self.kind != "norm_evaluated")
        return self

    def forward(self, x):
        kind = self.kind
        if kind == "input":
            h = self.drop(x)
            return self.b(self.act(self.a(h))), h
        if kind == "conv":  # a kink before the site is none
            h = self.drop(F.max_pool1d(self.act(self.first(x.unsqueeze(1))), 2))
            return self.b(F.avg_pool1d(torch.tanh(self.second(h)), h.shape[-1] - 1).flatten(1)), h
        if kind == "conv_2d":
            h = self.images(self.act(self.first(x[:, None, None])))
            return self.b(torch.tanh(self.second(h)).mean((2, 3))), h
        h = self.rnn(x)[0] if kind == "lstm" else self.a(x)
        if kind == "channels":
            h = self.channels(self.act(h).transpose(1, 2)).transpose(1, 2)
            return self.b(torch.tanh(self.mid(h))), h
        if kind == "frozen":
            with torch.no_grad():
                h = self.drop(self.act(h))
            return self.b(torch.tanh(self.mid(h))), h
        h = self.drop(self.act(self.norm(h) if kind == "norm_before" else h))
        if kind in {"norm_behind", "norm_evaluated"}:
            return self.b(torch.tanh(self.norm(h))), h
        if kind == "tied":  # one layer twice, and one weight under two names
            h = torch.tanh(self.again(torch.tanh(self.mid(h))))
            return self.b(h) + (self.act(self.a(h @ self.a.weight)) @ self.b.weight.T), h
        if kind == "two":
            h = self.drop2(torch.tanh(self.mid(h)))
        elif kind == "residual":
            h = h + torch.tanh(self.mid(self.norm(h)))
        elif kind == "batch_norm":
            return self.b(torch.tanh(self.norm(h))), h
        elif kind == "reversal":
            return self.b(torch.tanh(self.mid(Reverse.apply(h)))), h
        elif kind == "shared":
            h = h @ self.mid.weight + torch.tanh(h)
        return self.b(h), h


CONVOLUTIONS = ["conv", "conv_2d"]
NORMS = ["norm_before", "norm_behind", "norm_evaluated"]
FLAT = ["plain", "input", "two", "residual", "shared"]
SEQUENCES = ["lstm", "channels", "plain"]
ODD = ["frozen", "reversal", "batch_norm"]


class LossKind:
    """A loss of outputs ``z`` of shape ``(N, [T,] C)``.

    `value(z, t, h, net)` is the loss as a user writes it, `target(z)` draws what it compares with, and `examples(z, t)`
    gives ``(weight, own loss of an example's outputs)`` for every example. `inner` makes the outputs of the network's.
    """

    def __init__(self, value, target, examples=None, tokens=False, odd=False, inner=lambda z: z):
        self.value, self.target, self.examples = value, target, examples
        self.tokens, self.odd, self.inner = tokens, odd, inner


def classes(z):
    return torch.randint(z.shape[-1], z.shape[:-1])


def some_ignored(z):
    y = classes(z)
    y[..., 0] = -100 if y.ndim > 1 else y[..., 0]
    return y


def flat(z, t):
    return z.reshape(-1, z.shape[-1]), t.reshape(-1)


def ragged_targets(z):
    """Rows end early, and one has no target at all."""
    y = classes(z)
    if y.ndim > 1:
        y[1, 1:] = -100
    y[0] = -100
    return y


def ce(**options):
    return lambda z, t, h, net: F.cross_entropy(*flat(z, t), **options)


def per_token(weight, own):
    def examples(z, t):
        y = t.reshape(-1)
        return [(weight(y), lambda b, n=n: own(b, y[n])) if y[n] >= 0 else (0.0, None) for n in range(len(y))]

    return examples


def per_row(weight, own):
    return lambda z, t: [(weight(len(z)), lambda b, n=n: own(b.reshape(z.shape[1:]), t[n])) for n in range(len(z))]


def mean(n):
    return 1 / n


CLASS_WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.7, 1.3], dtype=torch.float64)
ROW_WEIGHTS = torch.tensor([1.5, 0.25, 1.0, 2.0], dtype=torch.float64)
nll = F.cross_entropy
valid = lambda y: 1 / float((y >= 0).sum())


def weighted(z, t, h, net):
    return F.cross_entropy(*flat(z, t), weight=CLASS_WEIGHTS[: z.shape[-1]])


def weighted_smooth(z, y, **how):
    return F.cross_entropy(z, y, weight=CLASS_WEIGHTS[: z.shape[-1]], label_smoothing=0.2, **how)


CAMPAIGN_LOSSES = {
    "ce": LossKind(ce(), classes, per_token(valid, nll), tokens=True),
    "ce_sum": LossKind(ce(reduction="sum"), classes, per_token(lambda y: 1.0, nll), tokens=True),
    "ce_smooth": LossKind(
        ce(label_smoothing=0.2),
        classes,
        per_token(valid, lambda b, y: F.cross_entropy(b, y, label_smoothing=0.2)),
        tokens=True,
    ),
    "ce_ignored": LossKind(ce(), some_ignored, per_token(valid, nll), tokens=True),
    "ce_weighted": LossKind(
        weighted,
        classes,
        per_token(
            lambda y: 1 / float(CLASS_WEIGHTS[y].sum()),
            lambda b, y: CLASS_WEIGHTS[y] * F.cross_entropy(b, y),
        ),
        tokens=True,
    ),
    "ce_ragged": LossKind(ce(), ragged_targets, per_token(valid, nll), tokens=True),
    "ce_weighted_smooth": LossKind(
        lambda z, t, h, net: weighted_smooth(*flat(z, t)),
        classes,
        per_token(
            lambda y: 1 / float(CLASS_WEIGHTS[y].sum()),
            lambda b, y: weighted_smooth(b, y, reduction="sum"),
        ),
        tokens=True,
    ),
    "ce_weighted_rows": LossKind(
        lambda z, t, h, net: (F.cross_entropy(z, t, reduction="none") * ROW_WEIGHTS[t]).sum() / 3,
        classes,
        lambda z, t: [(float(ROW_WEIGHTS[y]) / 3, lambda b, y=y: nll(b, y)) for y in t],
    ),
    "mse_masked": LossKind(
        lambda z, t, h, net: (F.mse_loss(z, t.nan_to_num(), reduction="none") * ~t.isnan()).sum() / (~t.isnan()).sum(),
        lambda z: torch.rand_like(z).index_fill(0, torch.tensor([0]), torch.nan),
        lambda z, t: [
            (float(~t[n].isnan().any()) / (len(z) - 1), lambda b, n=n: F.mse_loss(b.reshape(z.shape[1:]), t[n]))
            for n in range(len(z))
        ],
    ),
    "nll": LossKind(
        lambda z, t, h, net: F.nll_loss(*flat(z.log_softmax(-1), t)), classes, per_token(valid, nll), tokens=True
    ),
    "ce_soft": LossKind(
        lambda z, t, h, net: F.cross_entropy(z, t),
        lambda z: torch.rand_like(z).softmax(-1),
        per_row(mean, F.cross_entropy),
    ),
    "kl": LossKind(
        lambda z, t, h, net: F.kl_div(z.log_softmax(-1), t, reduction="batchmean"),
        lambda z: torch.rand_like(z).softmax(-1),
        per_row(mean, lambda b, t: F.kl_div(b.log_softmax(-1), t, reduction="sum")),
    ),
    "mse": LossKind(
        lambda z, t, h, net: F.mse_loss(z, t),
        torch.rand_like,
        per_row(mean, F.mse_loss),
        tokens=True,
    ),
    "mse_sum_over_n": LossKind(
        lambda z, t, h, net: F.mse_loss(z, t, reduction="sum") / len(z),
        torch.rand_like,
        per_row(mean, lambda b, t: F.mse_loss(b, t, reduction="sum")),
        tokens=True,
    ),
    "mse_none": LossKind(
        lambda z, t, h, net: F.mse_loss(z, t, reduction="none").flatten(1).sum(1).mean(),
        torch.rand_like,
        per_row(mean, lambda b, t: F.mse_loss(b, t, reduction="sum")),
        tokens=True,
    ),
    "huber": LossKind(
        lambda z, t, h, net: F.huber_loss(z, t, delta=50.0),
        torch.rand_like,
        per_row(mean, lambda b, t: F.huber_loss(b, t, delta=50.0)),
    ),
    "bce": LossKind(
        lambda z, t, h, net: F.binary_cross_entropy_with_logits(z, t),
        lambda z: (torch.rand_like(z) > 0.5).to(z),
        per_row(mean, F.binary_cross_entropy_with_logits),
    ),
    "bce_of_probabilities": LossKind(
        lambda z, t, h, net: F.binary_cross_entropy(z.sigmoid(), t),
        lambda z: (torch.rand_like(z) > 0.5).to(z),
        per_row(mean, F.binary_cross_entropy_with_logits),
    ),
    "poisson": LossKind(
        lambda z, t, h, net: F.poisson_nll_loss(z, t),
        lambda z: (3 * torch.rand_like(z)).floor(),
        per_row(mean, F.poisson_nll_loss),
    ),
    "gaussian": LossKind(
        lambda z, t, h, net: F.gaussian_nll_loss(z, t, torch.full_like(z, 0.7)),
        torch.rand_like,
        per_row(mean, lambda b, t: F.gaussian_nll_loss(b, t, torch.full_like(b, 0.7))),
    ),
    # outside of what is promised to have a value: right, or refused
    "unrecognized": LossKind(lambda z, t, h, net: (z - t).abs().pow(3).mean(), torch.rand_like, odd=True),
    "l1": LossKind(lambda z, t, h, net: F.l1_loss(z, t), torch.rand_like, odd=True),
    "teacher_mse": LossKind(lambda z, t, h, net: F.mse_loss(z, taught(h, net)), torch.rand_like, odd=True),
    "teacher_kl": LossKind(
        lambda z, t, h, net: F.kl_div(z.log_softmax(-1), taught(h, net).softmax(-1), reduction="batchmean"),
        torch.rand_like,
        odd=True,
    ),
    "confidence": LossKind(
        lambda z, t, h, net: (z.detach().softmax(-1).amax(-1) * F.cross_entropy(z, t, reduction="none")).mean(),
        classes,
        odd=True,
    ),
    "in_batch": LossKind(
        lambda z, t, h, net: F.cross_entropy(z, torch.arange(len(z))),
        torch.rand_like,
        odd=True,
        inner=lambda z: z @ z.T,
    ),
}


def taught(h, net):
    shape = (*h.shape[:-1], net.outputs)
    return (
        (h @ net.teacher[: h.shape[-1]] if h.shape[-1] <= len(net.teacher) else h[..., : net.outputs])
        .detach()
        .view(shape)
    )
