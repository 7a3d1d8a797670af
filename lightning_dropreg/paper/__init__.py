"""The paper's own experiments: models and corpora. A client of everything else; nothing else needs it."""

__all__: list[str] = []
