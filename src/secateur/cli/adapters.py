"""Verbs that make a small adapter: tune, and prune where it is given an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli.common import (
    Device,
    Dtype,
    Field,
    Mix,
    Model,
    Output,
    Overwrite,
    ReportTo,
    Seed,
    Text,
    Trust,
    no_use,
    out,
    print_perplexity,
    recipe_of,
    told_where,
)

# What `prune` takes for an adapter.
ADAPTER_FLAGS = (
    "model", "output", "target_rank", "base", "calibration", "samples", "seq_len", "field", "text", "criterion",
    "ranking", "iterations", "seed", "dtype", "device", "trust_remote_code", "overwrite",
)  # fmt: skip


def tune(
    model: Model,
    output: Output,
    data: Annotated[list[str], typer.Option(help="Corpus name or file; instructions or plain text; may be repeated.")],
    target_rank: Annotated[int, typer.Option(help="Rank in the end, of every module or of the average one.")],
    init_rank: Annotated[int, typer.Option(help="Rank to start from.")] = 128,
    method: Annotated[str, typer.Option(help="prunedlora")] = "prunedlora",
    alpha: Annotated[float | None, typer.Option(help="LoRA alpha at the initial rank; as large as that.")] = None,
    every: Annotated[int | None, typer.Option(help="Optimizer steps between two removals (K1).")] = None,
    components: Annotated[
        int | None, typer.Option(help="Components to remove each time (K2); if not given, the rank falls on a curve.")
    ] = None,
    scope: Annotated[
        str | None, typer.Option(help="adapter (the same rank in every module) or global (where it matters most).")
    ] = None,
    floor: Annotated[int | None, typer.Option(help="Least rank of a module, for --scope global.")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the run before the curve.")] = None,
    cooldown: Annotated[float | None, typer.Option(help="Share of the run after the curve.")] = None,
    criterion: Annotated[str | None, typer.Option(help="fisher, activation, magnitude, taylor or sensitivity.")] = None,
    mix: Mix = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data, instead of steps.")] = None,
    dropout: Annotated[float | None, typer.Option(help="LoRA dropout.")] = None,
    targets: Annotated[
        str | None, typer.Option(help="Module names to adapt, with commas; default: all linear.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per optimizer step.")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(help="Sequences per forward pass.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    train_on_inputs: Annotated[
        bool | None, typer.Option("--train-on-inputs", help="Learn the prompts of instructions, too.")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Recompute activations: less memory.")
    ] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints, for --resume.")] = None,
    quantize: Annotated[
        str | None, typer.Option(help="Pack the frozen base: 8bit or 4bit (bitsandbytes), int8 (torchao).")
    ] = None,
    field: Field = None,
    text: Text = None,
    report_to: ReportTo = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last training checkpoint.")] = False,
    seed: Seed = 42,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune with a LoRA adapter that starts large and is pruned while it trains; writes a PEFT folder."""
    from secateur import pipeline
    from secateur.errors import RecipeError

    if method != "prunedlora":
        raise RecipeError(f"--method {method}: tune knows prunedlora; prune and recover change the model itself")
    recipe = recipe_of(
        model,
        {
            "model": {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code, "quantize": quantize},
            "tune": {
                "target_rank": target_rank,
                "every": every,
                "components": components,
                "scope": scope,
                "floor": floor,
                "warmup": warmup,
                "cooldown": cooldown,
                "criterion": {"kind": criterion},
            },
            "recovery": {
                "data": data,
                "mix": mix,
                "rank": init_rank,
                "alpha": init_rank if alpha is None else alpha,
                "dropout": dropout,
                "targets": targets.split(",") if targets else None,
                "steps": steps,
                "epochs": epochs,
                "learning_rate": learning_rate,
                "batch_size": batch_size,
                "micro_batch_size": micro_batch_size,
                "seq_len": seq_len,
                "train_on_inputs": train_on_inputs,
                "gradient_checkpointing": gradient_checkpointing,
                "save_every": save_every,
                "report_to": report_to,
                "field": field,
            },
            "evaluation": {"texts": text},
        },
        seed,
    )
    print_adapter(pipeline.tune(recipe, output, resume=resume, overwrite=overwrite))
    told_where(output)


def prune_adapter(given: dict[str, Any]) -> None:
    """Prune an adapter that is trained already: what `secateur prune` does with its flags where it is given one.

    Raises:
        CheckpointError: it is no adapter.
        RecipeError: no target rank, or flags that are for models only.
    """
    from secateur import pipeline
    from secateur.errors import CheckpointError, RecipeError

    flags = {name: given.pop(name) for name in ADAPTER_FLAGS}
    folder = Path(flags["model"])
    if not (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"--target-rank and --base are for adapters, and {folder} has no adapter_config.json")
    if flags["target_rank"] is None:
        raise RecipeError(f"{folder} is an adapter: say which rank to leave it (--target-rank 16)")
    form = given.pop("uniform")
    forms = {"uniform": form, "per_layer": form is False}
    no_use("an adapter", {name: value or None for name, value in {**given, **forms}.items()})
    recipe = recipe_of(
        flags["base"] or pipeline.base_of_adapter(folder),
        {
            "model": {name: flags[name] for name in ("dtype", "device", "trust_remote_code")},
            "tune": {
                "target_rank": flags["target_rank"],
                "scope": {"local": "adapter"}.get(flags["ranking"], flags["ranking"]),
                "criterion": {"kind": flags["criterion"]},
            },
            "prune": {
                "calibration": {
                    "source": flags["calibration"],
                    "samples": flags["samples"],
                    "seq_len": flags["seq_len"],
                    "field": flags["field"],
                }
            },
            "evaluation": {"texts": flags["text"]},
        },
        flags["seed"],
    )
    output, events = flags["output"], flags["iterations"] or 8
    print_adapter(pipeline.prune_trained_adapter(recipe, folder, output, events=events, overwrite=flags["overwrite"]))
    told_where(output)


def print_adapter(results: dict[str, Any]) -> None:
    """Ranks, sizes and perplexities."""
    params, last = results["params"], results["training"]["ranks"][-1]
    first = results["training"]["ranks"][0]
    ranks = f"{last['most']}"
    if last["least"] != last["most"]:
        ranks = f"{last['mean']:.4g} ({last['least']} to {last['most']})"
    out.print(f"rank {first['most']} -> {ranks}; adapter of {params['initial']:,} -> {params['final']:,} parameters")
    print_perplexity(results)
    out.print(f"loaded again by PEFT: logits differ by {results['parity']['max_logit_difference']:.1e}")
