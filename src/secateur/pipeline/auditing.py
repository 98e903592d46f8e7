"""Whether importance can be trusted on a checkpoint: criteria beside what removal really costs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoint import Checkpoint
from secateur.config import Recipe
from secateur.discovery import discover
from secateur.errors import KnowledgeError
from secateur.evaluation import Agreement, Removal, agreements, best, groups_to_cut, luck, removal_costs, removals
from secateur.evaluation.audit import CHEAPEST, CONFIDENCE, RESAMPLES
from secateur.evaluation.audit_picture import draw_audit
from secateur.evaluation.picture import check_picture
from secateur.groups import Group
from secateur.importance import CRITERIA, score
from secateur.pipeline.analysing import check_files, evaluation_text
from secateur.pipeline.kept import key_of
from secateur.pipeline.measured import Losses, Measured
from secateur.pipeline.pruning import calibration_batch, calibration_corpus, criterion_of
from secateur.pipeline.results import Clock, Results, header, load_model, needs_tokenizer, write_json


def audit(
    recipe: Recipe,
    *,
    criteria: Sequence[str] = (),
    units: int = 64,
    sets: int = 64,
    share: float = 0.1,
    samples: int = 64,
    json_file: Path | None = None,
    picture: Path | None = None,
    resume: bool = False,
) -> Results:
    """Remove a sample of units alone and in random sets, and compare what that costs with every criterion's scores.

    Costs are measured on the recipe's first evaluation text, scores on its calibration text. While it runs, losses are
    kept beside the result, as for `analyze`.

    Args:
        criteria: names; all that there are if empty.
        units, sets, share: see `removals`.
        samples: windows from the beginning of the evaluation text.
        json_file, picture: files for the result and for a picture of it.
        resume: take what was measured before.

    Raises:
        SecateurError: for anything wrong with the input; nothing is written then.
    """
    named = _criteria(criteria)
    check_files(json_file, picture, resume)
    if picture is not None:
        check_picture(picture)
    corpus, calibration = evaluation_text(recipe), calibration_corpus(recipe)
    clock = Clock()
    clock.begin("load")
    source = load_model(recipe, to_change=True)
    results = header("audit", source, recipe)
    clock.begin("discover")
    groups = discover(source.model)
    chosen = groups_to_cut(groups, recipe.prune.kinds)
    removed = removals(chosen, units=units, sets=sets, share=share, seed=recipe.seed)
    seq_len, batch_size = recipe.evaluation.seq_len[0], recipe.evaluation.batch_size
    clock.begin("score")
    tokens = calibration_batch(source, calibration, recipe, results)
    scores = {name: _scores(source, chosen, name, recipe, tokens) for name in named}
    facts = {
        "model": results["model"],
        "text_sha256": corpus.sha256,
        "removals": [asdict(r) for r in removed],
        "windows": [samples, seq_len, batch_size],
        "versions": results["protocol"]["versions"],
    }
    kept = Measured(json_file, key_of(facts), resume, _losses_in)
    clock.begin("remove")
    dense, changes = removal_costs(
        source.model, needs_tokenizer(source), corpus, groups, removed, seq_len=seq_len, samples=samples,
        batch_size=batch_size, known=kept.losses, on_loss=kept.add,
    )  # fmt: skip
    found = agreements(removed, changes, scores, recipe.seed)
    clock.end()
    results["protocol"] |= {
        "text": {"source": recipe.evaluation.texts[0], "sha256": corpus.sha256, "windows": samples, "seq_len": seq_len},
        "sampled": {"units": units, "sets": sets, "share": share},
        "cheapest": CHEAPEST,
        "resamples": RESAMPLES,
        "confidence": CONFIDENCE,
    }
    results |= {
        "key": kept.key,
        "dense": asdict(dense),
        "agreements": [asdict(a) for a in found],
        "verdicts": verdicts(found, removed, changes, recipe.seed),
        "removals": [
            asdict(r) | {"change": change, "scores": {name: r.predicted(scores[name]) for name in named}}
            for r, change in zip(removed, changes, strict=True)
        ],
        "timing": clock.seconds,
    }
    if picture is not None:
        draw_audit(found, picture, Path(str(source.source)).name, dense)
    if json_file is not None:
        write_json(json_file, results)
    kept.forget()
    return results


def verdicts(
    found: Sequence[Agreement], removed: Sequence[Removal], changes: Sequence[float], seed: int
) -> list[dict[str, Any]]:
    """For each kind, which criterion to take, and whether it says anything at all: by sets, if any were removed.

    Pruning removes many units at once, and what a set costs stands out of the noise that a single unit drowns in. A
    criterion says something if its interval lies above zero, its value above what a random order may reach, and it is
    clearly better than `random`, where that is among the criteria.
    """
    told = []
    for kind in dict.fromkeys(a.kind for a in found):
        first, as_good = best(found, kind, "sets" if any(a.how == "sets" for a in found) else "alone")
        by_luck = luck(removed, changes, kind, first.how, seed)
        told.append(
            {
                "kind": kind,
                "by": first.how,
                "criterion": first.criterion,
                "spearman": asdict(first.spearman),
                "not_worse": as_good,
                "luck": by_luck,
                "trusted": first.spearman.low > 0 and first.spearman.value > by_luck and "random" not in as_good,
            }
        )
    return told


def _criteria(names: Sequence[str]) -> tuple[str, ...]:
    """The criteria asked for.

    Raises:
        KnowledgeError: one is not known.
    """
    if unknown := [name for name in names if name not in CRITERIA]:
        raise KnowledgeError(f"there is no criterion {unknown[0]} (--criteria); known: {', '.join(CRITERIA)}")
    return tuple(dict.fromkeys(names or CRITERIA))


def _scores(
    source: Checkpoint, chosen: Sequence[Group], name: str, recipe: Recipe, tokens: torch.Tensor
) -> Mapping[str, torch.Tensor]:
    settings = recipe.prune.model_copy(update={"criterion": name})
    return score(source.model, chosen, [tokens], criterion_of(settings, recipe.seed), settings.reduction)


def _losses_in(file: Path) -> Losses:
    """Those of a finished result.

    Raises:
        KnowledgeError: it is none.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        dense = found["dense"]["loss"]
        return {(Removal(**_bare(r)).kind, i): dense + r["change"] for i, r in enumerate(found["removals"])}
    except (ValueError, KeyError, TypeError) as error:
        raise KnowledgeError(f"{file} is no result of `secateur audit` ({error}); choose another --json") from error


def _bare(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("kind", "how", "units")}
