"""The site. Its source is the whole repository, so that every relative link is good here and on a code host alike.

    sphinx-build -W --keep-going -c docs . build/site      # with the extra `docs`; then open build/site/index.html

Everything in it can be read without a network: formulas are MathML, made when the site is built.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
)  # of the tutorials

from lightning_dropreg import __version__, errors  # noqa: E402
from lightning_dropreg.checks import SpellsArguments  # noqa: E402

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
]
root_doc = "docs/index"
include_patterns = ["docs/**.md", "examples/**.md", "CHANGELOG.md", "CONTRIBUTING.md"]
exclude_patterns = [
    "docs/README.md",
    ".*",
    "build",
    "dist",
    "site",
    "tests",
    "lightning_dropreg",
    "*.egg-info",
    "**/.ipynb_checkpoints",
]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"  # a tutorial runs when it has changed, and its pictures are those of this run
nb_execution_timeout = 900  # seconds; a tutorial of one minute takes longer on a busy machine
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove"  # what Lightning says of the machine

smartquotes_action = "qe"  # quotes and dots: an option's two dashes stay two
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # hooks of Lightning's are told of there
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"lightning-dropreg {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_extra"]
html_math_renderer = "mathml"
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


class Mermaid(SphinxDirective):
    """A diagram that a code host draws. Here a table says the same: who, what, and on whom it leans."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        """Read ``a["label"] --> b["label"]`` and write one row for each name."""
        labels: dict[str, str] = {}
        below: dict[str, list[str]] = {}
        for line in self.content[1:]:
            names = []
            for name, label in re.findall(r'(\w+)(?:\["([^"]+)"\])?(?=\s|$)', line.replace("-->", " ")):
                labels[name] = label or labels.get(name, name)
                names.append(name)
            if "-->" in line:
                below.setdefault(names[0], []).append(names[1])
        lines = ["| room | uses |", "|---|---|"]
        short = {name: label.split(":")[0] for name, label in labels.items()}
        for name, label in labels.items():
            title, _, what = label.partition(": ")
            uses = ", ".join(short[one] for one in below.get(name, [])) or "–"
            lines.append(f"| **{title}**{': ' + what if what else ''} | {uses} |")
        return self.parse_text_to_nodes("\n".join(lines))


def write_math(self: Any, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML, which browsers draw without a script."""
    block = isinstance(node, nodes.math_block)
    code = re.sub(r"\\[bB]igg?[lrm]?(?![a-zA-Z])", "", node.astext())  # brackets grow by themselves
    code = re.sub(r"\\([td]?frac)\s*(\w)\s*(\w)", r"\\\1{\2}{\3}", code)  # the converter takes 12 for one number
    if block and ("&" in code or "\\\\" in code):
        code = f"\\begin{{aligned}}{code}\\end{{aligned}}"
    self.body.append(('<div class="math-block">{}</div>' if block else "{}").format(tex2mathml(code, as_block=block)))
    raise nodes.SkipNode


def table_of_markdown(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Write the tables of docstrings, which are Markdown's, as Sphinx reads them; and where an error is explained."""
    written: list[str] = []
    inside = False
    for line in lines:
        row = line.strip()
        if not (row.startswith("|") and row.endswith("|") and len(row) > 2):
            inside = False
            written.append(line)
            continue
        indent = line[: len(line) - len(line.lstrip())]
        if not inside:
            written += ["", f"{indent}.. list-table::", f"{indent}   :header-rows: 1", ""]
            inside = True
        if set(row) <= set("|-: "):
            continue
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        written += [f"{indent}   {'  -' if number else '* -'} {cell}" for number, cell in enumerate(cells)]
    lines[:] = written
    if what in {"exception", "class"} and name.rpartition(".")[2] in errors.__all__:
        short = name.rpartition(".")[2]
        lines += ["", f":doc:`What to do </docs/troubleshooting>`, under *{short}*.", ""]


def skip_fields(app: Sphinx, what: str, name: str, member: Any, skip: bool, options: object) -> bool | None:
    """Leave out the fields of named tuples, which are told of as attributes."""
    return True if (getattr(member, "__doc__", None) or "").startswith("Alias for field number") else None


TITLES = {
    "bench": "Milliseconds of a step",
    "claims/ablations": "Strengths tried before",
    "claims/claims": "The paper's findings, 32 seeds",
    "claims/dose": "How much noise",
    "map/map": "Where the noise helps",
    "labels/labels": "Which wrong labels are fitted",
    "r_drop/r_drop": "R-Drop and the penalty",
    "text/ptb": "The findings on text",
    "table_1/table_1": "The rows of the paper's first table",
    "models/models": "The paper's other models, once",
    "r_drop_text/r_drop_text": "R-Drop and Algorithm 2 on text",
    "text_tuned/text_tuned": "Tuned against tuned on text",
    "text_time/text_time": "LSTMs at equal passes and time",
    "transformer/transformer": "Tuned against tuned on a small transformer",
    "wikitext/wikitext": "The findings on WikiText-2",
    "tuned/tuned0": "Tuned against tuned, right labels",
    "tuned/tuned0_grid": "All configurations, right labels",
    "tuned/tuned0_time": "What tuning took, right labels",
    "tuned/tuned10": "Tuned against tuned, 10 % random labels",
    "tuned/tuned10_grid": "All configurations, 10 % random labels",
    "tuned/tuned10_time": "What tuning took, 10 % random labels",
    "tuned/tuned40": "Tuned against tuned, 40 % random labels",
    "tuned/tuned40_grid": "All configurations, 40 % random labels",
    "tuned/tuned40_time": "What tuning took, 40 % random labels",
    "remedies/remedies": "The whole curvature and generalized cross entropy",
    "step_costs/step_costs": "What a step costs, SAM among the methods",
    "negative/negative": "Regression",
    "time_to_quality/table": "Perplexity against the clock",
    "paper_small/orderings": "The paper's orderings at small size",
    "paper_small/table_1": "The paper's Table 1 at small size",
}


def title_of_record(app: Sphinx, page: str, source: list[str]) -> None:
    """Give a title to the tables that measurements write."""
    if page.startswith("examples/benchmarks/") and not re.match(r"\s*#\s", source[0]):
        short = page.removeprefix("examples/benchmarks/")
        source[0] = f"# {TITLES.get(short, short)}\n\n{source[0]}"


def arguments_of_init(_app: Sphinx, what: str, _name: str, obj: Any, *_: Any) -> tuple[str, str] | None:
    """Show what a callback takes, not the ``*args, **kwargs`` of the ``__new__`` that looks at the names.

    Returns:
        Its signature without types, which the list below it has; None for everything else.
    """
    if what != "class" or not issubclass(obj, SpellsArguments):
        return None
    _self, *taken = inspect.signature(obj.__init__).parameters.values()
    found = inspect.Signature([one.replace(annotation=inspect.Parameter.empty) for one in taken])
    return str(found), ""


def setup(app: Sphinx) -> None:
    """Add what Sphinx does not bring."""
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("autodoc-process-signature", arguments_of_init)
    app.connect("source-read", title_of_record)
    app.add_directive("mermaid", Mermaid)
    app.connect("autodoc-process-docstring", table_of_markdown)
    app.add_html_math_renderer("mathml", (write_math, None), (write_math, None))


myst_fence_as_directive = ["mermaid"]
