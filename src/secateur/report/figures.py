"""The figures of one run. Each is drawn small, so that it can be read on a phone, and only if the results hold it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from secateur.evaluation import Knowledge
from secateur.evaluation.picture import draw_family, families_of, key_of_lines
from secateur.plan import parse_ranges
from secateur.recovery.picture import MARKERS, draw_distances, draw_shares
from secateur.recovery.rank_picture import draw_modules, draw_rank
from secateur.report.facts import kind_name
from secateur.report.reading import Run
from secateur.report.schema import Importance, Training, Width
from secateur.report.svg import SERIES, WIDTH, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = 2.6  # inches of height


@dataclass(frozen=True)
class Picture:
    """A figure with the words that belong to it.

    Attributes:
        name: for files and element ids.
        title: what it shows.
        caption: how to read it, and what it says.
        figure: drawn.
    """

    name: str
    title: str
    caption: str
    figure: Figure


def pictures(run: Run) -> list[Picture]:
    """Every figure that the results of a run allow."""
    with styled():
        return [picture for draw in DRAWN for picture in draw(run)]


def new_figure(rows: int = 1, height: float = PANEL, **how: Any) -> tuple[Figure, list[Axes]]:
    """An empty figure of some panels below each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height * rows))
    return figure, list(figure.subplots(rows, 1, squeeze=False, **how)[:, 0])


def legend(figure: Figure, axes: Axes, columns: int = 2) -> None:
    """What the lines mean, below all panels."""
    handles, names = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, names, loc="outside lower left", ncols=min(columns, len(names)))


def whole_numbers(axes: Axes) -> None:
    """Mark layers and steps at whole numbers only."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def plain_log(axes: Axes) -> None:
    """A logarithmic vertical axis whose numbers are plain text."""
    from matplotlib.ticker import FuncFormatter

    axes.set_yscale("log")
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_formatter(plain if high < 10 * low else "")


def styles(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each name."""
    return {
        name: {"color": SERIES[n % len(SERIES)], "marker": MARKERS[n % len(MARKERS)]} for n, name in enumerate(names)
    }


def _by_family(rows: Sequence[Any]) -> dict[str, list[Any]]:
    """Rows of groups that play the same part in each layer, under a name: the kind, and more where kinds are several.

    Groups that span layers are left out.
    """
    families: dict[tuple[str, str], list[Any]] = {}
    for row in (r for r in rows if r.layer is not None):
        families.setdefault((row.kind, re.sub(r"\.\d+(?=[./]|$)", ".*", row.group)), []).append(row)
    kinds = [kind for kind, _ in families]
    return {
        kind_name(kind) if kinds.count(kind) == 1 else f"{kind_name(kind)}, {family.rpartition('/')[0]}": found
        for (kind, family), found in families.items()
    }


def _widths(run: Run) -> Iterator[Picture]:
    """Units kept in each layer."""
    families = _by_family(run.widths)
    if families:
        figure, (axes,) = new_figure()
        for (name, rows), style in zip(families.items(), styles(list(families)).values(), strict=True):
            layers = sorted({w.layer for w in rows})
            shares = [_share([w for w in rows if w.layer == layer]) for layer in layers]
            axes.plot(layers, shares, label=name, **style)
        axes.set(xlabel="layer", ylabel="units kept [%]", ylim=(0, 105))
        whole_numbers(axes)
        legend(figure, axes)
        yield Picture("widths", "Widths kept by layer", _told_widths(families), figure)
    for row in (w for w in run.widths if w.which is not None):
        kept = set(parse_ranges(row.which or ""))
        figure, (axes,) = new_figure(height=1.5)
        colours = [SERIES[0] if unit in kept else SERIES[1] for unit in range(row.units)]
        axes.bar(range(row.units), [1] * row.units, color=colours, width=0.8)
        for unit in sorted(set(range(row.units)) - kept):
            axes.annotate("removed", (unit, 0.5), ha="center", va="center", rotation=90, color="white")
        axes.set(xlabel=row.kind, yticks=[])
        whole_numbers(axes)
        gone = row.units - row.kept
        told = f"{gone} of {row.units} {row.kind}s went; those that stay are {row.which}."
        yield Picture(f"which-{row.kind}", f"Which {row.kind}s stay", told, figure)


def _share(rows: Sequence[Width]) -> float:
    return 100 * sum(w.kept for w in rows) / sum(w.units for w in rows)


