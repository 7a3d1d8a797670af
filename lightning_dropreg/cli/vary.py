"""``dropreg compare --vary``: one option at several values, and which of them to take."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from yaml import safe_load  # type: ignore[import-untyped]

from lightning_dropreg.cli.comparison import Comparison
from lightning_dropreg.cli.config import layers, read_file
from lightning_dropreg.cli.runs import Setting
from lightning_dropreg.cli.spelling import parameters
from lightning_dropreg.cli.spread import Spread, in_digits
from lightning_dropreg.diagnostics.statistics import student_quantile
from lightning_dropreg.errors import InvalidArgumentError

__all__ = ["PLAIN", "choice", "varied", "verdict", "verdicts"]

PLAIN = "dropout"
"""Name of the runs without this package's regularizers."""
_LEAST = 3
"""With fewer pairs of seeds an interval says nothing."""
_COMMA = re.compile(r",(?![^\[]*\])")
"""Between values, not within one in brackets."""
_MIXINS = ("explicit_penalty", "implicit_noise", "minibatch_dropout")
"""Where a mixin's author writes its settings."""


def varied(file: str, spec: str, plain: bool = False) -> list[Setting]:
    """Make the settings that ``--vary`` asks for: plain dropout first, then one for each value.

    Args:
        file: Configuration file.
        spec: ``KEY=VALUE,VALUE,…``. The key is an option of a callback (``strength``, or ``ExplicitPenalty.strength``
            where several callbacks have it) or of a mixin (``explicit_penalty.strength``), or any key that fit takes
            (``model.init_args.drop_prob``, or ``drop_prob`` if no callback has it). A value may be a list in brackets.
        plain: Whether every value is tried with plain dropout, as for its rate.

    Returns:
        The settings.

    Raises:
        InvalidArgumentError: If there is no such option, several callbacks have it, or there are fewer than two values.
    """
    key, _, listed = spec.partition("=")
    values = list(dict.fromkeys(value.strip() for value in _COMMA.split(listed) if value.strip()))
    if not key or len(values) < 2:
        raise InvalidArgumentError(f"--vary {spec}: give a key and two values or more, as in --vary strength=0.5,1,2.")
    label = key.rpartition(".")[2]
    if key == label and (plain or not _taking(key, _callbacks(file))) and key in parameters(_model(file)):
        key = f"model.init_args.{key}"
    if key.partition(".")[0] in {"model", "data", "optimizer", "lr_scheduler"} or (
        key.startswith("trainer.") and not key.startswith("trainer.callbacks")
    ):
        names = [f"{PLAIN}, {label}={value}" if plain else f"{label}={value}" for value in values]
        settings = [Setting(name, file, (f"--{key}={v}",), plain) for name, v in zip(names, values, strict=True)]
        return [Setting(PLAIN, file, plain=True), *settings]
    if plain:
        raise InvalidArgumentError(
            f"--vary {key}: with --plain, which leaves the regularizers out, vary an argument of the model"
            + (f": {', '.join(sorted(parameters(_model(file))))}." if _model(file) else ".")
        )
    if key.rpartition(".")[0] in _MIXINS:
        mixin = key.rpartition(".")[0]
        settings = [Setting(f"{label}={value}", file, mixin={mixin: {label: safe_load(value)}}) for value in values]
        return [Setting(PLAIN, file, plain=True), *settings]
    callbacks = _callbacks(file)
    number = _the_one(key, callbacks, file)
    settings = []
    for value in values:
        changed = json.loads(json.dumps(callbacks))
        changed[number]["init_args"] = {**changed[number].get("init_args", {}), label: safe_load(value)}
        settings.append(Setting(f"{label}={value}", file, (f"--trainer.callbacks={json.dumps(changed)}",)))
    return [Setting(PLAIN, file, plain=True), *settings]


def _callbacks(file: str) -> list[dict[str, Any]]:
    """The callbacks of a file and of those below it, each with ``class_path``."""
    found: list[Any] = []
    for layer in layers(file):
        trainer = (read_file(layer) if Path(layer).is_file() else {}).get("trainer") or {}
        found = _as_list(trainer["callbacks"]) if "callbacks" in trainer else found
        found = [*found, *_as_list(trainer.get("callbacks+"))]
    listed = [{"class_path": one} if isinstance(one, str) else one for one in found]
    return [{**one, "class_path": _whole(str(one["class_path"]))} for one in listed]


def _model(file: str) -> str:
    """The path of the model's class; "" if the file names none."""
    told = [(read_file(layer) if Path(layer).is_file() else {}).get("model") for layer in layers(file)]
    paths = [one.get("class_path") if isinstance(one, dict) else one for one in told]
    return next((str(path) for path in reversed(paths) if path), "")


def _taking(option: str, callbacks: Sequence[dict[str, Any]]) -> list[int]:
    """The numbers of the callbacks that have an option."""
    return [n for n, one in enumerate(callbacks) if option in parameters(str(one["class_path"]))]


def _whole(path: str) -> str:
    return path if "." in path else f"lightning_dropreg.{path}"


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _the_one(key: str, callbacks: Sequence[dict[str, Any]], file: str) -> int:
    """The number of the callback whose option `key` names."""
    *where, option = [part for part in key.removeprefix("trainer.callbacks.").split(".") if part != "init_args"]
    names = [str(one["class_path"]).rpartition(".")[2] for one in callbacks]
    found = [n for n in _taking(option, callbacks) if not where or where[-1] in {names[n], str(n)}]
    if len(found) == 1:
        return found[0]
    if found:
        told = " or ".join(f"{names[n]}.{option}" for n in found)
        raise InvalidArgumentError(f"--vary {key}: several callbacks of {file} have that option; name one: {told}.")
    options = [
        f"{names[n]}.{name}" for n, one in enumerate(callbacks) for name in sorted(parameters(one["class_path"]))
    ]
    there = f"There is: {', '.join(options)}." if options else "It has no callbacks; add ExplicitPenalty to them."
    there += f" For a mixin: {_MIXINS[0]}.{key.rpartition('.')[2]}."
    raise InvalidArgumentError(f"--vary {key}: no callback of {file} has that option. {there}")


