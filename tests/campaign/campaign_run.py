"""Random runs of the callbacks against brute force: right, refused, or (a bug) wrong without a word.

    PYTHONPATH=. python tests/campaign/campaign_run.py --runs 600 --seed 1 --json examples/benchmarks/campaign.json

With ``--progress runs.jsonl`` what was done is kept and not done again, and ``--minutes 3`` stops after that long.

A run fits a network with learning rate 0 on one batch, again and again, so that every step is a draw of one thing. What
it logged and its gradients are compared with `campaign_oracle`. What looks wrong is tried again with other seeds and
ten times the steps, so that chance is no explanation: the first comparison is at 4.5 standard errors, the second too.

An antithetic pair of steps ``eps`` is promised up to ``O(eps^2)``, which may be many percent of a small loss. So what
is still off is asked for that law: half the step along the same directions must leave a quarter of the error, so that
``(4 f(eps/2) - f(eps)) / 3`` (Richardson) is right to a thousandth. Where the step is too wide for that law (two rows
under batch norm), one of a twentieth is asked for it, and for a ten-thousandth. An error that does not vanish so is
wrong.
"""

import argparse
import collections
import contextlib
import json
import logging
import math
import platform
import random
import subprocess
import time
import warnings
from pathlib import Path

import lightning as L
import torch
from campaign_oracle import Oracle, factors_are
from campaign_problems import (
    CAMPAIGN_LOSSES,
    CONVOLUTIONS,
    FLAT,
    NORMS,
    ODD,
    SEQUENCES,
    STRUCTURES,
    Net,
    ragged,
    unpack,
)
from torch import nn
from torch.utils.data import DataLoader

import lightning_dropreg as dr
from lightning_dropreg.errors import DropregError

SIGMAS, STEP = 4.5, 0.02
BIAS, LEFT = 0.02, 1e-3  # relative, beside chance: of the pair's finite steps, and of what is extrapolated from two
NEW_LOSSES = ["ce_ragged", "ce_weighted_smooth", "ce_weighted_rows", "mse_masked"]
BY = [
    *("method", "estimator", "loss", "network", "structure", "curvature", "batch_fraction"),
    *("accumulate", "clip", "compiled", "low_memory"),
]
ESTIMATORS = ["antithetic", "auto", "forward", "double_backward", "exact"]


class Standing(torch.optim.SGD):
    """Goes nowhere, but notes with what it would."""

    def __init__(self, params, module):
        super().__init__(params, lr=0.0)
        self.module = [module]

    def step(self, closure=None):
        closure()
        self.module[0].stepped.append(self.module[0].gradient())


class Module(L.LightningModule):
    def __init__(self, net, kind):
        super().__init__()
        self.net, self.kind, self.gradients, self.stepped, self.rows = net, kind, [], [], []

    def training_step(self, batch, batch_idx):
        x, t = unpack(batch)
        z, h = self.net(x)
        return self.kind.value(self.kind.inner(z), t, h, self.net)

    def configure_optimizers(self):
        return Standing(self.parameters(), self)

    def gradient(self):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters()]
        return torch.cat([g.flatten() for g in grads]).clone()

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append(self.gradient())

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.rows.append({k: float(v) for k, v in self.trainer.callback_metrics.items()})


