"""Figures by matplotlib as SVG that belongs to a page: text stays text, colours follow its light or dark theme."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 4.6  # inches; drawn for the width of a phone, so that text is readable there
INK, MUTED, GRID = "#1b1f24", "#57606a", "#d8dee4"
# Okabe and Ito's colours, told apart by colour-blind readers too.
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# What a colour is called in the page's style sheet, where each has a light and a dark form. The last ones are greys
# of charts that are also drawn elsewhere.
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    **{colour.lower(): f"series-{number}" for number, colour in enumerate(SERIES, 1)},
    "#808080": "muted",
    "#e5e5e5": "grid",
    "#b0b0b0": "grid",
    "#666666": "muted",
    "#4c4c4c": "muted",
}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "secateur",  # the same bytes for the same figures
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.parse_math": False,  # names of runs and texts are not formulas
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "figure.constrained_layout.use": True,
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the look of reports while the block runs."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        yield


def to_svg(figure: Figure, name: str, title: str, description: str) -> Markup:
    """The figure as an `<svg>` element to stand in a page.

    Args:
        name: of the element, unique in the page; ids inside begin with it.
        title, description: read out in place of the picture.
    """
    buffer = io.BytesIO()
    with styled(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's fonts have it
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\b(id=")([^"]+)"', rf'\1{name}-\2"', text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{name}-", text)
    text = re.sub(r"#[0-9a-fA-F]{6}\b(?=[;\"])", lambda found: _variable(found.group().lower()), text)
    text = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "var(--font)", text)
    box = re.search(r'viewBox="[^"]+"', text)
    assert box is not None
    head = (
        f'<svg class="chart" {box.group()} role="img" aria-labelledby="{name}-title {name}-desc" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>'
    )
    body = text[text.index(">") + 1 :]
    return Markup(head + re.sub(r"\s*\n\s*", "\n", body).strip())


def _variable(colour: str) -> str:
    """A colour of the page's theme for one of ours."""
    return f"var(--{VARIABLES[colour]})" if colour in VARIABLES else colour


def to_png(figure: Figure, file: Path) -> None:
    """Write the figure for papers: in light colours, 300 dots per inch."""
    temporary = file.with_name(f".{file.name}.part")
    with styled():
        figure.savefig(temporary, format="png", dpi=300, facecolor="white", metadata={"Software": None})
    temporary.replace(file)
