"""What the verbs share: flags, the recipe made from them, and the table of results."""

from __future__ import annotations

import math
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

out = Console()

Model = Annotated[str, typer.Argument(help="Hub name or folder of a causal language model.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it is not empty.")]
Json = Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")]
Text = Annotated[list[str] | None, typer.Option("--text", help="Corpus name or text file; may be repeated.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16; as stored if not given.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Field = Annotated[str | None, typer.Option(help="Field of JSON rows that holds the text; `text` if not given.")]
Mix = Annotated[
    str | None,
    typer.Option(
        help="How several --data are mixed: proportional (all examples pooled), uniform (as much of each), or dynamic "
        "(more of those on which the model got worse)."
    ),
]

ReportTo = Annotated[
    list[str] | None,
    typer.Option("--report-to", help="Watch the training in tensorboard, wandb or trackio; may be repeated."),
]


def recipe_of(model: str, sections: dict[str, Any], seed: int = 42) -> Any:
    """A recipe from flags; flags not given (None) keep the recipe's defaults."""
    from secateur.config import parse_recipe

    given = _given(sections)
    given["model"] = {"source": model, **given.get("model", {})}
    return parse_recipe({**given, "seed": seed})


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """The values without those that are None, at any depth."""
    return {k: _given(v) if isinstance(v, dict) else v for k, v in values.items() if v is not None}


def parts_of(also_train: str | None) -> list[str] | None:
    """`norms,embeddings` -> [norms, embeddings]; `none` -> []; what is not given stays so."""
    if also_train is None:
        return None
    return [] if also_train == "none" else also_train.split(",")


def told_where(output: Path) -> None:
    """Say where the result lies, and what makes a page of it."""
    out.print(f"written to {output}; `secateur report {output}` makes a page of it", soft_wrap=True)


def no_use(method: str, options: dict[str, Any]) -> None:
    """Refuse options that the method has no use for.

    Raises:
        RecipeError: one was given.
    """
    from secateur.errors import RecipeError

    given = [name for name, value in options.items() if value is not None]
    if given:
        named = ", ".join("--" + name.replace("_", "-") for name in given)
        raise RecipeError(f"{method} has no use for {named}; `secateur prune --help` says which option is for what")


def print_results(results: dict[str, Any]) -> None:
    """The table of a prune, recover or run command."""
    params = results["params"]
    if "dense" in params:
        share = f"{params['sparsity']:.2%} of all parameters removed{_asked(results)}"
        out.print(f"{params['dense']:,} -> {params['pruned']:,} parameters ({share})", soft_wrap=True)
    if packed := results.get("protocol", {}).get("quantised"):
        out.print(f"dense is the model as it was trained on, its linear modules packed by {packed}")
    if cost := results.get("cost"):
        print_cost(cost)
    print_perplexity(results)
    if results.get("kinds"):
        print_kinds(results["kinds"])
    if by := results.get("criteria"):
        told = " and ".join(f"by {name} in {count} groups" for name, count in Counter(by.values()).most_common())
        out.print(f"units: {told}, as cuts were measured to cost least", soft_wrap=True)
    if biases := results.get("biases"):
        fields = " and ".join(biases["fields"])
        told = f"biases: {biases['parameters']:,} parameters, which the configuration has with {fields}"
        out.print(told, soft_wrap=True)
    if made := results.get("compensation"):
        before, after = (sum(c[key] for c in made) / len(made) for key in ("before", "after"))
        out.print(
            f"compensated: {len(made)} matrices, whose results were off by {before:.1%} (of their squares, mean) "
            f"and are by {after:.1%}",
            soft_wrap=True,
        )
    if why := results.get("compensation_fallback"):
        done = "solved for what each matrix put out itself, as" if made else "not compensated:"
        out.print(f"{done} {why}", soft_wrap=True)
    if choice := results.get("choice"):
        print_choice(choice)
    for family, reason in results.get("left_whole", {}).items():
        out.print(f"left whole: {family}: {reason}", soft_wrap=True)
    if "tier" in results:
        print_tiers(results["tier"])
    if note := results.get("class", {}).get("note"):
        out.print(note, soft_wrap=True)
    if "masked_minus_cut" in results:
        out.print(f"cut and merged, the logits differ by {results['masked_minus_cut']:.1e} from those in training")
    if "parity" in results:
        print_parity(results["parity"])
    if "streaming" in results:
        done = results["streaming"]
        rate = done["bytes_written"] / max(done["seconds"], 1e-9) / 1e6
        out.print(f"cut without loading the model: {done['bytes_written'] / 1e6:,.1f} MB written, {rate:,.0f} MB/s")
        out.print(f"checked: {done['check']}", soft_wrap=True)


def _asked(results: dict[str, Any]) -> str:
    """What share was asked for, where whole units miss it by half a percent of all parameters or more."""
    settings = results.get("protocol", {}).get("settings", {})
    asked = settings.get("budget", settings).get("param_sparsity")
    missed = asked is not None and abs(asked - results["params"]["sparsity"]) >= 0.005
    return f", {asked:.2%} asked for: widths go in whole steps" if missed else ""


def print_perplexity(results: dict[str, Any]) -> None:
    """A line for each text, nothing if there is none."""
    from secateur.checkpoint.account import STAGES

    stages = [s for s in STAGES if any(s in p for p in results["perplexity"].values())]
    if stages:
        table = Table("perplexity", "tokens", "length", *stages)
        for name, p in results["perplexity"].items():
            figures = [f"{p[s]:.3f}" if s in p else "" for s in stages]
            table.add_row(name, str(p["tokens"]), str(p["seq_len"]), *figures)
        out.print(table)


def print_cost(cost: dict[str, Any]) -> None:
    """What the workload costs before and after, measured, beside what the table of widths said."""
    what = {"macs": "multiply-accumulates", "memory": "bytes of weights and cache", "latency": "seconds"}[cost["what"]]
    out.print(
        f"{what} of {cost['batch']} x {cost['length']} tokens: {cost['dense']:.4g} -> {cost['pruned']:.4g} "
        f"({1 - cost['pruned'] / cost['dense']:.2%} less; {cost['sparsity']:.2%} by the table of widths)",
        soft_wrap=True,
    )


def print_choice(choice: dict[str, Any]) -> None:
    """Which form of the result was taken, and by how much it was better."""
    from secateur.methods.forms import FORMS, gain_in_words

    forms = {form.name: form.words for form in FORMS}
    taken = forms[choice["chosen"]]
    if "why" in choice:
        out.print(f"{taken}: {choice['why']}", soft_wrap=True)
        return
    found = ", ".join(f"{math.exp(choice[name]):.3f} with {told}" for name, told in forms.items() if name in choice)
    gain = gain_in_words(choice)
    more = f"; that of what was taken is {gain}" if gain else ""
    out.print(
        f"{taken}: on {choice['sequences']} calibration sequences set aside the perplexity is {found}{more}",
        soft_wrap=True,
    )


def print_kinds(kinds: dict[str, Any]) -> None:
    """What went of each kind, and a line for each share that whole units could not meet."""
    table = Table("kind", "units", "removed", "share", "asked", "parameters")
    for kind, k in kinds.items():
        asked = "" if k["asked"] is None else f"{k['asked']:.2%}"
        table.add_row(kind, f"{k['units']:,}", f"{k['removed']:,}", f"{k['share']:.2%}", asked, f"{k['parameters']:,}")
    out.print(table)
    for kind, k in kinds.items():
        if k["asked"] is not None and f"{k['share']:.2%}" != f"{k['asked']:.2%}":
            nearest = f"{k['asked']:.2%} of {kind} was asked for, and {k['share']:.2%} is the nearest that can go"
            out.print(f"{nearest} (whole units, those that must stay, widths that the model can have)", soft_wrap=True)


def print_parity(parity: dict[str, Any]) -> None:
    """One line on what was loaded again."""
    out.print(
        f"loaded again in a fresh process: logits differ by {parity['max_logit_difference']:.1e}, perplexity "
        f"{parity['perplexity_before']:.4f} before and {parity['perplexity_after']:.4f} after "
        f"({parity['tokens']} tokens: {parity['text']})",
        soft_wrap=True,
    )


def print_tiers(tier: dict[str, Any]) -> None:
    """The form of the result, and what the others would have cost."""
    length = tier["tiers"][0]["prompt_length"]
    table = Table("tier", "parameters", "bytes", f"MACs of {length} tokens", Column("loads with", overflow="fold"))
    for _, alike in groupby(tier["tiers"], key=lambda t: t["reason"] or t["name"]):
        rows = list(alike)
        names = [f"{t['name']} (written)" if t["name"] == tier["chosen"] else t["name"] for t in rows]
        t = rows[0]
        figures = ["" if n is None else f"{n:,}" for n in (t["parameters"], t["bytes"], t["macs"])]
        if t["bytes_by_type"]:
            figures[1] = _by_type(t["bytes_by_type"])
        table.add_row(", ".join(names), *figures, t["reason"] or t["loads_with"])
    out.print(table)


def _by_type(sizes: dict[str, int]) -> str:
    """Sizes of a file in each of its types, one line for those that are equal."""
    return "\n".join(
        f"{', '.join(kind for kind in sizes if sizes[kind] == size)} {size:,}" for size in dict.fromkeys(sizes.values())
    )


def print_tasks(results: dict[str, Any]) -> None:
    """A line for each task, of a run for each task and stage; nothing if there is none."""
    rows = {
        (task, stage): score
        for task, found in results.get("tasks", {}).items()
        for stage, score in ({"": found} if "metric" in found else found).items()
    }
    if not rows:
        return
    stages = [] if any(stage == "" for _, stage in rows) else ["model"]
    names = dict.fromkeys(name for score in rows.values() for name in score if f"{name}_stderr" in score)
    table = Table("task", *stages, *(Column(name, justify="right") for name in names), "items")
    for (task, stage), score in rows.items():
        cells = [_metric(score, name) for name in names]
        table.add_row(task, *([stage] if stages else []), *cells, f"{score['n']:,} of {score['of']:,}")
    out.print(table)
    out.print("± one standard error; * the metric that stands for the task")
    averages = results.get("tasks_average", {})
    for stage, mean in ({"": averages} if "value" in averages else averages).items():
        by_metric = {m: [t for t, of in mean["metrics"].items() if of == m] for m in mean["metrics"].values()}
        taken = "; ".join(f"{metric} of {', '.join(tasks)}" for metric, tasks in by_metric.items())
        error = "" if mean["stderr"] is None else f" ± {mean['stderr']:.4f}"
        name = f"{stage}, " if stage else ""
        out.print(f"{name}average of {mean['tasks']} tasks: {mean['value']:.4f}{error} ({taken})", soft_wrap=True)
    for (task, stage), score in rows.items():
        if score["truncated"]:
            where = " ".join(filter(None, (task, stage)))
            cut = f"{score['truncated']:,} items did not fit the model's positions: cut at their beginning"
            out.print(f"{where}: {cut}", soft_wrap=True)


def _metric(score: dict[str, Any], name: str) -> str:
    """A figure with its standard error, marked if it stands for the task."""
    if name not in score:
        return ""
    error = "" if score[f"{name}_stderr"] is None else f" ± {score[f'{name}_stderr']:.3f}"
    mark = " *" if name == score["metric"] else ""
    return f"{score[name]:.3f}{error}{mark}"