def _told_widths(families: Mapping[str, Sequence[Width]]) -> str:
    """How many units of each family stay, least and most over the layers."""
    told = []
    for name, rows in families.items():
        kept, units = sorted(w.kept for w in rows), sorted(w.units for w in rows)
        stay = f"{kept[0]:,}" if kept[0] == kept[-1] else f"{kept[0]:,} to {kept[-1]:,}"
        of = f"{units[0]:,}" if units[0] == units[-1] else f"{units[0]:,} to {units[-1]:,}"
        told.append(f"{name}: {stay} of {of} in each layer")
    return "; ".join(told) + "."


def _importance(run: Run) -> Iterator[Picture]:
    """The spread of scores in each layer."""
    families: dict[str, list[Importance]] = _by_family(run.importance)
    if not families:
        return
    figure, panels = new_figure(len(families), height=2.0, sharex=True)
    for axes, (name, rows), style in zip(panels, families.items(), styles(list(families)).values(), strict=True):
        rows = sorted(rows, key=lambda row: row.layer or 0)
        layers = [row.layer or 0 for row in rows]
        colour = style["color"]
        axes.fill_between(layers, [r.q1 for r in rows], [r.q3 for r in rows], color=colour, alpha=0.25, linewidth=0)
        axes.plot(layers, [r.median for r in rows], **style)
        if all(row.q1 > 0 for row in rows):
            plain_log(axes)
        axes.set(title=name, ylabel="score")
        whole_numbers(axes)
    panels[-1].set_xlabel("layer")
    criterion = run.cuts[-1].protocol.settings.get("criterion") if run.cuts else None
    by = f"by {criterion}" if criterion else f"by {run.method}"
    by = "by the criterion that was measured to cost less in each group" if criterion == "measured" else by
    caption = f"Scores {by} before the first units went: the median over a layer's units, and its quartiles shaded."
    yield Picture("importance", "Importance by layer", caption, figure)


def _sparsity(run: Run) -> Iterator[Picture]:
    """Perplexity of each stage at its sparsity."""
    texts = {name: t for name, t in run.texts.items() if t.dense is not None and run.last_stage}
    if run.sparsity is None or not texts:
        return
    figure, (axes,) = new_figure()
    for (name, text), style in zip(texts.items(), styles(list(texts)).values(), strict=True):
        for stage in (s for s in run.stages if s != "dense" and text.at(s) is not None):
            dashed = {} if stage == run.last_stage else {"linestyle": ":", "markerfacecolor": "none"}
            label = f"{name}, {stage}" if len(texts) > 1 else stage
            ends = [text.dense or 0.0, text.at(stage) or 0.0]
            axes.plot([0, 100 * run.sparsity], ends, label=label, **(style | dashed))
    axes.set(xlabel="parameters removed [%]", ylabel="perplexity")
    axes.set_xlim(left=-2)
    legend(figure, axes)
    told = "From the dense model (0 %) to what this run made. Between the points nothing was measured."
    yield Picture("perplexity", "Perplexity against sparsity", told, figure)


def _tradeoff(run: Run) -> Iterator[Picture]:
    """What other budgets were expected to cost."""
    cut = run.cuts[-1] if run.cuts else None
    if cut is None or not cut.tradeoff:
        return
    shares, losses = zip(*((0.0, 0.0), *cut.tradeoff), strict=True)
    gone, counted = cut.params["sparsity"], "parameters"
    if cut.cost:
        gone, counted = cut.cost.sparsity, cut.cost.what.replace("macs", "MACs")
    figure, (axes,) = new_figure()
    axes.plot([100 * share for share in shares], losses, label="expected", **styles(["expected"])["expected"])
    if cut.cost or (cut.tier or {}).get("chosen") != "padded":  # zeros of padding count as parameters
        axes.axvline(100 * gone, color=SERIES[1], linestyle=":", label="this cut")
    axes.set(xlabel=f"{counted} removed [%]", ylabel="loss above uncut\n[nats/token]")
    axes.set_xlim(left=-2)
    legend(figure, axes)
    told = (
        "What the cheapest widths, with the hidden size as it was, were expected to cost before any training that "
        "follows: the sum of what the groups cost one by one. Losses do more than add up where much goes; there it is "
        "too low."
    )
    yield Picture("tradeoff", "What other budgets would cost", told, figure)