def draw(seed):
    """Draw one configuration, as plain values."""
    r = random.Random(seed)
    odd = r.random() < 0.25
    names = [name for name, kind in CAMPAIGN_LOSSES.items() if not kind.odd and name not in NEW_LOSSES]
    made = {"seed": seed, "loss": r.choice(names), "network": r.choice(FLAT), "sequence": False}
    if not odd and r.random() < 0.3:
        made |= {"sequence": True, "network": r.choice(SEQUENCES)}
        made["loss"] = r.choice([name for name in names if CAMPAIGN_LOSSES[name].tokens])
    if odd:
        part = r.choice(["loss", "network"])
        made[part] = r.choice([n for n, k in CAMPAIGN_LOSSES.items() if k.odd] if part == "loss" else ODD)
    made["activation"] = r.choice(["Tanh", "Sigmoid", "SiLU", "Softplus"])
    made["structure"] = r.choice(list(STRUCTURES))
    made["q"] = r.choice([0.1, 0.2, 0.3, 0.5])
    made["rows"], made["width"], made["outputs"] = r.choice([2, 3, 4]), r.choice([3, 4]), r.choice([2, 3, 4])
    made["method"] = r.choice(["penalty"] * 5 + ["noise"] * 3 + ["both", "both", "k", "k", "k_noise"])
    made["estimator"] = r.choice(ESTIMATORS)
    made["curvature"] = r.choice(["loss_hessian", "loss_hessian", "identity", "loss_jacobian"])
    made["strength"] = r.choice([1.0, 1.0, 2.0, 0.5])
    made["mask"] = r.choice(["as_model", "as_model", "elementwise"])
    made["batch_fraction"] = r.choice([None, None, None, 0.5])
    made["every_n_steps"] = r.choice([1, 1, 2])
    made["accumulate"] = r.choice([1, 1, 2])
    made["injection"] = r.choice(["auto", "loss", "after_backward"])
    made["source"] = r.choice(["taylor", "taylor", "dropout"])
    made["k"] = r.choice([1, 2, 3])
    made["low_memory"] = r.random() < 0.2
    if made["method"] in {"k", "k_noise"} or (made["method"] == "noise" and made["source"] == "dropout"):
        # all masks are enumerated
        made |= {"sequence": False, "rows": 2, "width": 3}
        made["network"] = "plain" if made["network"] not in {"plain", "residual", "shared", *ODD} else made["network"]
        if CAMPAIGN_LOSSES[made["loss"]].odd and made["loss"] != "unrecognized":
            made["loss"] = "unrecognized"
    if CAMPAIGN_LOSSES[made["loss"]].odd or made["network"] in ODD:
        made |= {"curvature": "loss_hessian", "sequence": False}
        if made["network"] in SEQUENCES:
            made["network"] = "plain"
    return widened(made, r)


def widened(made, r):
    """Draw what came later, last, so that the rest of every configuration is what it was."""
    enumerated = made["method"] in {"k", "k_noise"} or (made["method"] == "noise" and made["source"] == "dropout")
    flat = not made["sequence"] and not CAMPAIGN_LOSSES[made["loss"]].odd and made["network"] not in ODD
    part = r.random()
    if flat and part < 0.45:
        made["network"] = r.choice([*CONVOLUTIONS, *NORMS, "tied", "tied"])
        if made["network"] in CONVOLUTIONS and enumerated:
            made["width"] = 2
    if not CAMPAIGN_LOSSES[made["loss"]].odd and made["network"] not in ODD and r.random() < 0.3:
        made["loss"] = r.choice([n for n in NEW_LOSSES if not made["sequence"] or CAMPAIGN_LOSSES[n].tokens])
    if made["sequence"] and made["loss"] == "ce_ragged":
        made["structure"] = "ragged"
    made["accumulate"] = r.choice([made["accumulate"], made["accumulate"], 3])
    made["clip"] = r.choice([None, None, 0.1])
    made["compiled"] = r.random() < 0.05 and made["network"] != "lstm"
    return made


def problem(made):
    torch.manual_seed(made["seed"])
    kind = CAMPAIGN_LOSSES[made["loss"]]
    net = Net(made["network"], getattr(nn, made["activation"])(), 3, made["width"], made["outputs"], made["q"])
    x = torch.randn(made["rows"], 2, 3) if made["sequence"] else torch.randn(made["rows"], 3)
    with torch.no_grad():
        t = kind.target(net.eval()(x)[0])
    if made["structure"] == "ragged":
        x, t = unpack(ragged(x, t))
    return net.train(), x, t, kind


def callbacks(made, step_size=STEP):
    how = {key: made[key] for key in ("estimator", "mask", "batch_fraction")} | {"step_size": step_size}
    if made["estimator"] == "antithetic" and made["low_memory"]:
        how["low_memory"] = True
    found = []
    if made["method"] in {"penalty", "both"}:
        options = {key: made[key] for key in ("strength", "curvature", "every_n_steps")}
        found.append(dr.ExplicitPenalty(**options, **how))
    if made["method"] in {"k", "k_noise"}:
        found.append(dr.MiniBatchDropout(made["k"]))
    if made["method"] in {"noise", "both", "k_noise"}:
        found.append(dr.ImplicitNoise(strength=1.0, source=made["source"], injection=made["injection"], **how))
    return found


