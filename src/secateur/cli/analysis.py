"""The verbs that find out what a model can spare, and what tells: analyze, audit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from secateur.cli.common import Device, Dtype, Field, Json, Model, Seed, Trust, out, recipe_of


def analyze(
    model: Model,
    text: Annotated[str, typer.Option(help="Corpus name or text file to measure on.")] = "wikitext2",
    kinds: Annotated[
        str | None, typer.Option(help="Kinds of groups to cut, with commas; FFN channels and heads if not given.")
    ] = None,
    ratios: Annotated[str, typer.Option(help="Shares of each group's units to cut, with commas.")] = "0.25,0.5,0.75",
    criterion: Annotated[
        str, typer.Option(help="What chooses the units: random, l1, l2, taylor-vector, -1, -2 or -mixed.")
    ] = "l2",
    calibration: Annotated[str | None, typer.Option(help="Corpus name or text file for taylor criteria.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Windows from the beginning of the text.")] = 64,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows per forward pass.")] = None,
    field: Field = None,
    json: Json = None,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw deviation by layer and kind: a .svg, .png or .pdf file.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is kept beside the --json file.")] = False,
    seed: Seed = 42,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Cut every group alone and see how much worse the model gets: the knowledge distribution of LoRAShear."""
    from secateur import pipeline

    recipe = _recipe(dict(locals()), criterion=criterion)
    results = pipeline.analyze(
        recipe, ratios=_shares(ratios), samples=samples, json_file=json, picture=picture, resume=resume
    )
    _show(results)
    for file in filter(None, (json, picture)):
        out.print(f"written to {file}", soft_wrap=True)


def audit(
    model: Model,
    text: Annotated[str, typer.Option(help="Corpus name or text file to measure the loss on.")] = "wikitext2",
    calibration: Annotated[
        str | None, typer.Option(help="Corpus name or text file for criteria that read text.")
    ] = None,
    criteria: Annotated[str | None, typer.Option(help="Criteria to compare, with commas; all if not given.")] = None,
    kinds: Annotated[
        str | None, typer.Option(help="Kinds of units to remove, with commas; FFN channels and heads if not given.")
    ] = None,
    units: Annotated[int, typer.Option(help="Units of each kind to remove alone, drawn at random.")] = 64,
    sets: Annotated[int, typer.Option(help="Random sets of units of each kind to remove.")] = 64,
    share: Annotated[float, typer.Option(help="Of a kind's units in a set.")] = 0.1,
    samples: Annotated[int, typer.Option(min=1, help="Windows from the beginning of the text.")] = 64,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows per forward pass.")] = None,
    field: Field = None,
    json: Json = None,
    picture: Annotated[
        Path | None, typer.Option(help="Also draw correlations with their intervals: a .svg, .png or .pdf file.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is kept beside the --json file.")] = False,
    seed: Seed = 42,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Trust = False,
) -> None:
    """Can importance be trusted on this model? Remove units and compare what it costs with what criteria say."""
    from secateur import pipeline

    names = [name.strip() for name in criteria.split(",")] if criteria else ()
    results = pipeline.audit(
        _recipe(dict(locals())), criteria=names, units=units, sets=sets, share=share, samples=samples, json_file=json,
        picture=picture, resume=resume,
    )  # fmt: skip
    _show_audit(results)
    for file in filter(None, (json, picture)):
        out.print(f"written to {file}", soft_wrap=True)


def _recipe(flags: dict[str, Any], criterion: str | None = None) -> Any:
    """The recipe of either verb, from its flags."""
    kinds, seq_len = flags["kinds"], flags["seq_len"]
    return recipe_of(
        flags["model"],
        {
            "model": {name: flags[name] for name in ("dtype", "device", "trust_remote_code")},
            "prune": {
                "kinds": [kind.strip() for kind in kinds.split(",")] if kinds else None,
                "criterion": criterion,
                "calibration": {"source": flags["calibration"], "field": flags["field"]},
            },
            "evaluation": {
                "texts": [flags["text"]],
                "field": flags["field"],
                "seq_len": None if seq_len is None else [seq_len],
                "batch_size": flags["batch_size"],
            },
        },
        flags["seed"],
    )


