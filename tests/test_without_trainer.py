"""The loops of examples/ that use no Lightning Trainer: passes counted, and gradients what the totals say.

Every `regularize` of an example is watched: what it returns is differentiated on the spot, and what the optimizer finds
at its step must be the sum of that over the micro-batches, divided as the loop divides, and clipped.
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lightning_dropreg import functional

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Watch:
    """Watches the calls of `regularize` in an example, and the gradients with which its optimizer steps."""

    def __init__(self, example, monkeypatch):
        self.passes, self.totals, self.found, self.wanted, self.had = [], [], [], None, []
        self.net = None
        monkeypatch.setattr(example, "regularize", self.regularize)

    def regularize(self, closure, *, module, **options):
        self.net = module
        self.passes.append(0)

        def counted():
            self.passes[-1] += 1
            return closure()

        found = functional.regularize(counted, module=module, **options)
        gradients = torch.autograd.grad(found.total, list(module.parameters()), retain_graph=True)
        self.totals.append(nn.utils.parameters_to_vector([g.float() for g in gradients]))
        self.found.append(found)
        return found

    def step(self, optimizer, args, kwargs):
        self.had.append(nn.utils.parameters_to_vector([p.grad.clone() for p in self.net.parameters()]))

    def __enter__(self):
        self.hook = register_optimizer_step_pre_hook(self.step)
        return self

    def __exit__(self, *exception):
        self.hook.remove()

    def check(self, factor, clip=None, rtol=1e-4, passes=2):
        assert self.passes == [passes, passes]
        assert len(self.had) == 1
        wanted = factor * sum(self.totals)
        norm = wanted.norm()
        if clip is not None and norm > clip:
            wanted = wanted * clip / norm
        torch.testing.assert_close(self.had[0], wanted, rtol=rtol, atol=1e-3 * rtol)
        assert self.found[0].noise != self.found[1].noise
        assert all(found.penalty > 0 for found in self.found)


@pytest.mark.parametrize("autocast", [False, True])
def test_plain_pytorch(monkeypatch, autocast):
    example = load("plain_pytorch")
    net = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 10))
    with Watch(example, monkeypatch) as watch:
        example.train(net, example.make_loader(64), epochs=1, autocast=autocast)
    watch.check(1 / 2, passes=3 if autocast else 2)  # in bfloat16 one to see that the step must be wider
    assert net[1].num_batches_tracked == 2


def test_plain_pytorch_on_some_rows(monkeypatch):
    example, sizes = load("plain_pytorch"), []
    net = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 10))
    note = sizes.append  # a bound method: what a hook reaches otherwise is put back for every pass
    net.register_forward_pre_hook(lambda _, args: note(len(args[0])))
    example.train(net, example.make_loader(64), epochs=1, batch_fraction=1 / 8)
    assert sorted(sizes[-3:]) == [4, 4, 32]  # in the first batch, rows are tried


def test_fabric(monkeypatch):
    """(With mixed precision, in two processes, it runs in test_examples.py; there no gradient is taken aside.)"""
    import lightning as L

    example = load("fabric")
    with Watch(example, monkeypatch) as watch:
        example.train(L.Fabric(accelerator="cpu", devices=1, precision="32-true"), epochs=1, batches=2)
    watch.check(1 / 2, clip=1.0)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(monkeypatch, precision):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    example = load("accelerate_loop")
    net = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 10))
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    with Watch(example, monkeypatch) as watch:
        example.train(accelerator, net, epochs=1, batches=2)
    watch.check(1 / 2, clip=1.0, passes=3 if precision == "bf16" else 2)


@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=str)
def test_huggingface_trainer(monkeypatch, tmp_path, options):
    """The Trainer divides by the number of words in both micro-batches, so the sum of the totals is all."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate").state.AcceleratorState._reset_state(reset_partial_state=True)
    example = load("huggingface_trainer")
    settings = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_steps=1,
        max_grad_norm=0.0,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    model = example.make_model()
    trainer = example.RegularizedTrainer(model, settings, train_dataset=example.make_rows(16))
    with Watch(example, monkeypatch) as watch:
        trainer.train()
    watch.check(1.0, passes=3 if options else 2)
    rows = {key: torch.stack([row[key] for row in example.make_rows(16)]) for key in ("input_ids", "labels")}
    if not options:
        weight = sum(found.loss for found in watch.found).item()
        fresh = example.make_model().eval()
        with torch.no_grad():
            size = fresh(**rows).loss.item()  # the mean over all words, of another model of that kind
        assert weight == pytest.approx(size, rel=0.1)
    watch.passes.clear()
    trainer.evaluate(example.make_rows(8))
    assert watch.passes == []  # untouched
