"""The adaptive softmax: torch's values, and the curvature of the model's own distribution over the whole vocabulary."""

import pytest
import torch
import torch.nn.functional as F
from agreement import check_agreement, gradients, run
from torch import nn

from lightning_dropreg.functional import explicit_penalty, plain_loss
from lightning_dropreg.losses import adaptive_softmax_loss

T, D, V, Q = 6, 3, 9, 0.3
CUTOFFS = (3, 6)
TARGET = torch.tensor([0, 2, 3, 5, 8, 7])


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


class Model:
    """Hidden states behind a dropout, an adaptive softmax of ours, and torch's with the same parameters."""

    def __init__(self, cutoffs=CUTOFFS):
        self.cutoffs = cutoffs
        self.a, self.x = nn.Linear(2, D), torch.randn(T, 2)
        sizes = [(V, D), (V,), (len(cutoffs), D), (len(cutoffs),)]
        self.weights = [torch.randn(size).requires_grad_() for size in sizes]
        self.parameters = [*self.a.parameters(), *self.weights]

    def hidden(self, factor=None):
        h = torch.tanh(self.a(self.x))
        return F.dropout(h, Q) if factor is None else h * factor

    def loss(self, hidden):
        return adaptive_softmax_loss(hidden, TARGET, *self.weights, self.cutoffs)

    def closure(self):
        return (self.loss(self.hidden()) * torch.linspace(0.1, 1, T)).sum()  # weights of the user's own

    def theirs(self, biased=True):
        theirs = nn.AdaptiveLogSoftmaxWithLoss(D, V, list(CUTOFFS), div_value=1.0, head_bias=biased)
        weight, bias, cluster_weight, cluster_bias = self.weights
        with torch.no_grad():
            theirs.head.weight.copy_(torch.cat([weight[:3], cluster_weight]))
            theirs.head.bias.copy_(torch.cat([bias[:3], cluster_bias]))
            for tail, words in zip(theirs.tail, (slice(3, 6), slice(6, 9)), strict=True):
                tail[0].weight.copy_(torch.eye(D))
                tail[1].weight.copy_(weight[words])
        return theirs

    def log_probs(self, hidden):
        """Written anew: log p(word) = log p(cluster) + log p(word | cluster), each by its own logsumexp."""
        weight, bias, cluster_weight, cluster_bias = self.weights
        logits = hidden @ weight.T + bias
        clusters = hidden @ cluster_weight.T + cluster_bias
        head = torch.cat([logits[:, :3], clusters], 1).logsumexp(1)
        columns = []
        for word in range(V):
            if word < 3:
                columns.append(logits[:, word] - head)
            else:
                c = (word - 3) // 3
                within = logits[:, word] - logits[:, 3 + 3 * c : 6 + 3 * c].logsumexp(1)
                columns.append(clusters[:, c] - head + within)
        return torch.stack(columns, 1)


def test_loss_and_log_probabilities_are_torchs():
    from lightning_dropreg.losses.adaptive import adaptive_log_probs

    model = Model()
    model.weights[1].data[3:] = 0  # torch's tails have no bias
    theirs, hidden = model.theirs(), model.hidden(1.0)
    torch.testing.assert_close(-model.loss(hidden), theirs(hidden, TARGET).output)
    torch.testing.assert_close(adaptive_log_probs(hidden, *model.weights, CUTOFFS), theirs.log_prob(hidden))


def test_without_clusters_it_is_cross_entropy():
    model = Model(cutoffs=())
    hidden = model.hidden(1.0)
    expected = F.cross_entropy(F.linear(hidden, *model.weights[:2]), TARGET, reduction="none")
    torch.testing.assert_close(model.loss(hidden), expected)


