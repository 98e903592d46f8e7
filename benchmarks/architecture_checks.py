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
CONTROLS = 4  # per model
MAX_ATTEMPTS = 16  # choices of a family and a member, of which some make no control
SHARES = (0.4, 0.5, 0.34)  # of the units that the round trip removes: the first that the class allows
CLOSE = 1e-5  # of the largest logit, in float32
GENERATED = 5

Record = dict[str, Any]


Stage = Callable[[PreTrainedModel, Groups, Record], object]
STAGES: dict[str, Stage] = {
    "hazards": lambda model, groups, record: hazards(run_trace(model)),
    "families": lambda model, groups, record: families(groups, prove(model)),
    "without_weights": lambda model, groups, record: without_weights(model),
    "controls": lambda model, groups, record: controls(model, proven_families(record["families"])),
    "round_trip": lambda model, groups, record: round_trip(model, groups),
    "float32": lambda model, groups, record: float32(model, proven_families(record["families"])),
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
            "refusals": sorted({text for g in members for text in g.refusals}),
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
            plan = allocate(cuttable, scores, Budget(unit_sparsity=share), feasible=can.feasible, ties=can.ties)
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


def controls(model: PreTrainedModel, proven: Sequence[str], wanted: int = CONTROLS, seed: int = 0) -> Record:
    """Shift the slice of one member of a proven family by one unit; a cut with it must not pass as right.

    A control counts only if the same cut passes with the right slices, and if the logits depend on what was shifted
    (they do not on the bias of keys that are not rotated, for example).
    """
    subject = with_noise(copy.deepcopy(model), seed)
    reference = Reference(subject)
    generator = np.random.default_rng(seed)
    pool = [
        (group, number)
        for family in proven
        for group in reference.groups
        if group.family == family and len(group.members) > 1
        for number in range(len(group.members))
    ]
    by_family: dict[str, list[tuple[Group, int]]] = {}
    for index in generator.permutation(len(pool)):
        by_family.setdefault(pool[index][0].family, []).append(pool[index])
    turns = [
        q[i] for i in range(max(map(len, by_family.values()), default=0)) for q in by_family.values() if i < len(q)
    ]
    found: Record = {"total": 0, "caught": 0, "missed": [], "kinds": [], "without_effect": 0, "not_cut": 0}
    passes: dict[str, bool] = {}
    for group, number in turns[:MAX_ATTEMPTS]:
        if found["total"] == wanted:
            break
        kept = {group.name: tuple(range(1, group.units))}
        check = LogitCheck(subject, kept, reference)
        if group.name not in passes:
            passes[group.name] = cut_modules(subject, reference.groups, kept, check.same) is not None
        if not passes[group.name]:
            found["not_cut"] += 1
            continue
        wrong = shifted(reference.groups, group, number)
        if not _has_effect(subject, reference.groups, wrong, group, number):
            found["without_effect"] += 1
            continue
        found["total"] += 1
        found["kinds"].append(group.kind)
        if cut_modules(subject, wrong, kept, check.same) is None:
            found["caught"] += 1
        else:
            found["missed"].append(f"{group.name}: {group.members[number].parameter}")
    return found


def float32(model: PreTrainedModel, proven: Sequence[str], seed: int = 0) -> Record:
    """Differences of logits in single precision, as a share of the largest logit: cut in memory as proven in double
    precision, and both then rounded."""
    double = with_noise(copy.deepcopy(model), seed)
    reference, single = Reference(double), Reference(copy.deepcopy(double).float())
    generator = np.random.default_rng(seed)
    found: Record = {"families": 0, "largest": 0.0, "above": [], "not_cut": 0}
    for family in proven:
        members = [g for g in reference.groups if g.family == family]
        kept = {}
        for group in members:
            units = generator.choice(np.arange(1, group.units), max(1, group.units * 3 // 4 - 1), replace=False)
            kept[group.name] = tuple(sorted({0, *(int(u) for u in units)}))
        small = cut_modules(double, reference.groups, kept, LogitCheck(double, kept, reference).same)
        if small is None:
            found["not_cut"] += 1
            continue
        wanted = single.logits(single.ids, kept)
        off = float((plain_logits(small[0].float(), single.ids) - wanted).abs().max() / wanted.abs().max())
        found["families"] += 1
        found["largest"] = max(found["largest"], off)
        if off > CLOSE:
            found["above"].append(f"{family}: {off:.1e}")
    return found


def shifted(groups: Groups, group: Group, number: int) -> Groups:
    """The groups with one member whose unit u holds the positions of unit u - 1."""
    member = group.members[number]
    wrong = replace(member, index=np.roll(member.index, 1, axis=0))
    members = (*group.members[:number], wrong, *group.members[number + 1 :])
    changed = replace(group, members=members)
    return replace(groups, groups=tuple(changed if g is group else g for g in groups))


def _has_effect(model: PreTrainedModel, right: Groups, wrong: Groups, group: Group, number: int) -> bool:
    """Whether the positions that only one of the two cuts removes exist, and change the logits."""
    member = group.members[number]
    kept = {group.name: tuple(range(1, group.units))}
    positions = [groups.kept_positions(kept)[member.parameter][member.dim] for groups in (right, wrong)]
    differing = np.setxor1d(*positions)
    if differing.size == 0:
        return False
    tensor = model.state_dict()[member.parameter]
    ids = probe_ids(model)
    before, saved = plain_logits(model, ids), tensor.clone()
    # Random, not constant: norms that subtract the mean do not see a constant.
    noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0), dtype=tensor.dtype)
    where = torch.from_numpy(differing)
    tensor.index_add_(member.dim, where, noise.index_select(member.dim, where))
    after = plain_logits(model, ids)
    tensor.copy_(saved)
    return bool((after - before).norm() > 1e-9 * before.norm())
