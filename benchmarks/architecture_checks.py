"""What is checked on one architecture: discovery, proofs, a round trip through the disk, and negative controls."""

from __future__ import annotations

import copy
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
import zoo
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel

from secateur.allocation import Budget, allocate
from secateur.discovery import discover
from secateur.discovery.grouping import build_groups
from secateur.discovery.reference import Reference, plain_logits
from secateur.discovery.setting import quiet_transformers
from secateur.discovery.trace import Trace, probe_ids, run_trace
from secateur.errors import BudgetError
from secateur.groups import Group, Groups
from secateur.importance import Random, score
from secateur.surgery import Proof, expressible, prove, slice
from secateur.surgery.attributes import cut_modules
from secateur.surgery.trial import LogitCheck, with_noise

HEAD_KINDS = ("kv_group", "attention_head", "query_head", "ssm_head")
ROUND_TRIP_KINDS = ("hidden", "ffn_channel", "expert", "expert_channel")
CONTROLS = 6  # per model
MAX_ATTEMPTS = 20  # choices of a family and a member, of which some make no control
RARE_KINDS = ("expert_group", "layer", "sublayer", "other", "head_dim")  # few families have them, so they come first
SHARES = (0.4, 0.5, 0.34)  # of the units that the round trip removes: the first that the class allows
CLOSE = 1e-5  # of the largest logit, in float32
GENERATED = 5
UNSTEADY = "it is not the same structure in every run, since which operations run depends on values"
NO_SUM = (
    "its layers are no sum of what enters them and what their children put out (what entered is normalised or scaled "
    "on the way, or the children add it themselves), so nothing can be left out of them"
)

Record = dict[str, Any]


Stage = Callable[[PreTrainedModel, Groups, Record], object]
STAGES: dict[str, Stage] = {
    "hazards": lambda model, groups, record: hazards(run_trace(model)),
    "families": lambda model, groups, record: families(groups, prove(model)),
    "absent": lambda model, groups, record: absent(groups, run_trace(model)),
    "without_weights": lambda model, groups, record: without_weights(model),
    "controls": lambda model, groups, record: controls(model, proven_families(record["families"])),
    "round_trip": lambda model, groups, record: round_trip(model, groups),
}


def missing_stages(record: Record) -> list[str]:
    """The stages that have neither a result nor an error yet."""
    if record.get("instantiated") is False or record.get("traced") is False:
        return []
    return [name for name in STAGES if name not in record and name not in record.get("errors", {})]


def examine(model_type: str, known: Record) -> Iterator[Record]:
    """Everything known about a model type, again after each stage, so that what is found survives a time limit.

    Args:
        known: a record of an earlier run, whose stages are not repeated.
    """
    start = time.perf_counter() - known.get("seconds", 0.0)
    record: Record = {"schema": 1, "model_type": model_type, **known}
    record.pop("stopped", None)
    try:
        model = zoo.tiny_model(model_type)
    except zoo.ZooError as error:
        yield record | {"instantiated": False, "reason": str(error).removeprefix(f"{model_type}: ")}
        return
    record |= {"instantiated": True, "class": type(model).__name__, "parameters": model.num_parameters()}
    yield record
    try:
        groups = discover(model)
    except Exception as error:  # any failure is a result here
        yield record | {"traced": False, "reason": reason(error)}
        return
    record["traced"] = True
    for name in missing_stages(record):
        begin = time.perf_counter()
        try:
            record[name] = STAGES[name](model, groups, record)
        except Exception as error:  # likewise
            record.setdefault("errors", {})[name] = {"reason": reason(error), "traceback": traceback.format_exc()}
        record.setdefault("seconds_of", {})[name] = round(time.perf_counter() - begin, 2)
        record["seconds"] = round(time.perf_counter() - start, 2)
        yield record


def reason(error: Exception) -> str:
    """One line."""
    text = " ".join(str(error).split())
    return text if type(error).__module__.startswith("secateur") else f"{type(error).__name__}: {text}"


def hazards(trace: Trace) -> Record:
    """How many axes of parameters are frozen for want of a rule (`unknown`) or by a layout that does not fit."""
    axes = {id(a.find()): a.find() for axes in trace.parameters.values() for a in axes}.values()
    found = [h for axis in axes for h in axis.hazards.values() if h.cause in ("unknown", "layout")]
    return {**Counter(h.cause for h in found), "texts": sorted({h.text for h in found})}