def choice(comparison: Comparison, spec: str, plain: bool = False) -> list[str]:
    """Say which value is best in validation, and how that one does in the test against plain dropout."""
    label = spec.partition("=")[0].rpartition(".")[2]
    start = f"{PLAIN}, {label}=" if plain else f"{label}="
    means = {c: s.mean for c in comparison.configs if c.startswith(start) and (s := comparison.best(c))}
    if not means:
        return [f"No choice: no run with a {label} has a validation loss (val_loss, say, logged in validation_step)."]
    ranked = sorted(means, key=lambda config: means[config], reverse=comparison.mode == "max")
    best = ranked[0]
    seeds = len(comparison.of(best))
    count = f"mean of {_seeds(seeds)}" if seeds > 1 else _seeds(seeds)
    told = [f"Chosen by {comparison.metric}: {best} ({in_digits(means[best])}, {count}"]
    told[0] += f"; next {ranked[1]}: {in_digits(means[ranked[1]])})." if len(ranked) > 1 else ")."
    try:
        numbers = sorted(float(config.partition("=")[2]) for config in means)
        ends = {numbers[0]: "smallest", numbers[-1]: "largest"}
        if (end := ends.get(float(best.partition("=")[2]))) and len(numbers) > 1:
            told.append(f"It is the {end} that was tried: try {'smaller' if end == 'smallest' else 'larger'} ones too.")
    except ValueError:  # words, whose order says nothing
        pass
    if comparison.configs[0] != best:
        told += list(_against_reference(comparison, best))
        if not plain and comparison.configs[0] == PLAIN:
            told.append(
                f"The rate of {PLAIN} is the model's own: tune it first (--plain --vary drop_prob=0.1,0.3,0.5, say)."
            )
    return told + list(_unfinished(comparison))


def verdicts(comparison: Comparison) -> list[str]:
    """Say which configurations differ from the first by more than chance, and whether their fits were done.

    Returns:
        Sentences.
    """
    return [*(told for config in comparison.configs for told in verdict(comparison, config)), *_unfinished(comparison)]


def _unfinished(comparison: Comparison) -> Iterator[str]:
    """Warn of configurations whose fits were best in their last epoch: who would win if they went on is not known.

    Yields:
        One sentence, or none.
    """
    ends = {
        config: sum(run.result.best_epoch == run.result.epochs > 1 for run in comparison.of(config))
        for config in comparison.configs
    }
    if late := [config for config, count in ends.items() if 2 * count > len(comparison.of(config))]:
        told = "every setting" if len(late) == len(ends) else ", ".join(late)
        yield f"Not done: the last epoch was the best of {told}. Train longer before you trust this (max_epochs)."


def _against_reference(comparison: Comparison, best: str) -> Iterator[str]:
    reference = comparison.configs[0]
    tests = comparison.metrics[1:]
    pairs = {name: spread for name in tests or [comparison.metric] if (spread := comparison.paired(best, name))}
    if not pairs:
        return
    listed = ", ".join(f"{name} {in_digits(s.mean, s.error, '+')}" for name, s in pairs.items())
    count = next(iter(pairs.values())).count
    where = "the test" if tests else "validation (there is no test_step with a test_dataloader; the choice flatters it)"
    yield f"In {where}, {best} minus {reference}, {_seeds(count)} in pairs: {listed}" + (
        " (± standard error)." if count > 1 else "."
    )
    yield from verdict(comparison, best)
    if times := comparison.times(best):
        told = f"A fit took {times.mean:.2g} times as long"
        equal = [Spread.of([comparison.at_equal_time(run) for run in comparison.of(c)]) for c in (best, reference)]
        mine, other = (spread and in_digits(spread.mean, spread.error) for spread in equal)
        if times.mean > 1 and mine and other:
            told += f"; in the time of {reference}'s it reached {comparison.metric} {mine}, {reference} {other}"
        yield f"{told}."


def verdict(comparison: Comparison, config: str) -> Iterator[str]:
    """Say whether a configuration differs from the reference by more than chance, by Student's t.

    Yields:
        One sentence, about the test's loss, or about the best validation where there is no test; none without a pair.
    """
    reference, name = comparison.configs[0], comparison.metric.replace("val", "test", 1)
    name = name if name in comparison.metrics else comparison.metric
    difference = comparison.paired(config, name)
    if difference is None:
        return
    if difference.count < _LEAST or difference.error is None:
        told = "cannot be told from chance: take at least 3, better 5 (--seeds 1 2 3 4 5)"
        yield f"With {_seeds(difference.count)}, the difference between {config} and {reference} {told}."
        return
    margin = student_quantile(0.95, difference.count - 1) * difference.error
    known = abs(difference.mean) > margin
    told = ("lower than" if difference.mean < 0 else "higher than") if known else "as far as seeds can tell that of"
    yield f"{config}: {name} is {told} {reference} ({_seeds(difference.count)}, Student's t, 95 %)."


def _seeds(count: int) -> str:
    return f"{count} seed{'s' * (count != 1)}"
