"""The site: ``sphinx-build -W docs site`` (the extra `docs`). Everything in it works offline."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "2")

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from lightning_dropreg import __version__

project = "lightning-dropreg"
author = "The lightning_dropreg developers"
copyright = "2026, the lightning_dropreg developers"
release = version = __version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["README.md", "_build", "**.ipynb_checkpoints"]
suppress_warnings = ["myst.header"]  # pages that begin below level 1 where they are included

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3
nb_execution_mode = "cache"  # a tutorial runs when it has changed, and its pictures are those of this run
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True

default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_class_signature = "separated"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"lightning-dropreg {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


class Mermaid(Directive):
    """A diagram that a code host draws; here its text is shown, which reads as well."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Show the text."""
        return [nodes.literal_block("\n".join(self.content), "\n".join(self.content), language="text")]


def tables(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Write the tables of docstrings, which are Markdown's, in the way that Sphinx reads them."""
    written: list[str] = []
    for line in lines:
        row = line.strip()
        if not (row.startswith("|") and row.endswith("|")):
            written.append(line)
            continue
        indent = line[: len(line) - len(line.lstrip())]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if set(row) <= set("|-: "):
            continue
        if not written or not written[-1].strip().startswith("- ") or not written[-1].startswith(f"{indent}     "):
            written += [f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
        written += [f"{indent}   {'* -' if not number else '  -'} {cell}" for number, cell in enumerate(cells)]
    lines[:] = written


def setup(app: Sphinx) -> None:
    """Add both."""
    app.add_directive("mermaid", Mermaid)
    app.connect("autodoc-process-docstring", tables)


myst_fence_as_directive = ["mermaid"]
