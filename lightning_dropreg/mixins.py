"""The callbacks for authors of a LightningModule, who want them to come with the module.

Example:
    >>> import lightning
    >>> import torch
    >>> class Model(ExplicitPenaltyMixin, ImplicitNoiseMixin, lightning.LightningModule):
    ...     explicit_penalty = {"strength": 2.0}
    >>> [type(callback).__name__ for callback in Model().configure_callbacks()]
    ['ExplicitPenalty', 'ImplicitNoise']
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ClassVar

from lightning import Callback

from lightning_dropreg.callbacks import ExplicitPenalty, ImplicitNoise, MiniBatchDropout
from lightning_dropreg.checks import check_names
from lightning_dropreg.errors import CompositionError
from lightning_dropreg.numerics.context import holding, patched
from lightning_dropreg.session.base import RegularizerCallback

__all__ = ["ExplicitPenaltyMixin", "ImplicitNoiseMixin", "MiniBatchDropoutMixin", "without_mixins"]


class _RegularizerMixin:
    """Makes ``configure_callbacks`` hand the mixins' regularizers to every Trainer that fits the module.

    Whatever a subclass overrides, and in whichever order it names its bases, the regularizers are there: a model that
    silently trains without them would be worse than none.
    """

    _regularizer: ClassVar[tuple[type[RegularizerCallback], str]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Wrap the subclass's ``configure_callbacks``."""
        super().__init_subclass__(**kwargs)
        configure = getattr(cls, "configure_callbacks", None)
        if configure is not None and not hasattr(configure, "_adds_regularizers"):
            cls.configure_callbacks = _adding_regularizers(configure)  # type: ignore[attr-defined]


def _adding_regularizers(configure: Callable[[Any], Sequence[Callback] | Callback]) -> Callable[[Any], list[Callback]]:
    @functools.wraps(configure)
    def configure_callbacks(self: Any) -> list[Callback]:
        configured = configure(self)
        callbacks = list(configured) if isinstance(configured, Sequence) else [configured]
        if _bare.get() is self:
            return [callback for callback in callbacks if not isinstance(callback, RegularizerCallback)]
        for cls in type(self).__mro__:
            if "_regularizer" not in cls.__dict__:
                continue
            make, options = cls.__dict__["_regularizer"]
            if any(type(callback) is make for callback in callbacks):
                continue  # a super() call brought it
            _check_alone(self, make)
            given = getattr(self, options)
            check_names(f"{type(self).__name__}.{options}", given, make)
            callback = make(**given)
            callback.from_mixin = True
            callbacks.append(callback)
        return callbacks

    configure_callbacks._adds_regularizers = True  # type: ignore[attr-defined]
    return configure_callbacks


_bare: ContextVar[Any] = ContextVar("bare", default=None)


@contextmanager
def without_mixins(module: Any) -> Iterator[None]:
    """Let a module bring no regularizers, by mixins or by itself, so that others can be compared on it."""
    configure = module.configure_callbacks
    own = "configure_callbacks" in vars(module)  # set on the instance: left alone
    patches = []
    if not own and not hasattr(configure, "_adds_regularizers"):
        bound = types.MethodType(_adding_regularizers(configure.__func__), module)
        patches.append((module, "configure_callbacks", bound))
    with holding(_bare, module), patched(*patches):
        yield


def _check_alone(module: Any, kind: type[RegularizerCallback]) -> None:
    """Refuse a Trainer that has the callback too; Lightning would drop one of them without a word."""
    trainer = getattr(module, "_trainer", None)
    for callback in trainer.callbacks if trainer is not None else ():
        if type(callback) is kind and not callback.from_mixin:
            raise CompositionError(
                f"{type(module).__name__} brings {kind.__name__} by its mixin and the Trainer has one too. Keep one."
            )


class ExplicitPenaltyMixin(_RegularizerMixin):
    """Trains the module with `lightning_dropreg.ExplicitPenalty`.

    Attributes:
        explicit_penalty: Arguments of the callback by name, on the class or the instance.

    Raises:
        UnknownArgumentError: When a fit begins, if the callback has no such argument.
        CompositionError: When a fit begins, if the Trainer has the same callback too.

    Example:
        >>> import lightning
        >>> class Model(ExplicitPenaltyMixin, lightning.LightningModule):
        ...     explicit_penalty = {"strength": 2.0}
        >>> [type(callback).__name__ for callback in Model().configure_callbacks()]
        ['ExplicitPenalty']
    """

    _regularizer = (ExplicitPenalty, "explicit_penalty")
    explicit_penalty: Mapping[str, Any] = {}


class ImplicitNoiseMixin(_RegularizerMixin):
    """Trains the module with `lightning_dropreg.ImplicitNoise`.

    Attributes:
        implicit_noise: Arguments of the callback by name, on the class or the instance.

    Raises:
        UnknownArgumentError: When a fit begins, if the callback has no such argument.
        CompositionError: When a fit begins, if the Trainer has the same callback too.

    Example:
        >>> import lightning
        >>> class Model(ImplicitNoiseMixin, lightning.LightningModule):
        ...     implicit_noise = {"strength": 1.5}
        >>> [type(callback).__name__ for callback in Model().configure_callbacks()]
        ['ImplicitNoise']
    """

    _regularizer = (ImplicitNoise, "implicit_noise")
    implicit_noise: Mapping[str, Any] = {}


class MiniBatchDropoutMixin(_RegularizerMixin):
    """Trains the module with `lightning_dropreg.MiniBatchDropout`.

    Attributes:
        minibatch_dropout: Arguments of the callback by name, on the class or the instance.

    Raises:
        UnknownArgumentError: When a fit begins, if the callback has no such argument.
        CompositionError: When a fit begins, if the Trainer has the same callback too.

    Example:
        >>> import lightning
        >>> class Model(MiniBatchDropoutMixin, lightning.LightningModule):
        ...     minibatch_dropout = {"k": 4}
        >>> [type(callback).__name__ for callback in Model().configure_callbacks()]
        ['MiniBatchDropout']
    """

    _regularizer = (MiniBatchDropout, "minibatch_dropout")
    minibatch_dropout: Mapping[str, Any] = {}
