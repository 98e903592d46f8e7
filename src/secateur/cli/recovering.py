"""The verb that trains a pruned model."""

from __future__ import annotations

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
    parts_of,
    print_results,
    recipe_of,
    told_where,
)


def recover(
    model: Model,
    output: Output,
    data: Annotated[list[str], typer.Option(help="Corpus name or file; instructions or plain text; may be repeated.")],
    mix: Mix = None,
    dense: Annotated[
        str | None,
        typer.Option(help="dynamic: the uncut model; if not given, the one that MODEL's results.json names."),
    ] = None,
    distill: Annotated[
        str | None,
        typer.Option(
            "--distill",
            "--teacher",
            help="Learn from this model, too; `dense` for the one that MODEL's results.json says it was cut from.",
        ),
    ] = None,
    distill_weight: Annotated[
        float | None, typer.Option(help="Of the divergence from the teacher; the rest is that of the text; 0.9.")
    ] = None,
    distill_temperature: Annotated[float | None, typer.Option(help="Of both models' distributions; 1.")] = None,
    distill_top_k: Annotated[
        int | None, typer.Option(help="The teacher's likeliest tokens to tell apart; 0, all, if not given.")
    ] = None,
    distill_hidden: Annotated[
        float | None, typer.Option(help="Weight of the distance of hidden states; 0 if not given.")
    ] = None,
    distill_cache: Annotated[
        str | None, typer.Option(help="Folder for what the teacher says, so that it is asked once; needs a top k.")
    ] = None,
    full_weights: Annotated[
        bool | None, typer.Option("--full-weights", help="Train all weights instead of adapters.")
    ] = None,
    round_steps: Annotated[
        int | None, typer.Option(help="uniform, dynamic: optimizer steps of a round; a tenth of all if not given.")
    ] = None,
    balance: Annotated[
        float | None, typer.Option(help="dynamic: part of a round that follows the sizes of the sources; 0.2.")
    ] = None,
    patience: Annotated[
        int | None, typer.Option(help="dynamic: rounds without improvement that end a stage; 2; 0 for never.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA rank.")] = None,
    alpha: Annotated[int | None, typer.Option(help="LoRA alpha.")] = None,
    dropout: Annotated[float | None, typer.Option(help="LoRA dropout.")] = None,
    targets: Annotated[
        str | None, typer.Option(help="Module names to adapt, with commas; default: all linear.")
    ] = None,
    also_train: Annotated[
        str | None, typer.Option(help="What trains whole beside the adapters: norms,embeddings; none if not given.")
    ] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
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
    eval_every: Annotated[int | None, typer.Option(help="Steps between evaluations on the texts.")] = None,
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
    """Recover a pruned checkpoint with LoRA; writes the merged model and the adapter."""
    from secateur import pipeline

    distillation = {
        "weight": distill_weight,
        "temperature": distill_temperature,
        "top_k": distill_top_k,
        "hidden": distill_hidden,
        "cache": distill_cache,
    }
    teacher, distills = _teacher(dense, distill, distillation)

    recipe = recipe_of(
        model,
        {
            "model": {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code},
            "recovery": {
                "data": data,
                "mix": mix,
                "dense": teacher,
                "distill": distills,
                "full_weights": full_weights,
                "round_steps": round_steps,
                "balance": balance,
                "patience": patience,
                "rank": rank,
                "alpha": alpha,
                "dropout": dropout,
                "targets": targets.split(",") if targets else None,
                "also_train": parts_of(also_train) or [],
                "epochs": epochs,
                "steps": steps,
                "learning_rate": learning_rate,
                "batch_size": batch_size,
                "micro_batch_size": micro_batch_size,
                "seq_len": seq_len,
                "train_on_inputs": train_on_inputs,
                "gradient_checkpointing": gradient_checkpointing,
                "eval_every": eval_every,
                "report_to": report_to,
                "field": field,
            },
            "evaluation": {"texts": text},
        },
        seed,
    )
    print_results(pipeline.recover_checkpoint(recipe, model, output, resume=resume, overwrite=overwrite))
    told_where(output)


def _teacher(
    dense: str | None, distill: str | None, settings: dict[str, Any]
) -> tuple[str | None, dict[str, Any] | None]:
    """The dense model and the section on distillation, in the words of a recipe.

    Raises:
        RecipeError: settings of a distillation are given without it, or two dense models.
    """
    from secateur.errors import RecipeError

    if distill is None:
        if given := [name for name, value in settings.items() if value is not None]:
            named = ", ".join("--distill-" + name.replace("_", "-") for name in given)
            raise RecipeError(f"{named}: name what to learn from, too, with --distill MODEL or --distill dense")
        return dense, None
    named_here = None if distill == "dense" else distill
    if named_here is not None and dense is not None and named_here != dense:
        raise RecipeError(f"--distill {distill} and --dense {dense}: the dense model is one; give --distill dense")
    return named_here or dense, settings