def _show_audit(results: dict[str, Any]) -> None:
    """For each kind a line per criterion, and what follows from them."""
    table = Table("kind", "criterion", "removed", "rank correlation", "of the cheapest fifth found (by chance)")
    for row in results["agreements"]:
        rank, found = row["spearman"], row["overlap"]
        table.add_row(
            row["kind"],
            row["criterion"],
            f"{row['removals']} {'alone' if row['how'] == 'alone' else 'sets'}",
            f"{rank['value']:+.2f} ({rank['low']:+.2f} to {rank['high']:+.2f})",
            f"{found['value']:.0%} ({row['chance']:.0%})",
        )
    out.print(table)
    dense, confidence = results["dense"], results["protocol"]["confidence"]
    out.print(
        f"Spearman's rank correlation of scores with the change of the loss, intervals of {confidence:.0%}; "
        f"{dense['text']}: dense perplexity {dense['value']:.3f} on {dense['tokens']:,} tokens in windows of "
        f"{dense['seq_len']}",
        soft_wrap=True,
    )
    for told in results["verdicts"]:
        if not told["trusted"]:
            out.print(
                f"{told['kind']}: no criterion ranks better than chance for sure: the best, {told['criterion']}, has "
                f"{told['spearman']['value']:+.2f}, a random order of the units may reach {told['luck']:+.2f}"
                f"{', and random scores are as good' if 'random' in told['not_worse'] else ''}",
                soft_wrap=True,
            )
            continue
        others = f"; not clearly worse: {', '.join(told['not_worse'])}" if told["not_worse"] else ""
        out.print(
            f"{told['kind']}: take {told['criterion']} ({told['spearman']['value']:+.2f}){others}", soft_wrap=True
        )


def _shares(text: str) -> tuple[float, ...]:
    """`0.25,0.5` -> (0.25, 0.5).

    Raises:
        KnowledgeError: a part is no number.
    """
    from secateur.errors import KnowledgeError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise KnowledgeError(f"--ratios {text}: {error}; write shares with commas, as 0.25,0.5,0.75") from error


def _show(results: dict[str, Any]) -> None:
    """A line for each layer, a column for each kind: the worst group there, as all of it that goes is shown."""
    found, sensitive = results["knowledge"], set(results["most_sensitive"])
    cells: dict[tuple[int | None, str], str] = {}
    for trial in found["trials"]:
        cells.setdefault((trial["layer"], trial["kind"]), "")
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    layers = list(dict.fromkeys(layer for layer, _ in cells))
    place_of = {trial["group"]: (trial["layer"], trial["kind"]) for trial in found["trials"]}
    for place in cells:
        deviations = {name: found["deviations"][name] for name, at in place_of.items() if at == place}
        worst = max(deviations, key=lambda name: deviations[name])
        many = f" (worst of {len(deviations)})" if len(deviations) > 1 else ""
        star = " *" if sensitive.intersection(deviations) else ""
        cells[place] = f"{deviations[worst]:+.4f}{many}{star}"
    table = Table("layer", *kinds)
    for layer in layers:
        name = "several" if layer is None else str(layer)
        table.add_row(name, *(cells.get((layer, kind), "") for kind in kinds))
    out.print(table)
    dense, protocol = found["dense"], found["protocol"]
    ratios = ", ".join(f"{ratio:g}" for ratio in protocol["ratios"])
    out.print("loss without parts of one group, minus dense, in nats per token:", soft_wrap=True)
    out.print(f"the mean over the ratios {ratios} of its units, chosen by {protocol['proxy']}", soft_wrap=True)
    out.print(
        f"{dense['text']}: dense perplexity {dense['value']:.3f} on {dense['tokens']:,} tokens in windows of "
        f"{dense['seq_len']}",
        soft_wrap=True,
    )
    out.print(f"* most sensitive, the worst first: {', '.join(results['most_sensitive'])}", soft_wrap=True)
    if not found["from_cache"]:
        out.print(f"every pass was a whole one: {found['cache_note']}", soft_wrap=True)
    for name, reason in found["left_out"].items():
        out.print(f"not cut: {name}: {reason}", soft_wrap=True)
