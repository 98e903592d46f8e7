"""The command line: reads flags, calls the pipeline, prints tables. Exit code 0 done, 2 wrong input, 1 a defect."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from secateur.errors import SecateurError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a large language model smaller and faster by cutting whole structures out of it.",
)
recipes_app = typer.Typer(no_args_is_help=True, help="The recipes that ship with Secateur.")
app.add_typer(recipes_app, name="recipes")
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


def main() -> None:
    """Entry point of the `secateur` command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except SecateurError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _recipe(model: str, sections: dict[str, dict[str, Any]], seed: int = 42) -> Any:
    """A recipe from flags; flags not given keep the recipe's defaults."""
    from secateur.config import parse_recipe

    given = {name: {k: v for k, v in values.items() if v is not None} for name, values in sections.items()}
    given["model"] = {"source": model, **given.get("model", {})}
    return parse_recipe({**given, "seed": seed})


@app.command()
def groups(
    model: Model,
    verify: Annotated[bool, typer.Option("--verify", help="Prove masked = sliced for every family.")] = False,
    json: Json = None,
    trust_remote_code: Trust = False,
) -> None:
    """List the coupled structures of a model; weights are needed only to verify on them."""
    from secateur import checkpoint
    from secateur.discovery import discover
    from secateur.pipeline import write_json
    from secateur.surgery import OFFERED_KINDS, prove

    if verify:
        subject = checkpoint.load(model, trust_remote_code=trust_remote_code).model
    else:
        subject = checkpoint.load_skeleton(model, trust_remote_code=trust_remote_code)
    found = discover(subject)
    families: dict[str, list[Any]] = {}
    for group in found:
        families.setdefault(group.family, []).append(group)
    proofs = {p.family: p for p in prove(subject)} if verify else {}

    verdict = "masked = sliced" if verify else "prunable"
    table = Table(Column("family / kind", no_wrap=True), "groups", "units", Column(verdict, overflow="fold"))
    rows = []
    for family, members in families.items():
        first = members[0]
        proof = proofs.get(family)
        if not first.prunable:
            verdict = f"no: {first.refusals[0]}"
        elif proof is not None:
            how = (
                f"saved through {', '.join(proof.fields)}" if proof.route == "config" else f"in memory; {proof.reason}"
            )
            verdict = f"{proof.max_difference:.1e}; {how}" if proof.proven else f"no: {proof.reason}"
        else:
            verdict = "yes" if first.kind in OFFERED_KINDS else "not offered"
        table.add_row(family, str(len(members)), str(first.units), verdict)
        rows.append(
            {
                "family": family,
                "kind": first.kind,
                "groups": len(members),
                "units": first.units,
                "prunable": first.prunable and first.kind in OFFERED_KINDS and (proof is None or proof.proven),
                "refusals": list(first.refusals),
                "proof": None if proof is None else vars(proof),
            }
        )
    out.print(table)
    out.print(f"{found.total_parameters:,} parameters")
    if json:
        write_json(json, {"schema": 1, "command": "groups", "model": {"source": model}, "families": rows})


