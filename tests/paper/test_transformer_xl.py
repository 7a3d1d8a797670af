"""Transformer-XL: equal to a reference in plain loops, its sites, its memory, and its training under the callbacks."""

import math
from functools import partial

import pytest
import torch
from agreement import gradients, run
from fits import make_trainer
from texts import numbers
from torch.utils.data import DataLoader

import lightning_dropreg as dr
from lightning_dropreg.errors import InvalidArgumentError
from lightning_dropreg.functional import find_sites
from lightning_dropreg.paper.data import LanguageModelingData
from lightning_dropreg.paper.models import TransformerXLLanguageModel

SIZES = {"vocab_size": 12, "dim": 4, "num_layers": 2, "heads": 2, "head_dim": 3, "inner_dim": 5, "memory_length": 4}
CUTOFFS = [4, 8]


def make(**changes) -> TransformerXLLanguageModel:
    """A model whose parameters are large enough for every part to matter."""
    model = TransformerXLLanguageModel(**{**SIZES, "cutoffs": CUTOFFS, "drop_prob": 0.0, **changes}).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def batch(rows: int = 2, length: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.randint(12, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return text[:, :-1], text[:, 1:]


def normalize(x, weight, bias):
    centred = [value - sum(x) / len(x) for value in x]
    scale = torch.sqrt(sum(value * value for value in centred) / len(x) + 1e-5)
    return torch.stack([value / scale * w + b for value, w, b in zip(centred, weight, bias, strict=True)])


def reference(model, text, target, memory):
    """Losses and memory, word by word, head by head, as the equations of the two papers are written."""
    parameters = dict(model.named_parameters())
    embedding, d, heads, size = model.network.embedding.weight, 4, 2, 3
    losses, new_memory = [], [[] for _ in model.network.layers]
    for row in range(len(text)):
        hidden = [embedding[word] * math.sqrt(d) for word in text[row]]
        for number in range(len(model.network.layers)):
            of = {k.split(".", 3)[3]: v for k, v in parameters.items() if k.startswith(f"network.layers.{number}.")}
            before = [] if memory is None else list(memory[number][row])
            everything = before + hidden
            new_memory[number].append(torch.stack(everything[-model.network.memory_length :]))
            key_weight, value_weight = of["attention.key_value.weight"].chunk(2)
            after = []
            for i, state in enumerate(hidden):
                attended = []
                for head in range(heads):
                    part = slice(head * size, (head + 1) * size)
                    query = of["attention.query.weight"][part] @ state
                    u, v = model.network.content_bias[head, 0], model.network.position_bias[head, 0]
                    scores, values = [], []
                    for j in range(len(before) + i + 1):
                        back = len(before) + i - j
                        angles = [back / 10_000 ** (2 * m / d) for m in range(d // 2)]
                        wave = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
                        key = key_weight[part] @ everything[j]
                        distance = of["attention.position.weight"][part] @ wave
                        scores.append(((query + u) @ key + (query + v) @ distance) / math.sqrt(size))
                        values.append(value_weight[part] @ everything[j])
                    total = sum(torch.exp(score) for score in scores)
                    attended.append(sum(torch.exp(s) / total * value for s, value in zip(scores, values, strict=True)))
                added = state + of["attention.output.weight"] @ torch.cat(attended)
                middle = normalize(added, of["attention_norm.weight"], of["attention_norm.bias"])
                up = torch.relu(of["up.weight"] @ middle + of["up.bias"])
                added = middle + of["down.weight"] @ up + of["down.bias"]
                after.append(normalize(added, of["output_norm.weight"], of["output_norm.bias"]))
            hidden = after
        for state, word in zip(hidden, target[row].tolist(), strict=True):
            softmax = model.softmax
            logits = softmax.weight @ state + softmax.bias
            clusters = softmax.cluster_weight @ state + softmax.cluster_bias
            head_total = torch.exp(logits[: CUTOFFS[0]]).sum() + torch.exp(clusters).sum()
            if word < CUTOFFS[0]:
                losses.append(torch.log(head_total) - logits[word])
            else:
                c = 0 if word < CUTOFFS[1] else 1
                members = torch.exp(logits[CUTOFFS[c] : [*CUTOFFS, 12][c + 1]]).sum()
                losses.append(torch.log(head_total) - clusters[c] + torch.log(members) - logits[word])
    return torch.stack(losses).view_as(target), [torch.stack(rows) for rows in new_memory]


@pytest.mark.parametrize("tied", [True, False])
def test_value_gradient_and_memory_equal_plain_loops(tied):
    torch.set_default_dtype(torch.float64)
    model = make(tie_weights=tied)
    memory = theirs_memory = None
    for window, length in enumerate((3, 2, 4)):  # the memory is empty, then of 3 words, then full
        text, target = batch(length=length, seed=window)
        ours, memory = model(text, target, memory)
        theirs, theirs_memory = reference(model, text, target, theirs_memory)
        torch.testing.assert_close(ours, theirs)
        weights = torch.linspace(0.5, 1, target.numel()).view_as(target)
        one, other = (gradients((value * weights).sum(), list(model.parameters())) for value in (ours, theirs))
        # the reference leaves the graph in its memory
        theirs_memory = [layer.detach() for layer in theirs_memory]
        torch.testing.assert_close(one, other)
        for a, b in zip(memory, theirs_memory, strict=True):
            torch.testing.assert_close(a, b)
            assert not a.requires_grad


def test_two_windows_with_memory_are_one_with_as_long_a_context():
    model = make(num_layers=1, memory_length=8)
    text, target = batch(length=7)
    whole, _ = model(text, target)
    first, memory = model(text[:, :3], target[:, :3])
    second, _ = model(text[:, 3:], target[:, 3:], memory)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


def test_the_sites_of_sixteen_layers():
    model = TransformerXLLanguageModel(**{**SIZES, "num_layers": 16}, drop_prob=0.1)
    text, target = batch()
    _, memory = model(text, target)
    sites = find_sites(lambda: model(text, target, memory)[0].sum() / 6)
    layers = [
        (f"network.layers.{n}.{name}", (2, 3, width))
        for n in range(16)
        for name, width in (("attention_dropout", 4), ("activation_dropout", 5), ("output_dropout", 4))
    ]
    expected = [("network.embedding_dropout", (2, 3, 4)), ("network.positions", (1, 6, 4)), *layers]
    expected += [("network.final_dropout", (2, 3, 4))]
    # the position embedding is the same for all rows of the batch, and so is its mask
    assert [(site.name.split(" ")[0], site.mask_shape) for site in sites] == expected
    assert len(sites) == 51
    assert sites[1].kind == "position"
    with_attention = TransformerXLLanguageModel(**SIZES, drop_prob=0.1, attention_drop_prob=0.1)
    shapes = [s.mask_shape for s in find_sites(lambda: with_attention(text, target)[0].sum() / 6)]
    assert shapes.count((2, 2, 3, 3)) == 2


def test_the_estimators_agree():
    torch.set_default_dtype(torch.float64)
    model = make(drop_prob=0.2, attention_drop_prob=0.1)
    (text, target), parameters = batch(length=2), list(model.parameters())
    _, memory = model(*batch(seed=1))

    def closure():
        return model(text, target, memory)[0].mean()

    antithetic, *others = (run(name, closure) for name in ("antithetic", "forward", "double_backward", "exact"))
    for other in others:
        torch.testing.assert_close(antithetic.noise, other.noise, rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(
            gradients(antithetic.noise, parameters), gradients(other.noise, parameters), rtol=1e-4, atol=1e-6
        )
    torch.testing.assert_close(antithetic.penalty, others[0].penalty, rtol=1e-5, atol=1e-8)
    # the exact value is the mean: over 60 draws within 4 standard errors (one test in 15,000 fails by chance)
    sample = torch.stack([run("antithetic", closure, key=key).penalty.detach() for key in range(60)])
    assert (sample.mean() - others[2].penalty).abs() < 4 * sample.std() / math.sqrt(60)


def windows(batches) -> DataLoader:
    return DataLoader(batches, batch_size=None)


def after_one_batch(callbacks, drop_prob=0.2):
    torch.manual_seed(0)
    model = make(drop_prob=drop_prob)
    trainer = make_trainer(callbacks, limit_train_batches=1, precision="64-true")
    trainer.fit(model, windows([batch(rows=4, length=6)]))
    return model._train_state


def test_the_memory_is_that_of_the_pass_without_dropout_to_second_order():
    clean = after_one_batch([], drop_prob=0.0)

    def distance(step_size: float) -> list[float]:
        pair = {"estimator": "antithetic", "step_size": step_size}
        noisy = after_one_batch([dr.ExplicitPenalty(**pair), dr.ImplicitNoise(**pair)])
        return [(a - b).norm().item() for a, b in zip(noisy, clean, strict=True)]

    coarse, fine = distance(0.1), distance(0.05)
    assert coarse[0] < 1e-12  # the embedding is linear in its noise
    assert 3 < coarse[1] / fine[1] < 5
    assert coarse[1] < 0.1 * clean[1].norm()
    dropped = after_one_batch([])
    assert (dropped[1] - clean[1]).norm() > 4 * coarse[1]


@pytest.mark.parametrize(
    "callbacks",
    [
        [dr.ExplicitPenalty, dr.ImplicitNoise],
        [partial(dr.ExplicitPenalty, batch_fraction=0.5), dr.ImplicitNoise],  # rows share the mask of the positions
        [partial(dr.MiniBatchDropout, 2), dr.ImplicitNoise],
        [partial(dr.ExplicitPenalty, estimator="double_backward")],
        [partial(dr.ExplicitPenalty, estimator="forward")],
    ],
)
def test_trains_under_the_callbacks(callbacks):
    data = LanguageModelingData(numbers(400), batch_size=4, eval_batch_size=2, window=5, vocab_size=12)
    model = TransformerXLLanguageModel(**SIZES, cutoffs=CUTOFFS)
    before = [parameter.clone() for parameter in model.parameters()]
    trainer = make_trainer([make() for make in callbacks], limit_train_batches=3, limit_val_batches=2)
    trainer.fit(model, datamodule=data)
    metrics = trainer.callback_metrics
    assert all(not p.equal(q) for p, q in zip(model.parameters(), before, strict=True))
    assert metrics["val_ppl"].log().item() == pytest.approx(metrics["val_loss"].item(), rel=1e-5)
    assert [layer.shape for layer in model._train_state] == [(4, 4, 4)] * 2


def test_evaluation_has_a_memory_of_its_own_and_predicts_what_it_measures():
    data = LanguageModelingData(numbers(400), batch_size=4, eval_batch_size=1, window=5, vocab_size=12)
    model = TransformerXLLanguageModel(**SIZES, cutoffs=CUTOFFS)
    trainer = make_trainer()
    scores = torch.cat(trainer.predict(model, datamodule=data), 1)
    [metrics] = trainer.test(model, datamodule=data, verbose=False)
    assert metrics["test_ppl"] == pytest.approx(math.exp(-scores.mean().item()), rel=1e-5)
    assert model._train_state is None


def test_a_checkpoint_keeps_the_memory_within_an_epoch_and_an_epoch_starts_without(tmp_path):
    batches = windows([batch(rows=4, seed=seed) for seed in range(4)])

    def run_to(steps: int, model: TransformerXLLanguageModel, checkpoint=None) -> list[torch.Tensor]:
        trainer = make_trainer(max_epochs=-1, max_steps=steps)
        trainer.fit(model, batches, ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return model._train_state

    torch.manual_seed(0)
    first = TransformerXLLanguageModel(**SIZES, drop_prob=0.0)
    left = run_to(2, first)
    second = TransformerXLLanguageModel(**SIZES, drop_prob=0.0)
    seen: list[object] = []
    step = second.training_step

    def watched(window, batch_idx):
        seen.append(second._train_state)
        return step(window, batch_idx)

    second.training_step = watched
    run_to(5, second, tmp_path / "last.ckpt")
    assert all(a.equal(b) for a, b in zip(seen[0], left, strict=True))
    assert [memory is None for memory in seen] == [False, False, True]
    second.on_load_checkpoint({"memory": left})  # as earlier checkpoints call it
    assert all(a.equal(b) for a, b in zip(second._train_state, left, strict=True))


def test_the_learning_rate_follows_its_schedule_at_every_step():
    model = TransformerXLLanguageModel(
        **SIZES, lr_scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=4)
    )
    trainer = make_trainer(max_steps=2, max_epochs=None)
    trainer.fit(model, windows([batch()] * 4))
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(2.5e-4 / 2)


@pytest.mark.parametrize(
    "wrong",
    [{"dim": 5}, {"drop_prob": 1.0}, {"memory_length": -1}, {"num_layers": 0}, {"cutoffs": [4, 4]}, {"cutoffs": [12]}],
)
def test_arguments_out_of_range(wrong):
    with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
        TransformerXLLanguageModel(**{**SIZES, **wrong})


def test_a_batch_with_fewer_rows_than_the_memory():
    model = make()
    _, memory = model(*batch(rows=3))
    with pytest.raises(InvalidArgumentError, match="memory is of 3 rows of text, but the batch has 2"):
        model(*batch(rows=2), memory)
