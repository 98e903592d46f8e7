"""Verbs that look at a model and change nothing: groups, eval, bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from secateur.cli.common import Device, Dtype, Field, Json, Model, Text, Trust, out, recipe_of


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
        subject = checkpoint.load(model, trust_remote_code=trust_remote_code, to_change=True).model
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

    recipe = recipe_of(
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
        recipe_of(model, {"model": flags}),
        against,
        {k: v for k, v in settings.items() if v is not None},
    )
    out.print_json(data=results["benchmark"])
    if json:
        pipeline.write_json(json, results)
