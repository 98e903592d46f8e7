"""The verb that makes a model smaller."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.cli.adapters import prune_adapter
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
    parts_of,
    print_results,
    recipe_of,
    told_where,
)

Flags = dict[str, Any]

# Flags by what they set, under the same names, in a recipe.
LOADING = ("dtype", "device", "trust_remote_code", "quantize")
SCORING = ("mode", "criterion", "reduction", "iterations", "reselect", "layer_choice", "compensate")
CUTTING = ("ranking", "uniform", "tier", "round_to", "protect_first", "protect_last", "protect_share",
           "quantize_output", "adapt")  # fmt: skip
TUNING = ("warmup", "cooldown", "frequency", "variant", "compact_every", "push", "periods", "proxies", "merge")
TRAINING = ("steps", "epochs", "rank", "learning_rate", "batch_size")
WATCHING = ("mix", "report_to")
READING = ("field", "seq_len")


def prune(
    model: Model,
    output: Output,
    sparsity: Annotated[float | None, typer.Option(help="Share of all parameters to remove, in [0, 1).")] = None,
    of: Annotated[
        str | None,
        typer.Option(help="What the sparsity is a share of: params, or macs, memory or latency of --workload (auto)."),
    ] = None,
    workload: Annotated[str | None, typer.Option(help="For --of: sequences x tokens of a pass; 1x128.")] = None,
    target_rank: Annotated[
        int | None, typer.Option(help="MODEL is the folder of a LoRA adapter: the rank to leave it.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="For an adapter: its base, if not the one it names.")] = None,
    method: Annotated[
        str | None,
        typer.Option(help="auto (ours), llm-pruner; loraprune or lorashear, which prune while they train."),
    ] = None,
    mode: Annotated[str | None, typer.Option(help="block-wise, channel-wise or layer-wise")] = None,
    kinds: Annotated[
        str | None,
        typer.Option(help="Kinds to prune instead of the mode's; KIND=SHARE removes that share of its units: "
                     "ffn_channel,kv_group=0.25"),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(help="random, l1, l2, taylor-vector, -1, -2 or -mixed, gate, gate-1 or -mixed; measured (auto): "
                     "for each group whichever of taylor-2 and gate costs less as measured; for an adapter fisher, "
                     "activation, magnitude, taylor or sensitivity."),
    ] = None,
    reduction: Annotated[str | None, typer.Option(help="sum, mean, max, prod or first")] = None,
    ranking: Annotated[
        str | None,
        typer.Option(help="local (the same share everywhere), global, or auto's own search for widths."),
    ] = None,
    iterations: Annotated[
        int | None, typer.Option(help="Steps over which sparsity grows, scores refreshed; 8 for an adapter.")
    ] = None,
    reselect: Annotated[
        bool | None,
        typer.Option("--reselect", help="auto: choose units again block by block, in the model as cut before each."),
    ] = None,
    calibration: Annotated[str | None, typer.Option(help="Corpus name or text file.")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens per calibration sequence.")] = None,
    field: Field = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Recompute activations while scoring: less memory.")
    ] = None,
    compensate: Annotated[
        str | None,
        typer.Option(help="Solve the matrices that read what goes again, on the calibration text: ridge (auto's "
                     "default); mend their biases alone: bias; or none."),
    ] = None,
    layer_choice: Annotated[
        str | None, typer.Option(help="For layer-wise: importance, or first (keep the first ones).")
    ] = None,
    uniform: Annotated[
        bool | None,
        typer.Option("--uniform/--per-layer", help="The same widths in every layer; auto takes what is better."),
    ] = None,
    tier: Annotated[
        str | None,
        typer.Option(help="Form of the result: uniform, depth (whole layers go) or padded (any loader), per-layer "
                     "(comes with a class file), auto (the plainest that loses nothing)."),
    ] = None,
    round_to: Annotated[int | None, typer.Option(help="Make channel counts multiples of this.")] = None,
    protect_first: Annotated[int | None, typer.Option(help="Layers at the start to leave whole.")] = None,
    protect_last: Annotated[int | None, typer.Option(help="Layers at the end to leave whole.")] = None,
    knowledge: Annotated[
        Path | None, typer.Option(help="What `secateur analyze` wrote: leave its most sensitive groups whole.")
    ] = None,
    protect_share: Annotated[
        float | None, typer.Option(help="Share of the groups in that file to leave whole; 0.1 if not given.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Replay this plan instead of scoring.")] = None,
    text: Text = None,
    recover_steps: Annotated[int | None, typer.Option(help="Recover with LoRA for this many steps afterwards.")] = None,
    adapt: Annotated[
        float | None,
        typer.Option(help="Share of the recovery's steps that train the model before the cut; none if not given."),
    ] = None,
    data: Annotated[list[str] | None, typer.Option(help="Text to recover or train on; may be repeated.")] = None,
    mix: Mix = None,
    distill: Annotated[
        bool | None, typer.Option("--distill", help="Recover from the model as it was before the cut, too.")
    ] = None,
    also_train: Annotated[
        str | None,
        typer.Option(help="What recovers whole beside the adapters: norms,embeddings or none; auto takes both."),
    ] = None,
    report_to: ReportTo = None,
    no_recover: Annotated[bool, typer.Option("--no-recover", help="Do not recover (the default).")] = False,
    steps: Annotated[int | None, typer.Option(help="While training: optimizer steps.")] = None,
    epochs: Annotated[float | None, typer.Option(help="While training: passes over data, instead of steps.")] = None,
    rank: Annotated[int | None, typer.Option(help="While training: LoRA rank.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="While training: peak learning rate.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="While training: sequences per optimizer step.")] = None,
    warmup: Annotated[float | None, typer.Option(help="While training: share of the run before units go.")] = None,
    cooldown: Annotated[float | None, typer.Option(help="While training: share of it after the last ones.")] = None,
    frequency: Annotated[int | None, typer.Option(help="loraprune: steps between looks at the importance.")] = None,
    variant: Annotated[str | None, typer.Option(help="loraprune: importance: lora, grad or magnitude.")] = None,
    compact_every: Annotated[
        int | None, typer.Option(help="loraprune: steps between removals of what is masked; faster training.")
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(help="loraprune: pack the frozen base: 8bit or 4bit (bitsandbytes), int8 (torchao)."),
    ] = None,
    quantize_output: Annotated[
        str | None, typer.Option(help="loraprune: pack the result, too: 8bit, or 4bit (widths become multiples of 64).")
    ] = None,
    push: Annotated[
        str | None, typer.Option(help="lorashear: how units become zero: half-space (the paper's) or linear.")
    ] = None,
    periods: Annotated[int | None, typer.Option(help="lorashear: periods in which units go.")] = None,
    proxies: Annotated[
        str | None,
        typer.Option(help="lorashear: what units are chosen by, with commas: guided; magnitude,cosine,first,second."),
    ] = None,
    merge: Annotated[
        bool | None, typer.Option("--merge", help="lorashear: merge adapters at the end of every period (the paper's).")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="While training: go on from the last checkpoint.")] = False,
    seed: Seed = 42,
    dtype: Dtype = None,
    device: Device = None,
    trust_remote_code: Trust = False,
    overwrite: Overwrite = False,
) -> None:  # fmt: skip
    """Remove a share of the parameters and write a smaller checkpoint, or a smaller adapter (--target-rank)."""
    flags = dict(locals())
    from secateur import pipeline
    from secateur.errors import RecipeError

    if target_rank is not None or base is not None or (Path(model) / "adapter_config.json").is_file():
        prune_adapter(flags)
        return
    if tier in ("gguf", "vllm"):
        raise RecipeError(f"--tier {tier}: prune first, then `secateur export {output} -o OUT --to {tier}`")
    recipe = _recipe(flags)
    if recipe.method.trains:
        results = pipeline.prune_while_training(recipe, output, resume=resume, overwrite=overwrite)
    else:
        job = pipeline.prune_and_recover if recipe.recovery is not None else pipeline.prune
        results = job(recipe, output, plan=plan, overwrite=overwrite)
    print_results(results)
    told_where(output)


def _recipe(flags: Flags) -> Any:
    """The recipe that the flags of `prune` say.

    Raises:
        RecipeError: a flag has no use with this method.
        BudgetError: nothing says how much to remove, or of what.
    """
    from secateur.config import METHOD_OPTIONS

    method, knowledge = flags["method"], flags["knowledge"]
    if flags["plan"] is not None and method is None:  # what goes is known, and nothing else is done unless asked for
        method = "llm-pruner"
    trains = method in METHOD_OPTIONS
    scoring, recovery = _while_training(method, flags) if trains else _at_once(method or "auto", flags)
    return recipe_of(
        flags["model"],
        {
            "model": _of(flags, LOADING),
            "method": {"name": method} | _tuning(flags),
            "prune": _budget(flags) | _of(flags, CUTTING) | scoring | {"knowledge": knowledge and str(knowledge)},
            "evaluation": {"texts": flags["text"]},
            "recovery": recovery,
        },
        flags["seed"],
    )


def _while_training(method: str, flags: Flags) -> tuple[Flags, Flags]:
    """What a recipe says of scoring and of training, for a method that prunes while it trains."""
    from secateur.config import METHOD_OPTIONS

    others = {name: value for name, value in _tuning(flags).items() if name not in METHOD_OPTIONS[method]}
    no_use(
        method, others | _of(flags, (*SCORING, "calibration", "samples", "plan", "recover_steps")) | _afterwards(flags)
    )
    return {}, _of(flags, ("data", *WATCHING, *TRAINING, *READING, "gradient_checkpointing"))


def _at_once(method: str, flags: Flags) -> tuple[Flags, Flags | None]:
    """The same for a method that cuts at once; no recovery if there is none to be.

    Raises:
        RecipeError: it is to resume.
    """
    from secateur.errors import RecipeError

    no_use(method, _of(flags, TRAINING) | _tuning(flags))
    if flags["resume"]:
        raise RecipeError(
            "--resume: a cut at once begins anew; `secateur run RECIPE -o OUT --resume` goes on after a kill"
        )
    calibration = {"source": flags["calibration"], **_of(flags, ("samples", *READING))}
    scoring = _of(flags, (*SCORING, "gradient_checkpointing")) | {"calibration": calibration}
    watching, afterwards, steps = _of(flags, WATCHING), _afterwards(flags), flags["recover_steps"]
    if steps and not flags["no_recover"]:
        return scoring, {"data": flags["data"], "steps": steps, **watching, **afterwards}
    no_use(f"{method} without --recover-steps", watching | afterwards | _of(flags, ("adapt",)))
    return scoring, None


def _of(flags: Flags, names: Sequence[str]) -> Flags:
    """A section of a recipe whose keys are named as the flags are."""
    return {name: flags[name] for name in names}


def _tuning(flags: Flags) -> Flags:
    proxies = flags["proxies"]
    return _of(flags, TUNING) | {"proxies": proxies.split(",") if proxies else None}


def _afterwards(flags: Flags) -> Flags:
    return {"distill": flags["distill"], "also_train": parts_of(flags["also_train"])}


def _budget(flags: Flags) -> Flags:
    """How much of what to remove, in the words of a recipe.

    Raises:
        BudgetError: nothing says how much, or of what.
    """
    from secateur.config import BUDGET_OF
    from secateur.errors import BudgetError

    sparsity, of, plan, workload = (flags[name] for name in ("sparsity", "of", "plan", "workload"))
    names, ratios = _kinds(flags["kinds"])
    if sparsity is None and plan is None and not (names and set(names) == set(ratios)):
        raise BudgetError("say how much to remove (--sparsity 0.2) or replay a plan (--plan plan.json)")
    if of is not None and of not in BUDGET_OF:
        raise BudgetError(f"--of {of}: expected one of {', '.join(BUDGET_OF)}")
    found: Flags = {BUDGET_OF[of or "params"]: sparsity}
    if workload is not None:
        batch, _, length = workload.partition("x")
        if not (batch.isdecimal() and length.isdecimal()):
            raise BudgetError(f"--workload {workload}: expected sequences x tokens, as 1x128")
        found["workload"] = {"batch": int(batch), "length": int(length)}
    return found | {"kinds": names or None, "kind_ratios": ratios or None}


def _kinds(text: str | None) -> tuple[list[str], dict[str, float]]:
    """`a,b=0.25` -> ([a, b], {b: 0.25}).

    Raises:
        BudgetError: a kind has no name or is named twice, or its share is no number in [0, 1).
    """
    from secateur.allocation import check_shares
    from secateur.errors import BudgetError

    names: list[str] = []
    ratios: dict[str, float] = {}
    for part in (part.strip() for part in (text or "").split(",") if part.strip()):
        name, equals, share = (piece.strip() for piece in part.partition("="))
        if not name or name in names:
            raise BudgetError(f"--kinds {text}: {part!r} {'names a kind again' if name else 'names no kind'}")
        names.append(name)
        if equals:
            try:
                ratios[name] = float(share)
            except ValueError as error:
                raise BudgetError(f"--kinds {part}: {share!r} is no number; write {name}=0.25") from error
    check_shares(ratios)
    return names, ratios
