"""Two gloo processes: what must hold for every method, checked in one process group."""

import itertools
import os

import lightning as L
import pytest
import torch
from fits import Classifier, make_loader, make_trainer
from own_modules import GAN, Manual, Predicting
from ranks import run_on_two_ranks

import lightning_dropreg as dr
from lightning_dropreg.numerics.noise import fold_key

ESTIMATORS = ("antithetic", "forward", "double_backward", "exact")
INJECTIONS = ("loss", "after_backward")

METHODS = {
    **{f"penalty, {e}": lambda e=e: [dr.ExplicitPenalty(estimator=e)] for e in ESTIMATORS},
    **{
        f"algorithm 2, {e}, {i}": lambda e=e, i=i: [
            dr.ExplicitPenalty(estimator=e),
            dr.ImplicitNoise(estimator=e, injection=i),
        ]
        for e, i in itertools.product(ESTIMATORS, INJECTIONS)
    },
    **{
        f"noise, {e}, {i}": lambda e=e, i=i: [dr.ImplicitNoise(estimator=e, injection=i)]
        for e, i in itertools.product(ESTIMATORS[:3], INJECTIONS)
    },
    **{f"dropout noise, {i}": lambda i=i: [dr.ImplicitNoise(source="dropout", injection=i)] for i in INJECTIONS},
    "draws": lambda: [dr.MiniBatchDropout(2)],
    **{f"algorithm 4, {i}": lambda i=i: [dr.MiniBatchDropout(2), dr.ImplicitNoise(injection=i)] for i in INJECTIONS},
    **{
        f"section 3.1, {i}": lambda i=i: [dr.MiniBatchDropout(2), dr.ImplicitNoise(source="dropout", injection=i)]
        for i in INJECTIONS
    },
    "low memory": lambda: [dr.ExplicitPenalty(low_memory=True), dr.ImplicitNoise(low_memory=True)],
    "rows": lambda: [dr.ExplicitPenalty(batch_fraction=0.5), dr.ImplicitNoise(batch_fraction=0.5)],
}
STRATEGIES = {
    "loss": METHODS["algorithm 2, antithetic, loss"],
    "after": METHODS["algorithm 2, antithetic, after_backward"],
}


def fit(callbacks, make=Classifier, loader=None, strategy="ddp", **options):
    """Twenty steps, both ranks on the same batches, so that nothing but the noise tells them apart."""
    L.seed_everything(1, verbose=False)
    model = make()
    options = {"devices": 2, "max_epochs": 5, "use_distributed_sampler": False, **options}
    make_trainer(callbacks, strategy=strategy, **options).fit(model, loader or make_loader())
    return model


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def replicas(method, **options):
    def check():
        model = fit(METHODS[method](), **options)
        return {"weights": weights_of(model), "gradients": model.gradients, "losses": model.losses}

    return check


class SameNoise:
    """The whole batch's signs and masks, by the number of their seed; this rank's rows are taken."""

    def __init__(self, rows, part):
        self.rows, self.part = rows, part
        self.met = {}

    def __enter__(self):
        from lightning_dropreg.passes import directions

        self.rand, self.signs = torch.rand, directions.random_signs
        torch.rand = lambda *a, generator=None, **k: self.draw(a, generator) if generator else self.rand(*a, **k)

        def signs(shape, dtype, generator, size=1.0):
            if generator.initial_seed() in {fold_key(0, i) for i in range(8)}:  # of a look, maybe on fewer rows
                return torch.full(shape, size, dtype=dtype)
            return self.draw((shape,), generator).sub_(0.5).sign_().to(dtype).mul_(size)

        directions.random_signs = signs

    def draw(self, shape, generator):
        number = self.met.setdefault(generator.initial_seed(), len(self.met))
        (shape,) = shape
        generator = torch.Generator().manual_seed(number)
        return self.rand((self.rows, *shape[1:]), generator=generator)[self.part].clone()

    def __exit__(self, *_):
        from lightning_dropreg.passes import directions

        torch.rand, directions.random_signs = self.rand, self.signs