def fit(made, steps, again=0, step_size=STEP):
    """Gradients ``(steps, P)``, rows of metrics, and what else is wrong, as texts."""
    net, x, t, kind = problem(made)
    if made.get("compiled"):
        torch._dynamo.reset()
        net.compile(backend="aot_eager")
    L.seed_everything(made["seed"] + 7919 * again, verbose=False)
    module = Module(net, kind)
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        callbacks=callbacks(made, step_size),
        accumulate_grad_batches=made["accumulate"],
        gradient_clip_val=made.get("clip"),
        **quiet,
    )
    batch = (ragged if made["structure"] == "ragged" else STRUCTURES[made["structure"]])(x, t)
    batches = steps * made["accumulate"]
    trainer.fit(module, DataLoader([batch] * batches, batch_size=None))
    gradients = torch.stack(module.gradients)
    return gradients, module.rows, [*misclipped(made, gradients, module), *misled(made, net, x, batches)]


def misclipped(made, gradients, module):
    """What the optimizer stepped with must be the whole gradient, clipped."""
    norms = gradients.norm(dim=1, keepdim=True)
    factor = 1.0 if made.get("clip") is None else (made["clip"] / (norms + 1e-6)).clamp(max=1.0)
    same = torch.allclose(torch.stack(module.stepped), gradients * factor, rtol=1e-9, atol=1e-12)
    return [] if same else ["the optimizer steps with another gradient"]


def misled(made, net, x, batches):
    """Running statistics must be those of one run without dropout for every batch."""
    if made["network"] not in NORMS:
        return []
    if made["network"] == "norm_behind" and (made["method"] in {"k", "k_noise"} or made["source"] == "dropout"):
        return []  # chance has a part in them
    plain = problem(made)[0]
    with torch.no_grad(), factors_are(None):
        for _ in range(batches):
            plain(x)
    near = 2e-2 if made["network"] == "norm_behind" else 1e-9  # of a pair's mean, and exactly
    pairs = zip(net.norm.buffers(), plain.norm.buffers())
    fine = all(torch.allclose(a.double(), b.double(), rtol=near, atol=near) for a, b in pairs)
    return [] if fine else ["running statistics are not those of one run for every batch"]


def extrapolated(at_whole, at_half):
    """What two fits gave, with steps of two sizes along the same directions, extrapolated to 0."""
    (gradients, rows, faults), (others, others_rows, _) = at_whole, at_half
    limit = lambda whole, half: (4 * half - whole) / 3
    limits = [{k: limit(a[k], b[k]) for k in a} for a, b in zip(rows, others_rows, strict=True)]
    return limit(gradients, others), limits, faults


def expected(made):
    """Mean gradient, trace of its covariance, penalty and loss; None for what is not known or not looked at."""
    net, x, t, kind = problem(made)
    oracle = Oracle(net, x, t, kind, made["mask"] == "elementwise")
    exact = (
        Oracle(net, x, t, kind) if made["mask"] == "elementwise" else oracle
    )  # dropout itself is as the model has it
    loss, plain = oracle.plain()
    right = {"gradient": plain, "trace": None, "penalty": None, "loss": loss}
    method = made["method"]
    odd = kind.odd or made["network"] in ODD
    if method in {"penalty", "both"}:
        if odd:
            right["gradient"], right["penalty"] = None, oracle.penalty_value()
        else:
            value, gradient = oracle.penalty(made["curvature"])
            right["gradient"], right["penalty"] = plain + made["strength"] * gradient, value
    elif method == "noise":
        right["trace"] = exact.over_masks()[2] if made["source"] == "dropout" else oracle.noise_trace()
    else:
        right["loss"], right["gradient"], trace = exact.over_masks()
        share = 0.0 if method == "k" else 1 - 1 / made["k"]
        own = trace if made["source"] == "dropout" else oracle.noise_trace()
        right["trace"] = trace / made["k"] + share * own
    if right["trace"] is not None:
        right["trace"] = right["trace"] / made["accumulate"]
    return right


