"""An audit as a picture: for each kind the rank correlation of every criterion, with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from secateur.evaluation.audit import Agreement
from secateur.evaluation.perplexity import Perplexity
from secateur.evaluation.picture import COLOURS, MARKERS, NAMES, check_picture

LABELS = {"alone": "units alone", "sets": "random sets"}
WIDTH, LINE = 8.0, 0.34  # inches


def draw_audit(found: Sequence[Agreement], path: Path, title: str, dense: Perplexity) -> None:
    """Write the picture; its format goes by the ending of the name. Right of zero a criterion ranks better than chance.

    Raises:
        KnowledgeError: the ending names no format of pictures.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(a.kind for a in found))
    criteria = list(dict.fromkeys(a.criterion for a in found))
    figure = Figure(figsize=(WIDTH, 1.7 + LINE * len(criteria) * len(kinds)), layout="constrained")
    panels = figure.subplots(len(kinds), 1, sharex=True, squeeze=False).flatten()
    for panel, kind in zip(panels, kinds, strict=True):
        panel.axvline(0.0, color="0.5", linewidth=0.8, linestyle="--")
        for shift, (how, colour, marker) in zip(
            (-0.15, 0.15), zip(LABELS, COLOURS, MARKERS, strict=False), strict=True
        ):
            mine = {a.criterion: a.spearman for a in found if (a.kind, a.how) == (kind, how)}
            for place, criterion in enumerate(criteria):
                if criterion in mine:
                    figures = mine[criterion]
                    panel.plot([figures.low, figures.high], [place + shift] * 2, color=colour, linewidth=1.4)
                    panel.plot(figures.value, place + shift, marker, color=colour, markersize=5)
        panel.set_yticks(range(len(criteria)), criteria)
        panel.invert_yaxis()
        panel.set_xlim(-1, 1)
        panel.set_title(NAMES.get(kind, kind), fontsize=9)
        panel.grid(True, axis="x", color="0.9", linewidth=0.6)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[-1].set_xlabel("Spearman rank correlation of score and change of the loss, with its 95 % interval")
    _key(figure, {a.how for a in found})
    below = f"{dense.text}, {dense.tokens:,} tokens in windows of {dense.seq_len}; dense perplexity {dense.value:.2f}"
    figure.suptitle(f"{title}: what criteria say, and what removal costs\n{below}", fontsize=11)
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)
    temporary.replace(path)


def _key(figure, hows) -> None:  # type: ignore[no-untyped-def]
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=5, label=LABELS[how])
        for how, colour, marker in zip(LABELS, COLOURS, MARKERS, strict=False)
        if how in hows
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