def half(method, **options):
    """The gradients of a rank that has half of every batch, with the noise that belongs to its examples."""

    def check():
        rank = int(os.environ["LOCAL_RANK"])
        batches = [tuple(t[3 * rank : 3 * rank + 3] for t in batch) for batch in make_loader()]
        loader = torch.utils.data.DataLoader(batches, batch_size=None)
        with SameNoise(6, slice(3 * rank, 3 * rank + 3)):
            return fit(METHODS[method](), loader=loader, max_epochs=2, **options).gradients

    return check


SAME_NOISE = ["penalty, antithetic", "draws"]
KINDS = ["algorithm 2, antithetic", "algorithm 2, forward", "noise, double_backward", "dropout noise", "algorithm 4"]
for kind in KINDS:
    SAME_NOISE += [f"{kind}, {injection}" for injection in INJECTIONS]


class Unused(Classifier):
    """Has a layer that no batch reaches."""

    def __init__(self):
        super().__init__()
        self.aside = torch.nn.Linear(2, 2)

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(self.aside.weight.grad)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, weight_decay=0.1)


def unused(callbacks, strategy):
    def check():
        model = fit(callbacks(), make=Unused, strategy=strategy, max_steps=3)
        return model.aside.weight.detach(), model.gradients

    return check


class Counting(Classifier):
    """Counts the collectives of the second epoch: four batches."""

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self.profile.start()

    def on_train_epoch_end(self):
        if self.current_epoch == 1:
            self.profile.stop()
            self.count = sum(event.name.startswith("gloo:") for event in self.profile.events())
            self.profile = None


def collectives(callbacks, **options):
    return lambda: fit(callbacks(), make=Counting, max_epochs=2, **options).count


