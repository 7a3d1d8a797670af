"""Finding where a step drops something (its *sites*) and its losses, in code that knows nothing of this package.

Start with `sites` (what a site and a rule are), then `mode`; `handlers` has a file for each kind of dropout.
"""

__all__: list[str] = []
