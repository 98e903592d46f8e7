"""Reports and comparisons of runs, made from results files only: nothing is measured or computed again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from secateur.errors import ReportError, first_line
from secateur.report.comparison import Comparison, compare, comparison_pictures, comparison_table
from secateur.report.facts import NOT_MEASURED
from secateur.report.figures import Picture, pictures
from secateur.report.markdown import comparison_markdown, markdown
from secateur.report.page import page
from secateur.report.reading import Run, read_runs
from secateur.report.svg import to_png

__all__ = [
    "NOT_MEASURED", "Comparison", "Picture", "Run", "compare", "comparison_markdown", "comparison_pictures",
    "comparison_table", "drawn", "markdown", "page", "read_runs", "write_pngs", "write_text",
]  # fmt: skip

PAGE = "report.html"


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
        ReportError: it cannot be written.
    """
    temporary = file.with_name(f".{file.name}.part")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        raise ReportError(f"{file} cannot be written: {first_line(error)}; choose another place") from error


def drawn(runs: Sequence[Run]) -> list[tuple[str, Picture]]:
    """Every figure of these runs, and of their comparison if they are several, with a name for its file."""
    found = [(f"{run.name}-{picture.name}", picture) for run in runs for picture in pictures(run)]
    return found + ([(picture.name, picture) for picture in comparison_pictures(runs)] if len(runs) > 1 else [])


def write_pngs(figures: Sequence[tuple[str, Picture]], folder: Path) -> list[Path]:
    """Figures as PNG files in a folder, which is made if need be.

    Raises:
        ReportError: they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = [folder / f"{name.replace('/', '-')}.png" for name, _ in figures]
        for file, (_, picture) in zip(files, figures, strict=True):
            to_png(picture.figure, file)
    except OSError as error:
        raise ReportError(f"{folder} cannot be written: {first_line(error)}; choose another folder") from error
    return files
