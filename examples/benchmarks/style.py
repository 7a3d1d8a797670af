"""One colour, line and marker for every method, the same in every figure.

Colours are Okabe and Ito's, and one of Tol's, which can be told apart with any kind of colour vision; a line style or
a marker says the same once more. What averages the noise away or leaves it out is dashed, what has noise is solid.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["STYLES", "finish", "label_of", "new_figure", "plain_label", "save", "style_of", "style_of_row"]

BLACK, ORANGE, BLUE, GREEN = "#000000", "#E69F00", "#0072B2", "#009E73"
RED, PINK, SKY, GREY, WINE = "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F", "#882255"

STYLES: dict[str, tuple[str, str, str]] = {  # colour, line, marker
    "none": (GREY, ":", "x"),
    "dropout": (BLACK, "-", "o"),
    "DROPOUT_k": (ORANGE, "--", "s"),
    "DROPOUT_k + 3.1": (WINE, "-", "D"),
    "DROPOUT_k + xi": (RED, "-", "^"),
    "xi": (RED, ":", "v"),
    "R": (BLUE, "--", "s"),
    "Algorithm 2": (GREEN, "-", "o"),
    "R, quarter": (BLUE, ":", "v"),
    "Algorithm 2, quarter": (GREEN, ":", "v"),
    "curvature full": (SKY, "--", "P"),
    "identity": (PINK, "--", "s"),
    "loss Jacobian": (PINK, "-.", "D"),
    "loss Jacobian + xi": (PINK, ":", "^"),
    "l2": (GREY, "--", "v"),
    "label smoothing": (GREY, "-.", "<"),
    "R-Drop": (PINK, "-", "o"),
    "SAM": (SKY, "-", "^"),
    "SAM with dropout": (SKY, "-.", "<"),
    "noise stability": (SKY, ":", "D"),
    "mixup": (GREY, "-", "D"),
    "generalized CE": (RED, "--", "<"),
    "generalized CE with dropout": (RED, "-.", "s"),
}
LABELS = {
    "dropout": "dropout (DROPOUT_1)",
    "xi": r"$\xi$ alone",
    "R": r"$R_\mathrm{approx}$",
    "R, quarter": r"$R_\mathrm{approx}$, quarter of the rows",
    "Algorithm 2, quarter": "Algorithm 2, quarter of the rows",
    "l2": r"$\ell_2$ (weight decay)",
    "curvature full": "whole curvature",
    "noise stability": "noise on the weights",
    "generalized CE": "generalized cross entropy",
    "generalized CE with dropout": "generalized cross entropy with dropout",
}


def style_of(method: str) -> dict[str, str]:
    """Return colour, line style and marker of a method, as arguments of matplotlib."""
    color, line, marker = STYLES[method]
    return {"color": color, "linestyle": line, "marker": marker}


ROWS = {  # names of configurations: the method
    "dropout_1": "dropout",
    "r_approx": "R",
    "r_approx_xi": "Algorithm 2",
    "algorithm_2": "Algorithm 2",
    "algorithm_2_economical": "Algorithm 2, quarter",
    "r_approx_economical": "R, quarter",
    "loss_jacobian": "loss Jacobian",
    "loss_jacobian_xi": "loss Jacobian + xi",
}


def style_of_row(row: str) -> dict[str, str]:
    """Return colour, line and label of a configuration, by its name; fewer draws than eight have other dashes."""
    method, parameters = ROWS.get(row, row), {}
    k, _, noise = row.removeprefix("dropout_").partition("_")
    if k.isdigit() and k != "1":
        method = {"": "DROPOUT_k", "xi": "DROPOUT_k + xi", "noise": "DROPOUT_k + 3.1"}[noise]
        parameters = {"k": int(k)}
    style = style_of(method)
    line = {"2": ":", "4": "-."}.get(k, style["linestyle"])
    return {"color": style["color"], "linestyle": line, "label": label_of(method, parameters)}


def label_of(method: str, parameters: dict[str, Any] | None = None) -> str:
    """Return what a figure calls a method: with its draws, or its dose of noise, where it has one."""
    k = (parameters or {}).get("k")
    label = LABELS.get(method, method).replace("DROPOUT_k", f"DROPOUT_{k}" if k else "DROPOUT_k")
    label += f" (noise {parameters['noise']:g})" if parameters and "noise" in parameters else ""
    return label.replace("3.1", "noise of section 3.1").replace(" xi", r" $\xi$")


def plain_label(method: str, parameters: dict[str, Any], strength: bool = False) -> str:
    """Return what a table calls a method: with its draws, and if `strength`, with its other parameters."""
    rest = ", ".join(f"{name} {value:g}" for name, value in parameters.items() if name != "k")
    name = {"dropout": "DROPOUT_1", "l2": "ℓ2"}.get(method, method).replace(
        "DROPOUT_k", f"DROPOUT_{parameters.get('k')}"
    )
    name = name.replace("3.1", "noise of 3.1").replace("xi", "ξ")
    return f"{name} ({rest})" if rest and strength else name


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def finish(axes: Any) -> None:
    """Take off the frame's upper and right side and draw a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), dpi=150)
