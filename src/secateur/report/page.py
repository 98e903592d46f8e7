"""One self-contained HTML page for a run or a comparison: no scripts, nothing fetched."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from secateur.report.checks import Check, checks, verdict
from secateur.report.choosing import Chosen, chosen
from secateur.report.comparison import compare, comparison_pictures, comparison_table
from secateur.report.facts import Headline, Row, headlines, kind_name, summary, table, title
from secateur.report.figures import Picture, pictures
from secateur.report.reading import Run
from secateur.report.repeating import Repeat, repeating
from secateur.report.schema import Samples
from secateur.report.svg import to_svg

DETAILED = 4  # of more runs a page holds the comparison only, which keeps it small


@dataclass(frozen=True)
class Figure:
    """A picture in a page."""

    name: str
    svg: Markup
    title: str
    caption: str


@dataclass(frozen=True)
class Section:
    """Everything a page tells of one run."""

    id: str
    name: str
    title: str
    summary: str
    headlines: list[Headline]
    checks: list[Check]
    stages: list[str]
    rows: list[Row]
    cut: list[list[str]]
    chosen: Chosen | None
    figures: list[Figure]
    samples: Samples | None
    repeat: Repeat


def page(runs: Sequence[Run]) -> str:
    """The report of these runs as HTML; of more than one, the comparison comes first."""
    environment = Environment(
        loader=PackageLoader("secateur.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    compared = compare(runs) if len(runs) > 1 else None
    detailed = runs if len(runs) <= DETAILED else []
    head, rows = comparison_table(compared) if compared else ([], [])
    return environment.get_template("page.html.jinja").render(
        title=title(runs[0]) if compared is None else f"{len(runs)} runs compared",
        compared=compared,
        head=head,
        rows=rows,
        curves=_figures("compared", comparison_pictures(runs)) if compared else [],
        outlines=[
            (run.name, summary(run), headlines(run), verdict(run)) for run in runs if run.results.knowledge is None
        ],
        sections=[_section(f"run-{n}", run) for n, run in enumerate(detailed, 1)],
        left_out=len(runs) - len(detailed),
        version=runs[0].results.protocol.versions.get("secateur"),
    )


def _section(name: str, run: Run) -> Section:
    stages, rows = table(run)
    return Section(
        id=name,
        name=run.name,
        title=title(run),
        summary=summary(run),
        headlines=headlines(run),
        checks=checks(run),
        stages=stages,
        rows=rows,
        cut=_cut(run),
        chosen=chosen(run),
        figures=_figures(name, pictures(run)),
        samples=run.samples,
        repeat=repeating(run),
    )


def _cut(run: Run) -> list[list[str]]:
    """What went of each kind, as cells."""
    return [
        [
            kind_name(kind),
            f"{share.removed:,} of {share.units:,}",
            f"{share.share:.1%}",
            "whatever the budget needs" if share.asked is None else f"{share.asked:.1%}",
            f"{share.parameters:,}",
        ]
        for kind, share in run.kinds.items()
    ]


def _figures(prefix: str, drawn: Sequence[Picture]) -> list[Figure]:
    found = []
    for number, picture in enumerate(drawn, 1):
        name = f"{prefix}-{number}-{re.sub(r'[^a-z0-9]+', '-', picture.name.lower())}"
        svg = to_svg(picture.figure, name, picture.title, picture.caption)
        found.append(Figure(name, svg, picture.title, picture.caption))
    return found
