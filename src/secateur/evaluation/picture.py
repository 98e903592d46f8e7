"""A knowledge distribution as a picture: a panel for each family of groups, layer by layer, a line for each ratio."""

from __future__ import annotations

from collections.abc import Collection
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import KnowledgeError
from secateur.evaluation.distribution import Knowledge, Trial
from secateur.groups import Group

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".svg", ".png", ".pdf")
# Of Okabe and Ito, which the colour-blind tell apart; the shapes tell ratios apart in grey.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v")
COLUMNS = 2
PANEL = (5.2, 3.0)  # inches
NAMES = {
    "ffn_channel": "FFN channels",
    "expert_channel": "channels of experts",
    "attention_head": "attention heads",
    "kv_group": "KV heads with their queries",
    "query_head": "query heads",
}


def check_picture(path: Path) -> None:
    """Make sure that a picture can be written under this name.

    Raises:
        KnowledgeError: its ending names no format of pictures.
    """
    if path.suffix.lower() not in FORMATS:
        raise KnowledgeError(f"{path} names no format of pictures; let it end in {', '.join(FORMATS)}")


def draw(knowledge: Knowledge, path: Path, title: str, protected: Collection[str] = ()) -> None:
    """Write the picture; its format goes by the ending of the name.

    By how many percent perplexity lies above the dense one, on a scale that all panels share, logarithmic beyond one
    percent and linear within. Of several groups of a family
    in one layer each is a point, and the line goes through their means. Groups to be protected have a ring.

    Raises:
        KnowledgeError: the ending names no format of pictures.
    """
    check_picture(path)
    from matplotlib.figure import Figure

    families = families_of(knowledge)
    columns = min(COLUMNS, len(families))
    rows = -(-len(families) // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    for panel, (family, trials) in zip(panels, families.items(), strict=False):
        draw_family(panel, knowledge, family, trials, protected)
    for panel in panels[len(families) :]:
        panel.remove()
    for panel in panels[: len(families) : columns]:
        panel.set_ylabel("perplexity above dense [%]")
    handles = key_of_lines(knowledge, protected)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    dense = knowledge.dense
    below = f"{dense.text}, {dense.tokens:,} tokens in windows of {dense.seq_len}; dense perplexity {dense.value:.2f}"
    figure.suptitle(f"{title}: each group cut alone\n{below}", fontsize=11)
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)
    temporary.replace(path)


def families_of(knowledge: Knowledge) -> dict[str, list[Trial]]:
    """The trials of each family of groups, in the order of the model."""
    families: dict[str, list[Trial]] = {}
    for trial in knowledge.trials:
        families.setdefault(Group(trial.group, trial.kind, trial.units).family, []).append(trial)
    return families


def draw_family(
    panel: Axes, knowledge: Knowledge, family: str, trials: list[Trial], protected: Collection[str]
) -> None:
    """One family: a line for each ratio over the layers."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for ratio, colour, marker in _styles(knowledge):
        at: dict[int, list[float]] = {}
        for trial in (t for t in trials if t.ratio == ratio):
            at.setdefault(trial.layer or 0, []).append(_percent(knowledge, trial))
            if trial.group in protected:
                place = (trial.layer or 0, _percent(knowledge, trial))
                panel.plot(*place, "o", markersize=11, markerfacecolor="none", markeredgecolor="black")
        points = [(layer, value) for layer, values in at.items() for value in values]
        panel.plot(*zip(*points, strict=True), marker, color=colour, markersize=5)
        panel.plot(sorted(at), [sum(at[layer]) / len(at[layer]) for layer in sorted(at)], color=colour, linewidth=1.4)
    panel.axhline(0.0, color="0.5", linewidth=0.8, linestyle="--")
    panel.set_yscale("symlog", linthresh=1.0, linscale=0.6)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    layered = trials[0].layer is not None
    panel.set_xlabel("layer" if layered else "all layers together")
    if not layered:
        panel.set_xticks([])
    panel.set_title(f"{NAMES.get(trials[0].kind, trials[0].kind)}\n{family}", fontsize=9)
    panel.grid(True, which="major", color="0.9", linewidth=0.6)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _percent(knowledge: Knowledge, trial: Trial) -> float:
    """By how many percent perplexity lies above the dense one."""
    return 100 * (knowledge.ratio(trial) - 1)


def _styles(knowledge: Knowledge) -> list[tuple[float, str, str]]:
    """(ratio, colour, marker), the smallest ratio first."""
    ratios = sorted({trial.ratio for trial in knowledge.trials})
    return list(zip(ratios, cycle(COLOURS), cycle(MARKERS), strict=False))


def key_of_lines(knowledge: Knowledge, protected: Collection[str]) -> list[Any]:
    """What lines and rings mean."""
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=colour, marker=marker, markersize=5, label=f"{ratio:.0%} of the units cut")
        for ratio, colour, marker in _styles(knowledge)
    ]
    ring = Line2D([], [], linestyle="", marker="o", markersize=11, markerfacecolor="none", markeredgecolor="black")
    ring.set_label("most sensitive")
    return [*lines, *([ring] if protected else [])]
