"""The part of docs/results.md on what is left beyond half of the parameters."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

CUTS = {
    "taylor-1": "LLM-Pruner",
    "taylor-1-hidden": "LLM-Pruner, hidden dimension too",
    "auto": "ours",
    "auto-hidden": "ours, hidden dimension too",
}
MASKS = {"magnitude": "magnitude mask", "wanda": "Wanda mask"}
NAMES = CUTS | MASKS
OURS = ("auto", "auto-hidden")
Data = Mapping[str, Any]


def beyond_half(found: Iterable[Data]) -> list[str]:
    """Cuts and masks at equal numbers of parameters, and at equal speed."""
    lines: list[str] = []
    for data in found:
        cells = _cells(data["rows"])
        lines += [*_protocol(data), *_curve(cells), *_notes(cells), *_equal_speed(cells)]
    head = [
        "## Beyond half: cuts and masks",
        "",
        "`benchmarks/beyond_half.py`: cuts, and unstructured masks that zero as many weights as the share of all",
        "parameters is, in the linear modules of the blocks alone. `pruned` is not trained, `recovered` is after all",
        "weights were trained on the same examples, zeros put back after every step. Time is of a forward pass,",
        "relative to the dense model in turn with it, each the least processor time on one thread; masks have the",
        "faster of dense matrices and compressed sparse rows (CSR in brackets). Means over seeds and standard",
        "deviations; seeds draw the calibration text and the order of training.",
        "",
    ]
    return [*head, *lines] if lines else []


def _protocol(data: Data) -> list[str]:
    """What a model's figures depend on, the dense perplexity first."""
    p, dense, model = data["protocol"], data["dense"], data["model"]
    seeds = ", ".join(map(str, sorted({r["seed"] for r in data["rows"]})))
    tokens = f"{p['batch_size']} x {p['seq_len']} tokens"
    training = (
        f"Recovery: {p['steps']} steps of {tokens} from {p['examples']:,} windows of the same text, learning rate "
        f"{p['learning_rate']:g}."
        if p["steps"]
        else "No recovery."
    )
    return [
        f"### {model['name']} ({model['parameters']:,} parameters, {model['in_linear_modules']:,} of them in linear "
        "modules of blocks), beyond half",
        "",
        f"Dense: {dense['value']:.3f} on {dense['tokens']:,} tokens of {dense['text']}, windows of "
        f"{dense['seq_len']}; {dense['ms']:.0f} ms for {tokens}, least of {p['repetitions']}, {p['threads']} "
        f"thread(s). Calibration: {p['samples']} x {p['seq_len']} tokens of {p['data']['file']} (its first "
        f"{p['data']['characters']:,} characters). {training} Seeds: {seeds}.",
        "",
    ]


def _cells(rows: Sequence[Data]) -> dict[tuple[float, str], list[Data]]:
    """Rows over seeds by sparsity and method, in the order of the table."""
    order = sorted({(r["sparsity"], list(NAMES).index(r["method"]), r["method"]) for r in rows})
    return {
        (sparsity, method): [r for r in rows if (r["sparsity"], r["method"]) == (sparsity, method)]
        for sparsity, _, method in order
    }


def _curve(cells: Mapping[tuple[float, str], list[Data]]) -> list[str]:
    lines = [
        "| asked | removed | method | seeds | pruned | recovered | time |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for (sparsity, method), rows in cells.items():
        done = _done(rows)
        if not done:
            lines.append(f"| {sparsity:.0%} | out of reach | {NAMES[method]} | | | | |")
            continue
        csr = [r["relative_times"]["csr"] for r in done if "csr" in r["relative_times"]]
        columns = [
            f"{sparsity:.0%}", f"{_mean(done, 'reached'):.2%}", NAMES[method], str(len(done)),
            _spread([r["perplexity"] for r in done]), _recovered(done),
            _spread([r["relative_time"] for r in done]) + (f" ({_spread(csr)})" if csr else ""),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(columns)} |")
    return [*lines, ""]


def _notes(cells: Mapping[tuple[float, str], list[Data]]) -> list[str]:
    """Why rows failed, one reason for all that share it, the least sparsity of each method."""
    reasons: dict[str, str] = {}
    for (sparsity, method), rows in cells.items():
        for row in rows:
            for kind in ("failed", "recovery_failed"):
                if kind in row:
                    reasons.setdefault(method, f"- {NAMES[method]}, from {sparsity:.0%}: {row[kind]}.")
    return [*reasons.values(), ""] if reasons else []


def _equal_speed(cells: Mapping[tuple[float, str], list[Data]]) -> list[str]:
    """Our cuts, each beside the best of the masks that are at least as fast."""
    ours = {key: done for key, rows in cells.items() if key[1] in OURS and (done := _done(rows))}
    masks = {key: done for key, rows in cells.items() if key[1] in MASKS and (done := _done(rows))}
    if not ours or not masks:
        return []
    lines = [
        "At equal measured speed, of the masks at any sparsity that are at least as fast the one that is best after",
        "recovery (as it is, without):",
        "",
        "| cut | time | pruned | recovered | mask | time | pruned | recovered |",
        "| --- | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for (sparsity, method), rows in ours.items():
        as_fast = [k for k, v in masks.items() if _mean(v, "relative_time") <= _mean(rows, "relative_time")]
        rival = min(as_fast, key=lambda k: _quality(masks[k]), default=None)
        beside = "none of those measured is as fast | | |"
        if rival is not None:
            beside = f"{NAMES[rival[1]]}, {_mean(masks[rival], 'reached'):.0%} | {_figures(masks[rival])}"
        lines.append(f"| {NAMES[method]}, {sparsity:.0%} | {_figures(rows)} | {beside} |")
    return [*lines, ""]


def _figures(rows: Sequence[Data]) -> str:
    return f"{_mean(rows, 'relative_time'):.2f} | {_spread([r['perplexity'] for r in rows])} | {_recovered(rows)}"


def _done(rows: Sequence[Data]) -> list[Data]:
    return [r for r in rows if "failed" not in r]


def _quality(rows: Sequence[Data]) -> float:
    """The perplexity after recovery, of rows without it the one before."""
    return statistics.mean(r.get("recovered", r["perplexity"]) for r in rows)


def _recovered(rows: Sequence[Data]) -> str:
    values = [r["recovered"] for r in rows if "recovered" in r]
    return _spread(values) if values else ""


def _mean(rows: Sequence[Data], key: str) -> float:
    return statistics.mean(r[key] for r in rows)


def _spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation over seeds."""
    mean = f"{statistics.mean(values):,.2f}"
    return mean + (f" ± {statistics.stdev(values):,.2f}" if len(values) > 1 else "")
