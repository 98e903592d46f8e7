"""A picture of an adapter that was pruned: its rank over the steps, the loss, and the ranks that modules end with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.recovery.picture import COLOURS, MARKERS, STABLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_ranks(record: Mapping[str, Any]) -> Figure:
    """Charts below each other: rank over steps (mean, least and most), loss if there is one, and ranks by module.

    The last one is left out where all modules have the same rank.

    Args:
        record: `history`, rows with step, mean, least and most; `losses`, rows with step and loss; `final`, module ->
            rank.
    """
    from matplotlib.figure import Figure

    uneven = len(set(record["final"].values())) > 1
    count = 1 + bool(record["losses"]) + uneven
    figure = Figure(figsize=(8, 2.8 * count), layout="constrained")
    charts = list(figure.subplots(count, 1, squeeze=False)[:, 0])
    draw_rank(charts[0], record["history"], [row["step"] for row in record["losses"]])
    if record["losses"]:
        steps, losses = zip(*((row["step"], row["loss"]) for row in record["losses"]), strict=True)
        charts[1].plot(steps, losses, color=COLOURS[1], linewidth=1.8)
        charts[1].set(xlabel="optimizer steps", ylabel="training loss [nats per token]")
        charts[1].sharex(charts[0])
    if uneven:
        draw_modules(charts[-1], record["final"])
    for axes in charts:
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_rank(axes: Axes, history: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> None:
    """Rank over steps; ranks hold from one removal to the next."""
    end = max([history[-1]["step"], *steps])
    rows = [*history, {**history[-1], "step": end}]
    at = [row["step"] for row in rows]
    least, most = ([row[k] for row in rows] for k in ("least", "most"))
    if least != most:
        axes.fill_between(at, least, most, step="post", color=COLOURS[0], alpha=0.2, label="least to most")
    axes.step(at, [row["mean"] for row in rows], where="post", color=COLOURS[0], linewidth=1.8, label="mean")
    axes.set(xlabel="optimizer steps" if steps else "removals", ylabel="rank of a module", ylim=(0, None))
    axes.legend(frameon=False)


def draw_modules(axes: Axes, final: Mapping[str, int]) -> None:
    """One line for the modules of the same last name, in their order in the model."""
    kinds: dict[str, list[int]] = {}
    for name, rank in final.items():
        kinds.setdefault(name.rpartition(".")[2], []).append(rank)
    for number, (kind, ranks) in enumerate(kinds.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axes.plot(ranks, color=colour, marker=marker, markersize=5, linewidth=1.2, label=kind)
    axes.set(xlabel="module of its kind, from the first to the last", ylabel="rank in the end", ylim=(0, None))
    axes.legend(frameon=False, ncols=min(4, len(kinds)), fontsize="small")


def save_ranks(record: Mapping[str, Any], file: Path) -> None:
    """Write the picture in the format that the file's name ends with."""
    from matplotlib import rc_context

    with rc_context(STABLE):
        draw_ranks(record).savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=150)