@pytest.mark.parametrize("targets", [TARGET, torch.zeros(T, dtype=torch.int64)])
def test_value_and_gradient_are_those_of_all_log_probabilities(targets):
    model = Model()
    hidden = model.hidden(1.0)
    ours = adaptive_softmax_loss(hidden, targets, *model.weights, CUTOFFS)
    theirs = F.nll_loss(model.log_probs(hidden), targets, reduction="none")
    torch.testing.assert_close(ours, theirs)
    scale = torch.linspace(1, 2, T)
    torch.testing.assert_close(
        gradients((ours * scale).sum(), model.parameters), gradients((theirs * scale).sum(), model.parameters)
    )


def by_brute_force(model, outputs, loss):
    """``1/2 c tr(J^T H J diag(h^2))`` with J and H by automatic differentiation, in the outputs that are named."""
    ones = torch.ones(T, D)
    z = outputs(model.hidden(ones))
    j = torch.autograd.functional.jacobian(lambda f: outputs(model.hidden(f)), ones, create_graph=True)
    h = torch.autograd.functional.hessian(lambda z: (loss(z) * torch.linspace(0.1, 1, T)).sum(), z, create_graph=True)
    j, h = j.reshape(z.numel(), -1), h.reshape(z.numel(), -1)
    return Q / (1 - Q) / 2 * torch.einsum("am,ab,bm->", j, h, j)


def test_the_penalty_is_that_of_the_whole_vocabulary():
    model = Model()
    exact = explicit_penalty(model.closure, estimator="exact")
    # Log-probabilities are logits whose softmax is done: the loss is their cross entropy, H = diag(p) - p p^T.
    expected = by_brute_force(model, model.log_probs, lambda v: F.cross_entropy(v, TARGET, reduction="none"))
    torch.testing.assert_close(exact, expected)
    torch.testing.assert_close(gradients(exact, model.parameters), gradients(expected, model.parameters))
    torch.testing.assert_close(
        plain_loss(model.closure), (model.loss(model.hidden(1.0)) * torch.linspace(0.1, 1, T)).sum()
    )


def hierarchical(model, hidden):
    """Logits of the head and of both clusters."""
    weight, bias, cluster_weight, cluster_bias = model.weights
    logits = hidden @ weight.T + bias
    return torch.cat([logits[:, :3], hidden @ cluster_weight.T + cluster_bias, logits[:, 3:]], 1)


def hierarchical_loss(z, target):
    entry = torch.where(target < 3, target, 2 + target // 3)
    head = F.cross_entropy(z[:, :5], entry, reduction="none")
    tails = [F.cross_entropy(z[:, s : s + 3], (target - s + 2).clamp(0, 2), reduction="none") for s in (5, 8)]
    return head + torch.where(target < 3, 0.0, torch.where(target < 6, *tails))


def test_it_is_the_mean_of_the_hierarchical_one_over_labels_of_the_model():
    model = Model()
    exact = explicit_penalty(model.closure, estimator="exact")
    at_labels = by_brute_force(model, lambda h: hierarchical(model, h), lambda z: hierarchical_loss(z, TARGET))
    assert not torch.isclose(exact, at_labels, rtol=0.01)  # the two are different things
    p = model.log_probs(model.hidden(1.0)).exp().detach()

    def over_labels(z):
        return sum(p[:, y] * hierarchical_loss(z, torch.full((T,), y)) for y in range(V))

    torch.testing.assert_close(exact, by_brute_force(model, lambda h: hierarchical(model, h), over_labels))


def test_the_estimators_agree():
    model = Model()
    check_agreement(model.closure, model.parameters)


def test_without_curvature_only_the_clusters_of_the_targets_are_computed():
    model = Model()
    targets = torch.tensor([0, 1, 2, 3, 4, 5])
    model.weights[0].data[6:] = float("inf")  # whoever touches the second cluster sees it
    closure = lambda: adaptive_softmax_loss(model.hidden(), targets, *model.weights, CUTOFFS).mean()
    assert torch.isfinite(run("antithetic", closure, curvature=None).noise)
    assert not torch.isfinite(run("antithetic", closure).penalty)
