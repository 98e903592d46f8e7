"""Verbs that look at a model and change nothing: groups, bench."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from secateur.cli.common import Device, Dtype, Json, Model, Trust, out, recipe_of

if TYPE_CHECKING:
    from secateur.groups import Group
    from secateur.surgery import Proof


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
    from secateur.surgery import prove

    subject = checkpoint.load_skeleton(model, trust_remote_code=trust_remote_code)
    packing = checkpoint.quantisation(subject.config)
    if verify and packing is None:
        subject = checkpoint.load(model, trust_remote_code=trust_remote_code).model
    found = discover(subject)
    families: dict[str, list[Group]] = {}
    for group in found:
        families.setdefault(group.family, []).append(group)
    proofs = {p.family: p for p in prove(subject)} if verify else {}

    verdict = "masked = sliced" if verify else "prunable"
    table = Table(Column("family / kind", no_wrap=True), "groups", "units", Column(verdict, overflow="fold"))
    rows = []
    for family, members in families.items():
        first = members[0]
        proof = proofs.get(family)
        table.add_row(family, str(len(members)), str(first.units), _verdict(first, proof, verify))
        rows.append(
            {
                "family": family,
                "kind": first.kind,
                "groups": len(members),
                "units": first.units,
                "prunable": first.prunable and (proof.proven if proof else not verify),
                "refusals": list(first.refusals),
                "proof": None if proof is None else vars(proof),
            }
        )
    out.print(table)
    kinds = _differences_of_kinds(list(proofs.values()))
    if verify:
        table = Table("kind", "families proven", "largest difference in float64", "in float32, of the largest logit")
        for row in kinds:
            shown = [
                f"{row[k]:.1e}" if row["proven"] else "" for k in ("max_difference", "relative_difference_float32")
            ]
            table.add_row(row["kind"], f"{row['proven']} of {row['families']}", *shown)
        out.print(table)
    out.print(f"{found.total_parameters:,} parameters")
    if packing is not None:
        how = "; proven on a small model of the class with random weights, as packed ones cannot be cut" * verify
        out.print(f"quantised ({packing}): these are the groups of the float checkpoint{how}", soft_wrap=True)
    if json:
        about = {"source": model, "quantisation": packing}
        results = {"schema": 1, "command": "groups", "model": about, "families": rows}
        write_json(json, results | ({"kinds": kinds} if verify else {}))


def _verdict(group: Group, proof: Proof | None, verify: bool) -> str:
    """What the table says of a family."""
    if not group.prunable:
        return f"no: {group.refusals[0]}"
    if proof is None:
        return "no: not the same structure in every run, as what runs depends on values" if verify else "yes"
    if not proof.proven:
        return f"no: {proof.reason}"
    how = f"saved through {', '.join(proof.fields)}" if proof.route == "config" else f"in memory; {proof.reason}"
    return f"{proof.max_difference:.1e}; {proof.relative_difference_float32:.1e} in float32; {how}"


def _differences_of_kinds(proofs: Sequence[Proof]) -> list[dict[str, Any]]:
    """For each kind, how many families are proven and the largest differences of their logits (None if none is)."""
    rows = []
    for kind in dict.fromkeys(p.kind for p in proofs):
        of_kind = [p for p in proofs if p.kind == kind]
        proven = [p for p in of_kind if p.proven]
        row: dict[str, Any] = {"kind": kind, "families": len(of_kind), "proven": len(proven)}
        for name in ("max_difference", "relative_difference_float32"):
            row[name] = max((getattr(p, name) for p in proven), default=None)
        rows.append(row)
    return rows


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