def families(groups: Groups, proofs: Sequence[Proof]) -> list[Record]:
    """One entry per family: its proof if it is offered, its refusals otherwise."""
    proof_of = {p.family: asdict(p) | {"prunable": True} for p in proofs}
    refused: dict[str, list[Group]] = {}
    for group in groups:
        if group.family not in proof_of and group.kind != "vocabulary":
            refused.setdefault(group.family, []).append(group)
    return [*proof_of.values()] + [
        {
            "kind": members[0].kind,
            "family": family,
            "groups": len(members),
            "units": members[0].units,
            "prunable": all(g.prunable for g in members),
            "refusals": sorted({text for g in members for text in g.refusals}) or [UNSTEADY],
        }
        for family, members in refused.items()
    ]


def proven_families(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the families that have a proof by either route."""
    return [f["family"] for f in found if f.get("route") in ("config", "modules")]


def fingerprint(groups: Groups) -> list[tuple[Any, ...]]:
    """What must be equal for two sets of groups to be the same."""
    return [
        (g.name, g.kind, g.units, g.blocks, [(m.parameter, m.dim, m.index.tobytes()) for m in g.members])
        for g in groups
    ]


def without_weights(model: PreTrainedModel) -> Record:
    """Whether the model on the meta device has the groups of the real one, traced on its own weights."""
    real = build_groups(model, run_trace(model, fake=False))[0]
    try:
        with torch.device("meta"):
            bare = type(model)._from_config(copy.deepcopy(model.config), dtype=torch.float32).eval()
        return {"same": fingerprint(discover(bare)) == fingerprint(real)}
    except Exception as error:  # a model may need its weights; that is a result too
        return {"same": None, "reason": reason(error)}


def round_trip(model: PreTrainedModel, groups: Groups) -> Record:
    """Cut about half of everything the class has fields for, save, load with plain transformers, and generate."""
    present = {g.kind for g in groups.prunable}
    heads = [k for k in HEAD_KINDS if k in present]
    kinds = [k for k in ROUND_TRIP_KINDS if k in present]
    found: Record = {"ok": False, "kinds": []}
    for head in heads or [None]:
        can = expressible(model, groups, [*kinds, *([head] if head else [])])
        chosen = [g for g in groups.of_kinds([*kinds, *([head] if head else [])]) if g.family not in can.refused]
        if head is None or any(g.kind == head for g in chosen):
            break
    found["refused"] = dict(can.refused)
    if not chosen:
        return found | {"reason": "no family of these kinds is expressible"}
    scores = score(model, chosen, [], Random())
    for share in SHARES:
        try:
            cuttable = replace(groups, groups=tuple(chosen))
            plan = allocate(
                cuttable,
                scores,
                Budget(unit_sparsity=share),
                feasible=can.feasible,
                ties=can.ties,
                multiples=can.multiples,
            )
            break
        except BudgetError as error:
            found["reason"] = reason(error)
    else:
        return found
    found["kinds"] = sorted({groups.named(n).kind for n, k in plan.kept.items() if len(k) < plan.units[n]})
    try:
        small = slice(model, plan, groups)
        with tempfile.TemporaryDirectory() as folder, quiet_transformers():
            small.save_pretrained(folder)
            known = type(small.config) in MODEL_FOR_CAUSAL_LM_MAPPING  # the class behind a composite's name is not
            again = (AutoModelForCausalLM if known else type(small)).from_pretrained(folder).eval()
    except Exception as error:  # a class may fail in any way it likes
        return found | {"reason": reason(error)}
    ids = probe_ids(model)
    wanted, got = plain_logits(small, ids), plain_logits(again, ids)
    found |= {
        "parameters": small.num_parameters(),
        "share": round(small.num_parameters() / model.num_parameters(), 3),
        "class": type(again).__name__,
        "difference": float((wanted - got).abs().max() / wanted.abs().max()),
        "generates": generates(again),
    }
    found["ok"] = found["difference"] <= CLOSE
    return found | {"reason": "" if found["ok"] else "the loaded model computes something else"}


def generates(model: PreTrainedModel) -> Record:
    """Whether greedy generation with a cache gives the tokens that it gives without."""
    ids = probe_ids(model)[:1]
    settings: Record = {"max_new_tokens": GENERATED, "do_sample": False, "pad_token_id": 0}
    try:
        with torch.no_grad(), quiet_transformers():
            runs = [model.generate(ids, use_cache=cache, **settings) for cache in (True, False)]
        return {"same": torch.equal(*runs), "tokens": runs[0].shape[1] - ids.shape[1]}
    except Exception as error:  # classes that cannot generate say so in their own ways
        return {"same": None, "reason": reason(error)}


def absent(groups: Groups, trace: Trace) -> dict[str, str]:
    """Why there are no layers, or nothing that could be left out of single ones, where there are none."""
    homes = [g.blocks[0].rpartition(".")[0] for g in groups if g.kind == "layer"]
    if not homes:
        return dict.fromkeys(("layer", "sublayer"), "no two blocks in a row put out hidden states like those they take")
    if any(g.kind == "sublayer" for g in groups):
        return {}
    if not any(added for path, added in trace.added.items() if path.rpartition(".")[0] in homes):
        return {"sublayer": NO_SUM}
    return {
        "sublayer": "what its layers add comes from children that take or put out something else than hidden states"
    }


def controls(model: PreTrainedModel, proven: Sequence[str], wanted: int = CONTROLS, seed: int = 0) -> Record:
    """Shift the slice of one member of a proven family by one unit, or take the next block instead of the one to go;
    a cut with it must not pass as right.

    A control counts only if the same cut passes with the right slices, and if the logits depend on what was shifted
    (they do not on the bias of keys that are not rotated, for example).
    """
    subject = with_noise(copy.deepcopy(model), seed)
    reference = Reference(subject)
    found: Record = {"total": 0, "caught": 0, "missed": [], "kinds": [], "without_effect": 0, "not_cut": 0}
    passes: dict[str, bool] = {}
    for group, number in _turns(reference.groups, proven, np.random.default_rng(seed))[:MAX_ATTEMPTS]:
        if found["total"] == wanted:
            break
        kept = {group.name: _without_one(group)}
        check = LogitCheck(subject, kept, reference)
        if group.name not in passes:
            passes[group.name] = cut_modules(subject, reference.groups, kept, check.same) is not None
        if not passes[group.name]:
            found["not_cut"] += 1
            continue
        wrong = shifted(reference.groups, group, number)
        if not _has_effect(reference, wrong, group, number):
            found["without_effect"] += 1
            continue
        found["total"] += 1
        found["kinds"].append(group.kind)
        if cut_modules(subject, wrong, kept, check.same) is None:
            found["caught"] += 1
        else:
            shifted_part = group.members[number].parameter if group.members else "the next block"
            found["missed"].append(f"{group.name}: {shifted_part}")
    return found


def _turns(groups: Groups, proven: Sequence[str], generator: np.random.Generator) -> list[tuple[Group, int]]:
    """Groups of proven families with the number of the member to shift: each family in turn, rare kinds first."""
    by_family: dict[str, list[tuple[Group, int]]] = {}
    for group in groups:
        if group.family in proven and (len(group.members) > 1 or len(group.blocks) > 1 + len(group.stays)):
            numbers = range(len(group.members)) if group.members else range(1)
            by_family.setdefault(group.family, []).extend((group, n) for n in numbers)
    queues = [[q[i] for i in generator.permutation(len(q))] for q in by_family.values()]
    queues.sort(key=lambda q: q[0][0].kind not in RARE_KINDS)
    return [q[i] for i in range(max(map(len, queues), default=0)) for q in queues if i < len(q)]


def _without_one(group: Group) -> tuple[int, ...]:
    """All units but the first that may go."""
    gone = next(u for u in range(group.units) if u not in group.stays)
    return tuple(u for u in range(group.units) if u != gone)


def shifted(groups: Groups, group: Group, number: int) -> Groups:
    """The groups with one member whose unit u holds the positions of unit u - 1, or with other blocks for its units."""
    if group.blocks:
        changed = replace(group, blocks=(*group.blocks[1:], group.blocks[0]))
    else:
        member = group.members[number]
        wrong = replace(member, index=np.roll(member.index, 1, axis=0))
        changed = replace(group, members=(*group.members[:number], wrong, *group.members[number + 1 :]))
    return replace(groups, groups=tuple(changed if g is group else g for g in groups))


def _has_effect(reference: Reference, wrong: Groups, group: Group, number: int) -> bool:
    """Whether the logits tell the right cut from the wrong one: other positions go, and the logits depend on them."""
    kept = {group.name: _without_one(group)}
    if group.blocks:
        gone = group.blocks.index(wrong.removed_blocks(kept)[0])
        other = {group.name: tuple(u for u in range(group.units) if u != gone)}
        return _differ(reference.logits(reference.ids, kept), reference.logits(reference.ids, other))
    model, member = reference.model, group.members[number]
    positions = [groups.kept_positions(kept)[member.parameter][member.dim] for groups in (reference.groups, wrong)]
    differing = np.setxor1d(*positions)
    if differing.size == 0:
        return False
    tensor = model.state_dict()[member.parameter]
    before, saved = plain_logits(model, reference.ids), tensor.clone()
    # Random, not constant: norms that subtract the mean do not see a constant.
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0), dtype=tensor.dtype)
    where = torch.from_numpy(differing)
    tensor.index_add_(member.dim, where, noise.index_select(member.dim, where))
    after = plain_logits(model, reference.ids)
    tensor.copy_(saved)
    return _differ(before, after)


def _differ(before: Tensor, after: Tensor) -> bool:
    return bool((after - before).norm() > 1e-9 * before.norm())
