"""The same report as Markdown, for papers and model cards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from secateur.report.checks import checks
from secateur.report.choosing import chosen
from secateur.report.comparison import Comparison, compare, comparison_table
from secateur.report.facts import headlines, summary, table, title
from secateur.report.reading import Run
from secateur.report.repeating import repeating

SPECIAL = re.compile(r"([\\`*_\[\]<>|])")


def plain(text: str) -> str:
    """Text that means itself in Markdown."""
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A pipe table; all columns but the first are aligned right."""
    line = "| --- |" + " ---: |" * (len(head) - 1)
    return [_cells(head), line, *map(_cells, rows), ""]


def _cells(row: Sequence[str]) -> str:
    return "| " + " | ".join(map(plain, row)) + " |"


def markdown(runs: Sequence[Run]) -> str:
    """The report of these runs; of more than one, the comparison comes first."""
    lines = []
    if len(runs) > 1:
        lines += [f"# {len(runs)} runs compared", "", *comparison_markdown(compare(runs))]
    for run in runs:
        lines += _run(run, "##" if len(runs) > 1 else "#")
    return "\n".join(lines).rstrip() + "\n"


def comparison_markdown(found: Comparison) -> list[str]:
    """The table over all runs, means over seeds, and what keeps figures from being compared."""
    lines = markdown_table(*comparison_table(found))
    lines += [f"- Take care: {plain(warning)}" for warning in found.warnings]
    lines += [
        f"- {plain(m.method)}, {m.sparsity:.1%} removed, {plain(m.text)}, {m.stage}: {m.mean:.2f} ± {m.deviation:.2f} "
        f"(mean and standard deviation of {len(m.seeds)} seeds)"
        for m in found.means
    ]
    return [*lines, ""]


def _run(run: Run, head: str) -> list[str]:
    lines = [f"{head} {plain(title(run))}", ""]
    lines += [plain(told), ""] if (told := summary(run)) else []
    lines += [f"- **{h.question}: {h.figure}.** {plain(h.detail)}" for h in headlines(run)] + [""]
    stages, rows = table(run)
    if rows:
        lines += markdown_table(["", *stages], [[row.name, *row.cells] for row in rows])
        lines += [f"- {plain(row.name)}: {plain(row.how)}" for row in rows] + [""]
    words = {"yes": "Checked", "no": "Take care", "note": "Note"}
    lines += [f"{head}# Can it be trusted?", ""]
    lines += [f"- {words[c.verdict]}: {plain(c.text)}" for c in checks(run)] + [""]
    if found := chosen(run):
        lines += [f"{head}# Which form it has", "", plain(found.told), ""]
        lines += markdown_table(found.head, found.rows) if found.rows else []
    if samples := run.samples:
        lines += [f"{head}# What it writes ({samples.decoding}, up to {samples.new_tokens} tokens)", ""]
        by_prompt = [
            [prompt, *(texts[n] for texts in samples.continuations.values())]
            for n, prompt in enumerate(samples.prompts)
        ]
        lines += markdown_table(["beginning", *samples.continuations], by_prompt)
    again = repeating(run)
    lines += [f"{head}# How to repeat it", ""]
    lines += [f"    {again.command}", ""] if again.command else []
    lines += [again.note, "", *markdown_table(["input", "source", "sha256"], again.inputs)]
    lines += [", ".join(f"{plain(name)} {plain(value)}" for name, value in again.facts.items()) + ".", ""]
    if again.recipe:
        fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", again.recipe)), 3)
        lines += [f"{fence}yaml", again.recipe.rstrip(), fence, ""]
    return lines
