"""The part of docs/results.md on PrunedLoRA, from the result files of `benchmarks/prunedlora.py`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NAMES = {
    "lora-initial": "LoRA of the initial rank",
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "adalora": "AdaLoRA",
    "paper-form": "PrunedLoRA, paper form",
    "paper-form-masks": "PrunedLoRA, paper form, masks",
    "ours": "PrunedLoRA",
    "ours-global": "PrunedLoRA, one budget",
    "scale": "PrunedLoRA, the scale kept",
    "pace": "PrunedLoRA, the paper's pace",
    "scale-pace": "PrunedLoRA, the scale kept, the paper's pace",
    "masks": "PrunedLoRA, what stays does not change",
    "scale-pace-masks": "PrunedLoRA, the scale kept, the paper's pace, what stays does not change",
    "magnitude": "magnitude, while training",
    "taylor": "LLM-Pruner-like, while training",
    "activation": "SparseGPT-like, while training",
    "after-magnitude": "magnitude, afterwards",
    "after-taylor": "LLM-Pruner-like, afterwards",
    "after-activation": "SparseGPT-like, afterwards",
    "after-ours": "PrunedLoRA's criterion, afterwards",
    "after-masks": "PrunedLoRA's criterion, afterwards, what stays does not change",
}
OPTIONS = {
    "ours": "as it is",
    "ours-global": "one budget for all modules",
    "pace": "the paper's pace: 2 components at every step from the first",
    "scale": "the scale stays, not alpha",
    "scale-late": "the scale stays, the rank falls until 70 % of the run",
    "middle": "the rank falls until 50 % of the run (30 %)",
    "late": "the rank falls until 70 % of the run",
    "often": "every 2 steps (5)",
    "seldom": "every 10 steps",
    "once": "all at once after a quarter of the run",
    "gradient": "Gram of one gradient (average over steps)",
    "slow": "average of weight 0.98 for the past (0.9)",
    "absolute": "damping 1e-6, absolute, as published (1e-2 of the mean diagonal)",
    "undamped": "damping 1e-4 (1e-2)",
    "damped": "damping 0.1",
    "damped-whole": "damping 1",
    "newton": "a tenth of the Newton term (none)",
    "newton-whole": "the Newton term",
    "both": "both factors make up (the cheaper one)",
    "b": "B makes up",
    "a": "A makes up",
    "single": "by single scores (jointly)",
    "unbalanced": "factors not balanced",
    "masks": "what stays does not change",
    "paper-form-masks": "paper form, what stays does not change",
    "paper-form-no-newton": "paper form without the Newton term",
    "magnitude": "magnitude",
    "taylor": "Taylor (LLM-Pruner)",
    "activation": "activations (SparseGPT)",
    "sensitivity": "AdaLoRA's sensitivity",
}
Data = Mapping[str, Any]
SIZES = ("state_bytes", "peak_bytes")
HEAD = """## PrunedLoRA beside LoRA, rsLoRA, DoRA and AdaLoRA

`benchmarks/prunedlora.py`: every row fine-tunes the same model on the same examples for the same number of steps, with
an adapter on every linear module. Loss [nats] and accuracy are of held-out examples, means over seeds with the standard
deviation. Each method has at each rank the best learning rate of a grid on a validation part with seed 0: on SST-2 by
accuracy, of all seven from 3e-4 to 0.3, since there is no single minimum; on Alpaca by the loss (on tinystories-656k
half steps to both sides of the best included). What prunes "while training" has PrunedLoRA's schedule, rate and rule
for alpha, and another criterion; "afterwards" it is cut from what LoRA of the initial rank has learned, at once and
without more training.