def off(made, right, gradients, rows, faults=(), bias=BIAS):
    """What differs, as texts; empty if all is right. `bias` is the relative difference that is no matter of chance."""
    found = list(faults)
    steps = len(gradients) // made["every_n_steps"] * made["every_n_steps"]
    gradients = gradients[:steps]

    def compare(name, samples, value):
        samples, value = torch.as_tensor(samples), torch.as_tensor(value)
        error = samples.std(0) / math.sqrt(len(samples)) if len(samples) > 1 else torch.zeros(samples.shape[1:])
        # the steps that a penalty leaves out make a pattern of its own, not a spread: what is left is smaller
        scale = value.abs().max().clamp_min(1e-12)
        excess = (samples.mean(0) - value).abs() - SIGMAS * error - bias * scale
        if not bool((excess <= 0).all()):
            worst = int(excess.argmax()) if excess.ndim else 0
            got, want = (v.flatten()[worst].item() for v in (samples.mean(0), value))
            found.append(f"{name}: got {got:.5g}, right is {want:.5g}, standard error {error.flatten()[worst]:.2g}")

    if right["gradient"] is not None:
        blocks = gradients.view(-1, made["every_n_steps"], gradients.shape[1]).mean(1)
        compare("mean gradient", blocks, right["gradient"])
    if right["trace"] is not None:
        compare("trace of the covariance", (gradients - gradients.mean(0)).square().sum(1), right["trace"])
    if right["penalty"] is not None:
        compare(
            "penalty",
            [row["dropreg/explicit_penalty"] for row in rows if "dropreg/explicit_penalty" in row],
            right["penalty"],
        )
    compare(
        "loss", [row["dropreg/loss"] for row in rows if "dropreg/loss" in row] or [float(right["loss"])], right["loss"]
    )
    return found


def trial(seed, steps=60):
    """One run: its configuration, ``"right"``, ``"refused"`` or ``"wrong"``, and why."""
    torch.set_default_dtype(torch.float64)
    made = draw(seed)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            fitted = fit(made, steps)
        except DropregError as error:
            return made, "refused", f"{type(error).__name__}: {str(error)[:160]}"
        except Exception as error:  # loud, but no answer: counts as wrong
            return made, "wrong", f"untyped {type(error).__name__}: {str(error)[:160]}"
        right = expected(made)
        found = off(made, right, *fitted)
        if found:  # chance?
            with contextlib.suppress(DropregError):  # refused with another seed: then it was not the first time
                more = fit(made, 10 * steps, again=1)
                found = off(made, right, *more)
                if found:  # the finite steps' own?
                    at = lambda step_size: fit(made, 10 * steps, again=1, step_size=step_size)
                    found = off(made, right, *extrapolated(more, at(STEP / 2)), bias=LEFT)
                    if found:
                        found = off(made, right, *extrapolated(at(STEP / 20), at(STEP / 40)), bias=LEFT / 10)
    ours = [str(w.message)[:160] for w in said if "dropreg" in str(w.filename) and "repeat" in str(w.message)]
    if found and ours:
        return made, "refused", f"warned: {ours[0]}"
    return made, "wrong" if found else "right", "; ".join(found)


def campaign(seeds, progress, minutes):
    """Every trial of `seeds` that `progress` has not yet, as long as there is time; all that are done."""
    done = {}
    if progress is not None and progress.exists():
        done = {line["configuration"]["seed"]: line for line in map(json.loads, progress.read_text().splitlines())}
    start = time.time()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    for seed in seeds:
        if seed in done or time.time() - start > 60 * minutes:
            continue
        began = time.time()
        made, verdict, why = trial(seed)
        done[seed] = {"configuration": made, "verdict": verdict, "why": why}
        done[seed] |= {"seconds": round(time.time() - began, 1), "commit": commit}
        if verdict == "wrong":
            print(json.dumps(done[seed]), flush=True)
        if progress is not None:
            with progress.open("a") as file:
                file.write(json.dumps(done[seed]) + "\n")
    return [done[seed] for seed in seeds if seed in done]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--progress", type=Path)
    parser.add_argument("--minutes", type=float, default=math.inf)
    options = parser.parse_args()
    for name in ("lightning", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    first = options.seed * 100_000
    done = campaign(range(first, first + options.runs), options.progress, options.minutes)
    by = {}
    for one in done:
        for key in BY:
            of_key = by.setdefault(key, {}).setdefault(str(one["configuration"][key]), collections.Counter())
            of_key[one["verdict"]] += 1
    counts = collections.Counter(one["verdict"] for one in done)
    report = {
        "command": f"python tests/campaign/campaign_run.py --runs {options.runs} --seed {options.seed}",
        "commits": dict(collections.Counter(one["commit"] for one in done)),
        "counts": {name: counts[name] for name in ("right", "refused", "wrong")},
        "by": by,
        "refusals": dict(collections.Counter(o["why"][:90] for o in done if o["verdict"] == "refused").most_common()),
        "wrong": [{"configuration": o["configuration"], "why": o["why"]} for o in done if o["verdict"] == "wrong"],
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "lightning": L.__version__},
        "machine": {"platform": platform.platform(), "processor": platform.processor() or platform.machine()},
        "seconds": round(sum(one["seconds"] for one in done)),
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(len(done), report["counts"], f"{report['seconds']} s")


if __name__ == "__main__":
    main()