@app.command()
def prune(
    model: Model,
    output: Output,
    sparsity: Annotated[float | None, typer.Option(help="Share of all parameters to remove, in [0, 1).")] = None,
    method: Annotated[str | None, typer.Option(help="llm-pruner")] = None,
    mode: Annotated[str | None, typer.Option(help="block-wise, channel-wise or layer-wise")] = None,
    kinds: Annotated[
        str | None,
        typer.Option(help="Kinds to prune instead of the mode's; KIND=SHARE removes that share of its units: "
                     "ffn_channel,kv_group=0.25"),
    ] = None,
    criterion: Annotated[str | None, typer.Option(help="random, l1, l2, taylor-vector, -1, -2 or -mixed")] = None,
    reduction: Annotated[str | None, typer.Option(help="sum, mean, max, prod or first")] = None,
    ranking: Annotated[str | None, typer.Option(help="local or global")] = None,
    iterations: Annotated[int | None, typer.Option(help="Steps over which sparsity grows, scores refreshed.")] = None,
    calibration: Annotated[str | None, typer.Option(help="Corpus name or text file.")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per calibration sequence.")] = None,
    field: Field = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Recompute activations while scoring: less memory.")
    ] = None,
    layer_choice: Annotated[
        str | None, typer.Option(help="For layer-wise: importance, or first (keep the first ones).")
    ] = None,
    uniform: Annotated[bool, typer.Option("--uniform/--per-layer", help="The same widths in every layer.")] = True,
    round_to: Annotated[int | None, typer.Option(help="Make channel counts multiples of this.")] = None,
    protect_first: Annotated[int | None, typer.Option(help="Layers at the start to leave whole.")] = None,
    protect_last: Annotated[int | None, typer.Option(help="Layers at the end to leave whole.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Replay this plan instead of scoring.")] = None,
    text: Text = None,
    recover_steps: Annotated[int | None, typer.Option(help="Recover with LoRA for this many steps afterwards.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Recovery data; may be repeated.")] = None,
    no_recover: Annotated[bool, typer.Option("--no-recover", help="Do not recover (the default).")] = False,
    seed: Seed = 42,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Remove a share of the parameters and write a smaller checkpoint."""
    from secateur import pipeline
    from secateur.errors import BudgetError

    names, ratios = _kinds(kinds)
    if sparsity is None and plan is None and not (names and set(names) == set(ratios)):
        raise BudgetError("say how much to remove (--sparsity 0.2) or replay a plan (--plan plan.json)")
    recipe = _recipe(
        model,
        {
            "model": {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code},
            "method": {"name": method},
            "prune": {
                "param_sparsity": sparsity,
                "mode": mode,
                "kinds": names or None,
                "kind_ratios": ratios or None,
                "criterion": criterion,
                "reduction": reduction,
                "ranking": ranking,
                "iterations": iterations,
                "gradient_checkpointing": gradient_checkpointing,
                "layer_choice": layer_choice,
                "uniform": uniform,
                "round_to": round_to,
                "protect_first": protect_first,
                "protect_last": protect_last,
                "calibration": {
                    k: v
                    for k, v in {
                        "source": calibration,
                        "field": field,
                        "samples": samples,
                        "seq_len": seq_len,
                    }.items()
                    if v is not None
                },
            },
            "evaluation": {"texts": text},
            **({"recovery": {"data": data, "steps": recover_steps}} if recover_steps and not no_recover else {}),
        },
        seed,
    )
    results = (
        pipeline.prune_and_recover(recipe, output, plan=plan, overwrite=overwrite)
        if recipe.recovery is not None
        else pipeline.prune(recipe, output, plan=plan, overwrite=overwrite)
    )
    print_results(results)
    out.print(f"written to {output}")


def _kinds(text: str | None) -> tuple[list[str], dict[str, float]]:
    """`a,b=0.25` -> ([a, b], {b: 0.25})."""
    from secateur.errors import BudgetError

    names, ratios = [], {}
    for part in filter(None, (text or "").split(",")):
        name, equals, share = part.partition("=")
        names.append(name)
        if equals:
            try:
                ratios[name] = float(share)
            except ValueError as error:
                raise BudgetError(f"--kinds {part}: {share!r} is no number; write {name}=0.25") from error
    return names, ratios


@app.command()
def recover(
    model: Model,
    output: Output,
    data: Annotated[list[str], typer.Option(help="Corpus name or file; instructions or plain text; may be repeated.")],
    rank: Annotated[int | None, typer.Option(help="LoRA rank.")] = None,
    alpha: Annotated[int | None, typer.Option(help="LoRA alpha.")] = None,
    dropout: Annotated[float | None, typer.Option(help="LoRA dropout.")] = None,
    targets: Annotated[
        str | None, typer.Option(help="Module names to adapt, with commas; default: all linear.")
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
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last training checkpoint.")] = False,
    seed: Seed = 42,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    overwrite: Overwrite = False,
) -> None:
    """Recover a pruned checkpoint with LoRA; writes the merged model and the adapter."""
    from secateur import pipeline

    recipe = _recipe(
        model,
        {
            "model": {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code},
            "recovery": {
                "data": data,
                "rank": rank,
                "alpha": alpha,
                "dropout": dropout,
                "targets": targets.split(",") if targets else None,
                "epochs": epochs,
                "steps": steps,
                "learning_rate": learning_rate,
                "batch_size": batch_size,
                "micro_batch_size": micro_batch_size,
                "seq_len": seq_len,
                "train_on_inputs": train_on_inputs,
                "gradient_checkpointing": gradient_checkpointing,
                "eval_every": eval_every,
                "field": field,
            },
            "evaluation": {"texts": text},
        },
        seed,
    )
    print_results(pipeline.recover_checkpoint(recipe, model, output, resume=resume, overwrite=overwrite))
    out.print(f"written to {output}")


@app.command(name="eval")
def eval_(
    model: Model,
    text: Text = None,
    adapter: Annotated[Path | None, typer.Option(help="PEFT adapter folder to put on top.")] = None,
    seq_len: Annotated[list[int] | None, typer.Option(help="Window length in tokens; may be repeated.")] = None,
    field: Field = None,
    stride: Annotated[int | None, typer.Option(help="Overlapping windows that move by this many tokens.")] = None,
    bos: Annotated[bool, typer.Option("--bos", help="Begin every window with the BOS token.")] = False,
    batch_size: Annotated[int | None, typer.Option(help="Windows per forward pass.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    json: Json = None,
) -> None:
    """Perplexity on texts, with its protocol."""
    from secateur import pipeline

    recipe = _recipe(
        model,
        {
            "model": {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code},
            "evaluation": {
                "texts": text or ["wikitext2"],
                "field": field,
                "seq_len": seq_len,
                "stride": stride,
                "bos": bos,
                "batch_size": batch_size,
            },
        },
    )
    results = pipeline.evaluate(pipeline.load_model(recipe), recipe, adapter=adapter)
    table = Table("text", "perplexity", "tokens", "length", "stride", "dtype")
    for name, p in results["perplexity"].items():
        facts = [str(p["tokens"]), str(p["seq_len"]), str(p["stride"] or p["seq_len"]), results["protocol"]["dtype"]]
        table.add_row(name, f"{p['value']:.3f}", *facts)
    out.print(table)
    if json:
        pipeline.write_json(json, results)


@app.command()
def bench(
    model: Model,
    against: Annotated[str | None, typer.Option(help="Dense model to compare with in the same process.")] = None,
    prompt_length: Annotated[int | None, typer.Option(help="Prompt tokens.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Tokens to generate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences.")] = None,
    repetitions: Annotated[int | None, typer.Option(help="Timed runs.")] = None,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    json: Json = None,
) -> None:
    """Parameters, MACs, memory, prefill and decode speed."""
    from secateur import pipeline

    flags = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    settings = {
        "prompt_length": prompt_length,
        "new_tokens": new_tokens,
        "batch_size": batch_size,
        "repetitions": repetitions,
    }
    results = pipeline.benchmark(
        _recipe(model, {"model": flags}),
        against,
        {k: v for k, v in settings.items() if v is not None},
    )
    out.print_json(data=results["benchmark"])
    if json:
        pipeline.write_json(json, results)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a recipe that ships with Secateur.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, for example prune.param_sparsity=0.3")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder.")] = Path("run"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    overwrite: Overwrite = False,
) -> None:
    """Run a recipe from start to end."""
    from secateur import pipeline
    from secateur.config import load_recipe

    print_results(pipeline.run_recipe(load_recipe(recipe, overrides or []), output, resume=resume, overwrite=overwrite))
    out.print(f"run folder: {output}")


@recipes_app.command("ls")
def recipes_ls() -> None:
    """Names of all recipes."""
    from secateur.config import list_recipes

    for name in list_recipes():
        print(name)


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument()]) -> None:
    """Print a recipe."""
    from secateur.config import recipe_text

    print(recipe_text(name), end="")


@recipes_app.command("validate")
def recipes_validate(
    file: Annotated[str, typer.Argument()],
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
) -> None:
    """Check a recipe without running it."""
    from secateur.config import load_recipe

    load_recipe(file, overrides or [])
    print(f"{file}: valid")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder.")] = Path("demo-run"),
) -> None:
    """Prune and recover the bundled model by 20 % and 50 %, and show what it costs."""
    from secateur.demo import run_demo

    run_demo(output, out)


def print_results(results: dict[str, Any]) -> None:
    """The table of a prune, recover or run command."""
    params = results["params"]
    if "dense" in params:
        share = f"{params['sparsity']:.2%} of all parameters removed"
        out.print(f"{params['dense']:,} -> {params['pruned']:,} parameters ({share})")
    stages = [s for s in ("dense", "pruned", "recovered") if any(s in p for p in results["perplexity"].values())]
    if stages:
        table = Table("perplexity", "tokens", "length", *stages)
        for name, p in results["perplexity"].items():
            figures = [f"{p[s]:.3f}" if s in p else "" for s in stages]
            table.add_row(name, str(p["tokens"]), str(p["seq_len"]), *figures)
        out.print(table)
    for family, reason in results.get("left_whole", {}).items():
        out.print(f"left whole: {family}: {reason}", soft_wrap=True)
    if "parity" in results:
        out.print(f"reloaded with from_pretrained: logits differ by {results['parity']['max_logit_difference']:.1e}")


if __name__ == "__main__":
    main()
