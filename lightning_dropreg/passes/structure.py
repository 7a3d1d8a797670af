"""What modules are made of: hooks, submodules, parameters by name and class, put back between the runs of a step.

A step may change these, too: transformers registers hooks at the first forward that wants hidden states, a
parametrization exchanges a module's class, a lazy module becomes what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.modules.lazy import LazyModuleMixin

__all__ = ["Structure"]

# Buffers are state and looked at by themselves.
_TABLES = tuple(name for name, value in nn.Module().__dict__.items() if isinstance(value, dict) and name != "_buffers")


class Structure:
    """Hooks, submodules, parameters and classes of modules at the moment of creation.

    Args:
        modules: The modules.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> before = Structure([layer])
        >>> handle = layer.register_forward_hook(lambda *args: None)
        >>> before.is_current(), before.restore(), len(layer._forward_hooks)
        (False, None, 0)
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        # FSDP2 exchanges sharded and whole parameters in every forward and keeps account of that itself
        modules = [] if any(isinstance(module, FSDPModule) for module in modules) else modules
        self._modules = modules
        self._classes = [type(module) for module in modules]
        self._tables: list[dict[Any, Any]] = [
            attributes[name] for attributes in map(vars, modules) for name in _TABLES if name in attributes
        ]
        self._sizes = list(map(len, self._tables))
        # most are empty
        self._contents = [(table, table.copy()) for table in self._tables if table]

    def is_current(self) -> bool:
        """Whether all is as it was."""
        if self._sizes != list(map(len, self._tables)) or self._classes != [type(module) for module in self._modules]:
            return False
        return all(
            all(map(is_, table.values(), content.values())) and list(table) == list(content)
            for table, content in self._contents
        )

    def restore(self) -> None:
        """Put all back, in the very tables: the handles of hooks hold on to them."""
        if self.is_current():
            return
        kept = {id(table) for module in self._grown() for table in vars(module).values() if isinstance(table, dict)}
        filled = {id(table): content for table, content in self._contents}
        for module, cls in zip(self._modules, self._classes, strict=True):
            if type(module) is not cls and not issubclass(cls, LazyModuleMixin):
                module.__class__ = cls
        for table in self._tables:
            if id(table) not in kept:
                content = filled.get(id(table), {})
                table.clear()
                table.update(content)

    def _grown(self) -> list[nn.Module]:
        """Lazy modules that have become what they are, for which there is no way back."""
        return [
            module
            for module, cls in zip(self._modules, self._classes, strict=True)
            if type(module) is not cls and issubclass(cls, LazyModuleMixin)
        ]