The paper form has the published criterion and its change of both factors, alpha = r at every rank, and the paper's
pace: 2 components leave at every step from the first on, so that ranks 16, 4 and 1 are reached after 24, 30 and 32 % of
the run (in the paper's runs of 5,000 steps, 2 at every tenth bring 128, 256 and 512 to 64 after 6, 19 and 45 %).
"Masks" is the first revision of its code, in which what stays does not change. Both have the best rate of nine from
1e-5 to 0.3, all of them tried. The optimizer, AdamW, is that of all rows, and the runs are 50 times as short as the
paper's.

State is what the trainable parameters and the optimizer's moments take after the first and the last step. The peak of
the process is, for models this small, that of the libraries; on a larger one it was measured
[by itself](#what-a-large-initial-rank-costs). Seconds and milliseconds per step (of the first
and the last 20) are those of one processor.
"""


def comparison(found: Iterable[Data]) -> list[str]:
    """Every method on every model and task."""
    lines: list[str] = []
    for data in found:
        protocol, rows = data["protocol"], data["rows"]
        settings, classes = protocol["settings"], "accuracy" in data["base"]["held_out"]
        lines = lines or HEAD.split("\n")
        columns = ["rank", "method", "seeds", "rate", "loss", *(["accuracy"] if classes else []), "state", "s", "ms"]
        lines += [
            f"### {data['model']['name']} ({data['model']['parameters']:,} parameters), {_task(protocol['task'])}",
            "",
            f"{settings['steps']} steps of {settings['batch_size']} examples of up to {settings['seq_len']} tokens, "
            f"initial rank {settings['initial_rank']}. {_base(data['base']['held_out'], protocol['task'])}",
            "",
            "| " + " | ".join(columns) + " |",
            "| ---: | --- |" + " ---: |" * (len(columns) - 2),
        ]
        ranks = sorted({r["target_rank"] for r in rows}, key=lambda rank: -rank)
        for rank in ranks:
            for method in NAMES:
                mine = [r for r in rows if (r["target_rank"], r["method"]) == (rank, method)]
                lines += [_row(mine, classes)] if mine else []
        lines.append("")
    return lines


def _task(task: Data) -> str:
    return {"alpaca": "Alpaca as text", "sst2": "SST-2"}[task["name"]]


def _base(base: Data, task: Data) -> str:
    told = f"Without an adapter the loss is {base['loss']:.3f}"
    if "accuracy" not in base:
        return told + "."
    return f"{told} and the accuracy {base['accuracy']:.3f}; the larger class has {task['majority']['held_out']:.3f}."


def _row(rows: Sequence[Data], classes: bool) -> str:
    good = [r for r in rows if "loss" in r]
    first = rows[0]
    start = f"| {first['target_rank']} | {NAMES[first['method']]} | {len(rows)} | {first['learning_rate']:g} | "
    if len(good) < len(rows):
        return start + f"broke in {len(rows) - len(good)} |" + (" |" if classes else "") + " | | |"
    figures = [_spread([r["loss"] for r in rows])]
    figures += [_spread([r["accuracy"] for r in rows])] if classes else []
    if "prune_seconds" in first:
        figures += ["", f"+{statistics.mean(r['prune_seconds'] for r in rows):.1f}", ""]
    else:
        state, step = (
            [statistics.mean(r[key][end] for r in rows) for end in ("first", "last")]
            for key in ("state_bytes", "step_seconds")
        )
        figures.append(_change([f"{size / 2**20:.2f}" for size in state], "MiB"))
        figures.append(f"{statistics.mean(r['seconds'] for r in rows):.1f}")
        figures.append(" to ".join(f"{1000 * seconds:.0f}" for seconds in step))
    return start + " | ".join(figures) + " |"


def _change(ends: Sequence[str], unit: str) -> str:
    return f"{ends[0]} {unit}" if ends[0] == ends[1] else f"{ends[0]} to {ends[1]} {unit}"


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def options(found: Iterable[Data]) -> list[str]:
    """The losses of variants of our form, all at one learning rate."""
    files = list(found)
    if not files:
        return []
    heads = [f"{data['model']['name']}, {data['protocol']['task']['name']}" for data in files]
    first = next(r for r in files[0]["rows"] if r["method"] == "ours")
    rates = ", ".join(f"{data['rows'][0]['learning_rate']:g}" for data in files)
    lines = [
        "## PrunedLoRA's options",
        "",
        f"The same training from rank {files[0]['protocol']['settings']['initial_rank']} to {first['target_rank']}, "
        "loss on held-out examples, mean and standard deviation over "
        f"{len({r['seed'] for r in files[0]['rows']})} seeds, one setting changed at a time (what the default is, in "
        f"brackets), all at the learning rate that is best for the default on a coarse grid ({rates}). "
        "A setting that changes how far steps go may want another rate: rows of the scale and of the paper's form say "
        "nothing against them here, and have the best rate of each in the table above.",
        "",
        "| option | " + " | ".join(heads) + " |",
        "| --- |" + " ---: |" * len(heads),
    ]
    for method, name in OPTIONS.items():
        cells = [_losses([r for r in data["rows"] if r["method"] == method]) for data in files]
        lines += [f"| {name} | " + " | ".join(cells) + " |"] if any(cells) else []
    return [*lines, ""]


def _losses(rows: Sequence[Data]) -> str:
    good = [r["loss"] for r in rows if "loss" in r]
    return _spread(good) if good and len(good) == len(rows) else "broke" if rows else ""


def memory(found: Iterable[Data]) -> list[str]:
    """Memory and time at a large rank, at a small one, and from the one to the other."""
    lines: list[str] = []
    for data in found:
        p, rows = data["protocol"], data["rows"]
        lines += [
            "## What a large initial rank costs",
            "",
            f"`benchmarks/rank_memory.py`: a random Llama of {rows[0]['parameters']:,} parameters in {p['dtype']} on "
            f"{p['device']}, steps of {p['samples']} x {p['seq_len']} tokens, LoRA on all linear modules; `pruned` "
            f"goes from rank {p['initial_rank']} to {p['target_rank']} at once. `before` are the {p['before']} steps "
            f"up to that, `after` the {p['after']} from the second after it, seconds their median. `state` is what is "
            "trained and the optimizer's state, exactly; the peak counts the weights.",
            "",
            "| way | part of the run | state | peak | seconds of a step |",
            "| --- | --- | ---: | ---: | ---: |",
        ]
        for r in rows:
            if "failed" in r:
                lines.append(f"| {r['way']} | | | | {r['failed']} |")
                continue
            for part, told in (("before", "before"), ("between", "the step of the removal"), ("after", "after")):
                sizes = [f"{r[part][name] / 2**20:,.0f} MiB" if name in r[part] else "" for name in SIZES]
                lines.append(f"| {r['way']} | {told} | {' | '.join(sizes)} | {r[part]['seconds']:.3f} |")
        lines.append("")
    return lines