def _losses(run: Run) -> Iterator[Picture]:
    """Training loss over steps, and what went meanwhile."""
    for name, training in run.trainings.items():
        if losses := training.losses:
            figure, (axes,) = new_figure()
            axes.plot(*zip(*losses, strict=True), color=SERIES[0])
            axes.set(xlabel="optimizer steps", ylabel="training loss [nats/token]")
            whole_numbers(axes)
            what = "recovery" if name == "recovery" else "training"
            caption = f"Loss on the {what} data at {len(losses)} steps of the log; {_training(training)}."
            yield Picture(f"loss-{name}", f"Loss over the steps of {what}", caption, figure)
        if history := training.sparsity:
            figure, (axes,) = new_figure()
            steps = [0, *(row["step"] for row in history)]
            axes.step(steps, [0, *(100 * row["sparsity"] for row in history)], where="post", color=SERIES[0])
            axes.set(xlabel="optimizer steps", ylabel="parameters masked [%]", ylim=(0, None))
            whole_numbers(axes)
            times = sum(a["sparsity"] < b["sparsity"] for a, b in pairwise([{"sparsity": 0.0}, *history]))
            told = f"Units went {times} times while the adapters trained."
            yield Picture("sparsity", "Sparsity over the steps of training", told, figure)


def _training(training: Training) -> str:
    s = training.settings
    whole = f", {parts} whole" if (parts := " and ".join(s.get("also_train", ()))) else ""
    batches = f"batches of {s.get('batch_size')} sequences of up to {s.get('seq_len')} tokens"
    return f"LoRA of rank {s.get('rank')}{whole}, {batches}"


def _mix(run: Run) -> Iterator[Picture]:
    """What each round was trained on, and how far from the dense model it left each source."""
    for name, mix in ((n, t.mix) for n, t in run.trainings.items() if t.mix):
        parts = f"A {mix['kind']} mix: each source's part of a round."
        held_out = "On held-out examples of each source, before every round and in the end; lower is better."
        for key, draw, title, caption in (
            ("shares", draw_shares, "Mix of the data over rounds", parts),
            ("distances", draw_distances, "Distance from the dense model by source", held_out),
        ):
            figure, (axes,) = new_figure()
            draw(axes, mix)
            if key == "distances" and "dense" in axes.get_ylabel():
                axes.set_ylabel("loss above dense [%]")
            legend(figure, axes)
            yield Picture(f"mix-{key}-{name}", title, caption, figure)


def _ranks(run: Run) -> Iterator[Picture]:
    """The rank of an adapter that was pruned, over steps and by module."""
    for training in (t for t in run.trainings.values() if t.ranks):
        figure, (axes,) = new_figure()
        draw_rank(axes, training.ranks, [step for step, _ in training.losses])
        first, last = training.ranks[0], training.ranks[-1]
        told = f"Mean rank of a module from {first['mean']:g} to {last['mean']:g}."
        yield Picture("rank", "Rank over time", told, figure)
    if len(set(run.results.ranks.values())) > 1:
        figure, (axes,) = new_figure()
        draw_modules(axes, run.results.ranks)
        yield Picture("rank-modules", "Rank of each module in the end", "Modules in the order of the model.", figure)


def _knowledge(run: Run) -> Iterator[Picture]:
    """What cutting each group alone does to perplexity, where that was measured or decided what to leave whole."""
    found, sensitive = run.results.knowledge, list(run.results.most_sensitive)
    for step in run.since_cut:
        if found is None and step.protocol.knowledge and "analysis" in step.protocol.knowledge:
            found, sensitive = step.protocol.knowledge["analysis"], step.protocol.knowledge["protected"]
    if found is None:
        return
    knowledge = Knowledge.from_json(found, str(run.place))
    families = families_of(knowledge)
    figure, panels = new_figure(len(families), height=2.4)
    for axes, (family, trials) in zip(panels, families.items(), strict=True):
        draw_family(axes, knowledge, family, trials, sensitive)
        axes.set_title(kind_name(trials[0].kind))
        axes.set_ylabel("above dense [%]")
    figure.legend(handles=key_of_lines(knowledge, sensitive), loc="outside lower left", ncols=2)
    told = (
        f"Perplexity above the dense one ({knowledge.dense.value:.2f} on {knowledge.dense.text}) when a part of one "
        "group alone is cut. Rings mark the most sensitive groups."
    )
    yield Picture("knowledge", "Knowledge distribution", told, figure)


DRAWN: tuple[Callable[[Run], Iterator[Picture]], ...] = (
    _widths, _sparsity, _tradeoff, _importance, _losses, _mix, _ranks, _knowledge,
)  # fmt: skip