class Sharded(Classifier):
    """Under FSDP2."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        for part in (self.net[0], self.net[4], self):
            if not isinstance(part, torch.distributed.fsdp.FSDPModule):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def on_before_optimizer_step(self, optimizer):
        whole = [p.grad.full_tensor() for p in self.parameters()]
        self.gradients.append(torch.cat([g.reshape(-1) for g in whole]))


def fsdp2(callbacks):
    def check():
        from lightning.pytorch.strategies import ModelParallelStrategy

        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        model = fit(callbacks(), make=Sharded, strategy=strategy, max_steps=4, log_every_n_steps=1)
        return model.gradients, model.trainer.callback_metrics.get("dropreg/grad_norm")

    return check


def own_seeds():
    """Without seed_everything, each rank has a seed of its own; the checkpoint has one."""
    os.environ.pop("PL_GLOBAL_SEED", None)  # of the fits before
    torch.manual_seed(1)
    model = Classifier()
    torch.manual_seed(100 + int(os.environ["LOCAL_RANK"]))
    callback = dr.ImplicitNoise()
    trainer = make_trainer([callback], devices=2, strategy="ddp", max_steps=1)
    trainer.fit(model, make_loader())
    return callback._used_seed


def save(folder):
    def check():
        model = fit(STRATEGIES["loss"](), max_epochs=1)
        model.trainer.save_checkpoint(f"{folder}/two.ckpt")
        return True

    return check


def skipping():
    """A check that only one rank fails counts for both."""

    class OneSided(dr.DivergenceDetector):
        def see_penalty(self, penalty, loss):
            super().see_penalty(penalty * (1e9 if int(os.environ["LOCAL_RANK"]) else 0.0), loss)

    detector = OneSided(every_n_steps=1, patience=2, action="skip")
    model = fit([dr.ExplicitPenalty(), detector], make=Unused, strategy="ddp_find_unused_parameters_true", max_epochs=1)
    return weights_of(model), detector.state_dict()


MANUAL = ("algorithm 2, antithetic, loss", "dropout noise, after_backward", "algorithm 4, loss", "low memory")
MANUAL_SAME_NOISE = ("algorithm 2, antithetic, loss", "algorithm 2, antithetic, after_backward", "algorithm 4, loss")


def gan(method):
    def check():
        model = fit(METHODS[method](), make=GAN, strategy="ddp_find_unused_parameters_true", max_epochs=3)
        return weights_of(model)

    return check


def predict():
    """What a rank predicts of its own half of the examples, and of one batch that both have."""
    L.seed_everything(1, verbose=False)
    model = Predicting()
    options = {"devices": 2, "strategy": "ddp"}
    predict = lambda loader, **more: make_trainer([dr.MonteCarloDropout(4, first_order=2)], **options, **more).predict(
        model, loader
    )
    same = predict(make_loader(6), use_distributed_sampler=False)
    return predict(make_loader(24)), same, weights_of(model), "predict_step" in model.__dict__


class Normalized(Classifier):
    def __init__(self):
        super().__init__(norm=True)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    plain = lambda: [dr.MiniBatchDropout(1)]
    checks = {f"replicas, {method}": replicas(method) for method in METHODS}
    accumulated = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}
    for method in ("algorithm 2, antithetic, after_backward", "algorithm 4, after_backward"):
        checks[f"accumulated, {method}"] = replicas(method, **accumulated)
        checks[f"normalized, {method}"] = replicas(method, make=Normalized)
    checks |= {f"half, {method}": half(method) for method in SAME_NOISE}
    for name, callbacks in {"plain": plain, **STRATEGIES}.items():
        checks[f"unused, {name}"] = unused(callbacks, "ddp_find_unused_parameters_true")
        for n in (1, 2):
            checks[f"collectives, {name}, {n}"] = collectives(callbacks, accumulate_grad_batches=n)
    checks["fsdp2"] = fsdp2(STRATEGIES["loss"])
    checks["ddp as fsdp2"] = lambda: fit(STRATEGIES["loss"](), max_steps=4).gradients
    checks["fsdp2, after backward"] = fsdp2(STRATEGIES["after"])
    checks["fsdp2, double backward"] = fsdp2(METHODS["penalty, double_backward"])
    checks["own seeds"] = own_seeds
    checks["save"] = save(folder)
    checks["skipping"] = skipping
    checks["predict"] = predict
    for method in MANUAL:
        checks[f"manual, {method}"] = replicas(method, make=Manual)
        checks[f"gan, {method}"] = gan(method)
    checks |= {f"manual half, {method}": half(method, make=Manual) for method in MANUAL_SAME_NOISE}
    # last: what raises in the middle of a reduction leaves the group unusable
    for name, callbacks in {"plain": plain, **STRATEGIES}.items():
        checks[f"unused is an error, {name}"] = unused(callbacks, "ddp")
    return folder, run_on_two_ranks(checks, folder)


def found(ranks, name):
    results = [rank[name] for rank in ranks[1]]
    assert not any(isinstance(result, str) for result in results), results
    return results


@pytest.mark.parametrize("method", [*METHODS, "accumulated", "normalized"])
def test_replicas_are_identical_after_twenty_steps_and_their_noise_is_not(ranks, method):
    names = [f"replicas, {method}"]
    if method not in METHODS:
        names = [f"{method}, {m}, after_backward" for m in ("algorithm 2, antithetic", "algorithm 4")]
    for name in names:
        one, two = found(ranks, name)
        assert all(torch.equal(one["weights"][k], two["weights"][k]) for k in one["weights"])
        assert len(one["gradients"]) == (10 if method == "accumulated" else 20)
        assert all(torch.equal(a, b) for a, b in zip(one["gradients"], two["gradients"]))
        if method.endswith("loss") or method == "draws":  # where the noise is in the loss that a rank reports
            assert not any(torch.equal(a, b) for a, b in zip(one["losses"], two["losses"]))


@pytest.mark.parametrize("method", SAME_NOISE)
def test_two_halves_of_a_batch_give_the_gradient_of_the_whole(ranks, method):
    """The noise of every example is the same in both runs."""
    one, two = found(ranks, f"half, {method}")
    with SameNoise(6, slice(None)):
        whole = fit(METHODS[method](), devices=1, strategy="auto", max_epochs=2).gradients
    assert len(one) == len(whole) == 8
    for a, b, c in zip(one, two, whole):
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-11)
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", MANUAL)
def test_replicas_that_optimize_manually_are_identical(ranks, method):
    """With one optimizer and, in a GAN, with two."""
    one, two = found(ranks, f"manual, {method}")
    assert len(one["gradients"]) == 20
    assert all(torch.equal(a, b) for a, b in zip(one["gradients"], two["gradients"]))
    one, two = found(ranks, f"gan, {method}")
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("method", MANUAL_SAME_NOISE)
def test_two_halves_give_the_gradient_of_the_whole_with_manual_optimization(ranks, method):
    """And noise for the time after the backward is added to the loss, which has the same gradient."""
    one, _ = found(ranks, f"manual half, {method}")
    in_loss = method.replace("after_backward", "loss")
    with SameNoise(6, slice(None)):
        whole = fit(METHODS[in_loss](), make=Manual, devices=1, strategy="auto", max_epochs=2).gradients
    assert len(one) == len(whole) == 8
    for a, b in zip(one, whole):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_ranks_predict_their_examples_with_masks_of_their_own(ranks):
    one, two = found(ranks, "predict")
    L.seed_everything(1, verbose=False)
    model = Predicting()
    plain = torch.cat(make_trainer().predict(model, make_loader(24)))
    halves = [torch.cat([batch.outputs for batch in rank[0]]) for rank in (one, two)]
    torch.testing.assert_close(torch.stack(halves, 1).flatten(0, 1), plain)  # Lightning deals the examples in turn
    (a,), (b,) = one[1], two[1]
    assert torch.equal(a.outputs, b.outputs)
    assert not torch.equal(a.mean, b.mean)
    assert not torch.equal(a.first_order_variance, b.first_order_variance)
    for rank in (one, two):
        assert all(torch.equal(rank[2][k], v) for k, v in model.state_dict().items())
        assert not rank[3]


@pytest.mark.parametrize("name", STRATEGIES)
def test_unused_parameters_are_as_without_us(ranks, name):
    plain = found(ranks, "unused, plain")[0]
    weight, gradients = found(ranks, f"unused, {name}")[0]
    assert gradients == plain[1] == [None] * 3
    assert torch.equal(weight, plain[0])
    for callbacks in ("plain", name):
        assert all("not used in" in rank[f"unused is an error, {callbacks}"] for rank in ranks[1][:1])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_collectives(ranks, accumulate):
    count = {name: found(ranks, f"collectives, {name}, {accumulate}") for name in ("plain", "loss", "after")}
    steps = 4 // accumulate
    assert count["plain"][0] >= steps
    assert count["loss"] == count["plain"]
    assert count["after"] == [n + steps for n in count["plain"]]


@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP2 of this torch needs a GPU")
def test_fsdp2_gives_the_gradients_of_ddp_or_is_refused(ranks):
    gradients, norm = found(ranks, "fsdp2")[0]
    reference = found(ranks, "ddp as fsdp2")[0]
    assert len(gradients) == 4
    for a, b in zip(gradients, reference):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(norm.double(), reference[-1].norm(), rtol=1e-5, atol=0)
    for name, remedy in (("after backward", "injection='loss'"), ("double backward", "estimator='antithetic'")):
        assert ranks[1][0][f"fsdp2, {name}"].startswith("UnsupportedModuleError")
        assert remedy in ranks[1][0][f"fsdp2, {name}"]


def test_the_seed_of_all_ranks_is_one(ranks):
    assert len(set(found(ranks, "own seeds"))) == 1


def test_a_run_of_two_ranks_goes_on_as_one(ranks):
    assert found(ranks, "save") == [True, True]
    model = Classifier()
    L.seed_everything(7, verbose=False)
    trainer = make_trainer(callbacks := STRATEGIES["loss"](), max_epochs=2)
    trainer.fit(model, make_loader(), ckpt_path=ranks[0] / "two.ckpt")
    assert len(model.gradients) == 4
    assert [callback._used_seed for callback in callbacks] == [1, 1]  # the noise goes on where it was


def test_a_divergence_on_one_rank_counts_for_both(ranks):
    one, two = found(ranks, "skipping")
    assert all(torch.equal(one[0][k], two[0][k]) for k in one[0])
    assert one[1] == two[1] == {"streak": 4, "skipped": 3}
