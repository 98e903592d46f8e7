"""The part of docs/results.md on zero-shot tasks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Data = Mapping[str, Any]


def zero_shot(found: Iterable[Data]) -> list[str]:
    """The seven tasks on every model, and how they agree with lm-eval."""
    reports = list(found)
    if not reports:
        return []
    tasks, p = list(reports[0]["tasks"]), reports[0]["protocol"]
    of = ", ".join(f"{name} {score['of']:,}" for name, score in reports[0]["tasks"].items())
    harness = p["versions"]["lm_eval"]
    lines = [
        "## Zero-shot tasks",
        "",
        f"`benchmarks/zero_shot.py`: the first {p['limit']} items of each local file (halves of the official splits: "
        f"{of}), no examples, {p['threads']} thread(s), batches of {p['batch_size']}; lm-eval {harness}. "
        "`acc_norm` where the name says so, else `acc`: LLM-Pruner's choice. One standard error. These models know",
        "only stories, and sit at chance: the table shows that the machinery agrees with lm-eval, not what pruning",
        "costs.",
        "",
        "| model | " + " | ".join(_head(score) for score in reports[0]["tasks"].items()) + " | average |",
        "| --- |" + " ---: |" * (len(tasks) + 1),
    ]
    for data in reports:
        cells = [_figure(data["tasks"][name]) for name in tasks]
        lines.append(f"| {data['model']['name']} | {' | '.join(cells)} | {_figure(data['average'])} |")
    lines += [
        "",
        "Beside lm-eval run directly, on its own definitions and another copy of the model: items with the same prompt "
        "and the same figures, of all that lm-eval can ask (it gives up on items of which a token swallows an answer); "
        "the largest difference of log-likelihoods; items cut at their beginning to fit the positions; seconds that "
        "the seven tasks took.",
        "",
        "| model | parameters | dtype | BOS | same items | largest difference | lm-eval gives up | cut | seconds |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for data in reports:
        agreed = data["agreement"].values()
        same, items, out = (sum(a[key] for a in agreed) for key in ("same", "items", "left_out"))
        difference = max(a["largest_difference"] for a in agreed)
        cut = sum(score["truncated"] for score in data["tasks"].values())
        lines.append(
            f"| {data['model']['name']} | {data['model']['parameters']:,} | {data['protocol']['dtype']} | "
            f"{'yes' if data['protocol']['bos'] else 'no'} | {same:,} of {items:,} | "
            f"{difference:.0e} | {out} | {cut} | {data['seconds']:.0f} |"
        )
    return [*lines, ""]


def _head(named: tuple[str, Data]) -> str:
    name, score = named
    return name if score["metric"] == "acc" else f"{name} ({score['metric']})"


def _figure(score: Data) -> str:
    return f"{score['value']:.3f} ± {score['stderr']:.3f}"
