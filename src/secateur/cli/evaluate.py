"""The verb that says how good a model is: eval."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from secateur.cli.common import Device, Dtype, Field, Json, Model, Text, Trust, out, print_tasks, recipe_of


def eval_(
    model: Model,
    text: Text = None,
    adapter: Annotated[Path | None, typer.Option(help="PEFT adapter folder to put on top.")] = None,
    seq_len: Annotated[list[int] | None, typer.Option(help="Window length in tokens; may be repeated.")] = None,
    field: Field = None,
    stride: Annotated[int | None, typer.Option(help="Overlapping windows that move by this many tokens.")] = None,
    bos: Annotated[bool, typer.Option("--bos", help="Begin every window with the BOS token.")] = False,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval, with commas: boolq,piqa,...")] = None,
    task_data: Annotated[
        str | None, typer.Option(help="Folder with the tasks' items; from the hub if not given.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first items of each task.")] = None,
    shots: Annotated[
        int | None, typer.Option(help="Examples in front of each item; as the task's definition says if not given.")
    ] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run what the model writes (humaneval), within limits.")
    ] = False,
    batch_size: Annotated[int | None, typer.Option(help="Windows or requests per forward pass.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is kept beside the --json file.")] = False,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    json: Json = None,
) -> None:
    """Perplexity on texts and accuracy on tasks, with their protocol."""
    from secateur import pipeline

    names = [name.strip() for name in tasks.split(",")] if tasks else None
    recipe = recipe_of(
        model,
        {
            "model": {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code},
            "evaluation": {
                "texts": text or ([] if names else ["wikitext2"]),
                "field": field,
                "seq_len": seq_len,
                "stride": stride,
                "bos": bos,
                "batch_size": batch_size,
                "tasks": names,
                "task_data": task_data,
                "limit": limit,
                "shots": shots,
                "allow_code_execution": allow_code_execution,
            },
        },
    )
    results = pipeline.evaluate(recipe, adapter=adapter, json_file=json, resume=resume)
    _print_texts(results)
    print_tasks(results)


def _print_texts(results: dict[str, Any]) -> None:
    """A line for each text, nothing if there is none."""
    if not results["perplexity"]:
        return
    table = Table(Column("text", overflow="fold"), "perplexity", "tokens", "length", "stride", "dtype")
    for name, p in results["perplexity"].items():
        facts = [str(p["tokens"]), str(p["seq_len"]), str(p["stride"] or p["seq_len"]), results["protocol"]["dtype"]]
        table.add_row(name, f"{p['value']:.3f}", *facts)
    out.print(table)
