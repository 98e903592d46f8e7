"""A picture of a mix: what share each source had in each round, and how far the model was from the dense one on it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers too; markers tell them apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
STABLE = {"svg.hashsalt": "secateur"}  # the same bytes for the same mix


def draw_mix(mix: Mapping[str, Any]) -> Figure:
    """Two charts over optimizer steps: shares of the rounds, and degradation (or loss) before each and in the end.

    Args:
        mix: as `mix_record` gives it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    draw_shares(above, mix)
    draw_distances(below, mix)
    above.set(xlabel=None)
    above.set_title(f"{mix['kind']} mix", loc="right", fontsize="medium")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = below.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False)
    return figure


def draw_shares(axes: Axes, mix: Mapping[str, Any]) -> None:
    """What share of each round came from each source, over optimizer steps."""
    rounds = mix["rounds"]
    edges = [row["step"] for row in rounds] + [rounds[-1]["step"] + rounds[-1]["steps"]]
    middles = [(a + b) / 2 for a, b in pairwise(edges)]
    for name, dots in _styles(rounds):
        shares = [100 * row["sources"][name]["share"] or math.nan for row in rounds]  # a gap where it has none
        axes.stairs(shares, edges, baseline=None, color=dots["color"], linewidth=1.8)
        axes.plot(middles, shares, **(dots | {"linestyle": "none"}))
    axes.set(xlabel="optimizer steps", ylabel="share of the round [%]", ylim=(0, None))
    _mark_stages(axes, rounds, named=True)


def draw_distances(axes: Axes, mix: Mapping[str, Any]) -> None:
    """How far from the dense model on each source before each round and in the end; without a dense one, the loss."""
    rounds = mix["rounds"]
    measured = [*rounds, *([mix["end"]] if mix["end"] else [])]
    against_dense = all("degradation" in f for row in rounds for f in row["sources"].values())
    key, factor = ("degradation", 100) if against_dense else ("loss", 1)
    for name, dots in _styles(rounds):
        axes.plot([r["step"] for r in measured], [factor * r["sources"][name][key] for r in measured], **dots)
    told = "loss above the dense model's [%]" if against_dense else "held-out loss [nats per token]"
    axes.set(xlabel="optimizer steps", ylabel=told, ylim=(0, None) if against_dense else None)
    _mark_stages(axes, rounds, named=False)


def _styles(rounds: list[Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(source, how its line looks)."""
    for number, name in enumerate(rounds[0]["sources"]):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        yield name, {"color": colour, "linewidth": 1.8, "marker": marker, "markersize": 5, "label": name}


def _mark_stages(axes: Axes, rounds: list[Mapping[str, Any]], *, named: bool) -> None:
    """A line where a stage begins, and its name if asked for; nothing if there is one only."""
    begins = [row for before, row in zip([None, *rounds], rounds, strict=False) if not _same_stage(before, row)]
    if len(begins) < 2:
        return
    for row in begins:
        axes.axvline(row["step"], color="0.4", linestyle=":", linewidth=1)
        if named:
            axes.annotate(
                row["stage"], (row["step"], 1), xycoords=("data", "axes fraction"), xytext=(0, 4),
                textcoords="offset points", color="0.3",
            )  # fmt: skip


def _same_stage(before: Mapping[str, Any] | None, row: Mapping[str, Any]) -> bool:
    return before is not None and before["stage"] == row["stage"]


def save_mix(mix: Mapping[str, Any], file: Path) -> None:
    """Write the picture of a mix in the format that the file's name ends with."""
    from matplotlib import rc_context

    with rc_context(STABLE):
        draw_mix(mix).savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=150)
