"""Whatever is passed to a public constructor, function or command: it is taken, or refused by a typed error."""

import contextlib
import importlib
import inspect
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_dropreg as dr
from lightning_dropreg import functional, metrics
from lightning_dropreg import nn as layers
from lightning_dropreg.cli import main
from lightning_dropreg.cli.app import DropregCLI
from lightning_dropreg.errors import DropregError
from lightning_dropreg.paper import data, models

# Numbers stay small enough for a model of that size to be built.
VALUES = st.one_of(
    st.integers(-3, 8),
    st.floats(-2, 4),
    st.sampled_from(
        [float("nan"), float("inf"), -float("inf"), 1e-300, True, False, None, "", "x", [], [1], {}, {"a": 1}, object()]
    ),
)

QUICKSTART = str(Path(__file__).parents[1] / "configs" / "quickstart.yaml")
NET = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))


def closure():
    return F.cross_entropy(NET(torch.ones(2, 3)), torch.tensor([0, 1]))


def weight_drop(module=None, weight_names="weight_hh_l0", p=0.5):
    layers.WeightDrop(nn.LSTM(2, 2) if module is None else module, weight_names, p)


LOGITS, TARGET = torch.ones(4, 3), torch.tensor([0, 1, 1, 0])
SMALL = {"vocab_size": 8}
CALLS = {
    dr.ExplicitPenalty: {},
    dr.ImplicitNoise: {},
    dr.MiniBatchDropout: {},
    dr.DivergenceDetector: {},
    dr.MaxNorm: {},
    dr.MonteCarloDropout: {},
    dr.DropProbSchedule: {},
    dr.DropoutDiagnostics: {},
    models.LSTMLanguageModel: {**SMALL, "embedding_dim": 4, "hidden_dim": 4},
    models.QRNNLanguageModel: {**SMALL, "embedding_dim": 4, "hidden_dim": 4},
    models.TransformerLanguageModel: {**SMALL, "width": 4, "num_layers": 1, "num_heads": 1, "feedforward_dim": 4},
    models.TransformerXLLanguageModel: {
        **SMALL,
        "dim": 4,
        "num_layers": 1,
        "heads": 1,
        "head_dim": 4,
        "inner_dim": 4,
        "memory_length": 2,
    },
    data.LanguageModelingData: {},
    layers.LockedDropout: {},
    layers.EmbeddingDropout: {"embedding": nn.Embedding(3, 2)},
    layers.QRNN: {"input_size": 2, "hidden_size": 2},
    weight_drop: {},
    data.TextFolder: {},
    data.PennTreebank: {},
    data.PythonManual: {},
    data.make_corpus: {"name": "penn_treebank"},
    metrics.MeanExplicitPenalty: {},
    metrics.NoiseScale: {},
    metrics.LinearModelBound: {"num_classes": 2},
    metrics.LossJacobianSize: {},
    metrics.functional.dropout_effects: {"closure": closure, "module": NET},
    metrics.functional.loss_jacobian_size: {"logits": LOGITS, "target": TARGET},
    metrics.functional.loss_hessian_size: {"logits": LOGITS, "target": TARGET},
    metrics.functional.norm_2_1: {},
    metrics.functional.linear_model_bound: {"inputs": LOGITS, "weight": LOGITS[:2], "target": TARGET},
    functional.explicit_penalty: {"closure": closure},
    functional.implicit_noise: {"closure": closure},
    functional.dropout_loss: {"closure": closure},
}
# What is an object of the user's and not a setting.
OBJECTS = {
    "self",
    "optimizer",
    "lr_scheduler",
    "closure",
    "generator",
}
# Keyword arguments that a constructor hands on.
HANDED_ON = {
    metrics.MeanExplicitPenalty: ["draws", "seed", "estimator", "step_size"],
    metrics.NoiseScale: ["draws", "seed", "estimator", "step_size"],
}


def arguments():
    for call, base in CALLS.items():
        named = [n for n, p in inspect.signature(call).parameters.items() if p.kind is not p.VAR_KEYWORD]
        for name in [*named, *HANDED_ON.get(call, [])]:
            if name not in OBJECTS:
                yield pytest.param(call, base, name, id=f"{call.__name__}-{name}")


@pytest.mark.parametrize(("call", "base", "name"), arguments())
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(value=VALUES)
def test_bad_values_are_refused_by_a_typed_error(call, base, name, value):
    with contextlib.suppress(DropregError):
        call(**{**base, name: value})


@pytest.mark.parametrize("command", ["fit", "inspect", "bench", "diagnose"])
def test_every_option_takes_garbage_or_refuses_it_with_a_message(command, capsys):
    """Parsing only; ranges are the constructors' (above) and the commands' own (below)."""

    class Stop(Exception):
        pass

    class Parsing(DropregCLI):
        def parse_arguments(self, parser, args):
            raise Stop(parser)

    own = None if command in {"fit"} else importlib.import_module(f"lightning_dropreg.cli.{command}")._add_options
    with pytest.raises(Stop) as stopped:
        Parsing([command], add_options=own)
    parser = stopped.value.args[0]
    before = ["--config", QUICKSTART]
    if command == "fit":
        before = ["fit", *before]
    options = next(iter(parser._subcommands_action.choices.values())) if command == "fit" else parser
    refused = 0
    for action in options._actions:
        option = next((name for name in action.option_strings if name.startswith("--")), None)
        if option is None or action.nargs == 0 or option in {"--config", "--print_config"} or option.endswith("help"):
            continue
        if command != "fit" and "." in option:
            continue  # fit has it too
        try:
            parser.parse_args([*before, f"{option}={{x: ["])
        except (SystemExit, DropregError) as error:
            refused += 1
            message = capsys.readouterr().err + str(error)
            assert "Traceback" not in message
            assert option.removeprefix("--").partition(".")[0] in message
    assert refused > 2


@pytest.mark.parametrize("options", ["bench --repeats=0", "bench --threads=0", "diagnose --draws=1"])
def test_the_commands_own_options_have_ranges(options, capsys):
    command, option = options.split()
    assert main([command, "--config", QUICKSTART, option]) == 1
    assert option.partition("=")[0].strip("-") in capsys.readouterr().err


@pytest.mark.parametrize(("call", "base", "name"), arguments())
def test_what_can_be_no_value_of_any_argument_is_refused_at_once(call, base, name):
    with pytest.raises(DropregError, match=name):
        call(**{**base, name: object()})
