"""The knowledge distribution of a checkpoint: measured, kept while it is measured, written, drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoint import Checkpoint
from secateur.config import Recipe
from secateur.data import Corpus, load_corpus
from secateur.discovery import discover
from secateur.errors import DataError, KnowledgeError
from secateur.evaluation import (
    RATIOS,
    Knowledge,
    check_picture,
    check_ratios,
    draw,
    groups_to_cut,
    knowledge_distribution,
)
from secateur.groups import Groups
from secateur.importance import Gate, Taylor, score
from secateur.pipeline.kept import check_output, check_writable, key_of
from secateur.pipeline.measured import Losses, Measured
from secateur.pipeline.pruning import calibration_batch, calibration_corpus, criterion_of
from secateur.pipeline.results import Clock, Results, header, load_model, needs_tokenizer, write_json


def analyze(
    recipe: Recipe,
    *,
    ratios: Sequence[float] = RATIOS,
    samples: int = 64,
    json_file: Path | None = None,
    picture: Path | None = None,
    resume: bool = False,
) -> Results:
    """Knowledge distribution of the recipe's model on its first evaluation text, with its kinds and its criterion.

    While it runs, every loss is appended to `<json_file>.work`, which goes when the result is written; `resume` takes
    what is there, or in the result itself, as measured.

    Args:
        ratios: shares of the units of each group that are cut.
        samples: windows from the beginning of the text.
        json_file: file for the result.
        picture: file for a picture of it.

    Raises:
        SecateurError: for anything wrong with the input; nothing is written then.
    """
    check_ratios(ratios)
    check_files(json_file, picture, resume)
    corpus = evaluation_text(recipe)
    reads_text = isinstance(criterion_of(recipe.prune, recipe.seed), Taylor | Gate)
    scored_on = calibration_corpus(recipe) if reads_text else None
    clock = Clock()
    clock.begin("load")
    source = load_model(recipe, to_change=True)
    results = header("analyze", source, recipe)
    clock.begin("discover")
    groups = discover(source.model)
    clock.begin("score")
    scores = _scores(source, groups, recipe, scored_on, results)
    seq_len, batch_size = recipe.evaluation.seq_len[0], recipe.evaluation.batch_size
    facts = {
        "model": results["model"],
        "text_sha256": corpus.sha256,
        "asked": [list(recipe.prune.kinds), list(ratios), recipe.prune.criterion, samples, seq_len, batch_size],
        "protocol": results["protocol"],
    }
    kept = Measured(json_file, key_of(facts), resume, _losses_in)
    clock.begin("cut groups alone")
    knowledge = knowledge_distribution(
        source.model,
        needs_tokenizer(source),
        corpus,
        groups=groups,
        kinds=recipe.prune.kinds,
        ratios=ratios,
        scores=scores,
        seq_len=seq_len,
        samples=samples,
        batch_size=batch_size,
        known=kept.losses,
        on_loss=kept.add,
        protocol=_protocol(recipe, results),
    )
    clock.end()
    protected = knowledge.most_sensitive()
    results |= {"key": kept.key, "knowledge": knowledge.to_json(), "most_sensitive": list(protected)}
    if picture is not None:
        draw(knowledge, picture, Path(str(source.source)).name, protected)
    if json_file is not None:
        write_json(json_file, results)
    kept.forget()
    return results


def _losses_in(file: Path) -> Losses:
    """Those of a finished result."""
    return {(trial.group, trial.removed): trial.loss for trial in Knowledge.load(file).trials}


def check_files(json_file: Path | None, picture: Path | None, resume: bool) -> None:
    """Find out before anything is measured whether results can be written.

    Raises:
        KnowledgeError: they cannot, or there is nothing to resume from.
    """
    check_output(json_file, resume, KnowledgeError)
    if picture is not None:
        check_picture(picture)
        if picture == json_file:
            raise KnowledgeError(f"--json and --picture are both {picture}: one would take the place of the other")
        check_writable(picture, KnowledgeError)


def evaluation_text(recipe: Recipe) -> Corpus:
    """The text to measure on.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return load_corpus(recipe.evaluation.texts[0], field=recipe.evaluation.field)
    except DataError as error:
        raise DataError(f"{error} (evaluation text: --text FILE; --text demo-eval is bundled)") from error


def _scores(
    source: Checkpoint, groups: Groups, recipe: Recipe, corpus: Corpus | None, results: Results
) -> Mapping[str, torch.Tensor]:
    """What chooses the units that go, by the recipe's criterion; the text it needed goes into the protocol."""
    chosen = groups_to_cut(groups, recipe.prune.kinds)
    batches = [] if corpus is None else [calibration_batch(source, corpus, recipe, results)]
    return score(source.model, chosen, batches, criterion_of(recipe.prune, recipe.seed), recipe.prune.reduction)


def _protocol(recipe: Recipe, results: Results) -> dict[str, Any]:
    """What the analysis depends on beside what it knows itself."""
    return {
        "model_sha256": results["model"]["sha256"],
        "model_source": results["model"]["source"],
        "proxy": recipe.prune.criterion,
        "seed": recipe.seed,
        "calibration": results["protocol"].get("calibration"),
        "versions": results["protocol"]["versions"],
    }
