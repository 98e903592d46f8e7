"""The knowledge distribution of a checkpoint: measured, kept while it is measured, written, drawn."""

from __future__ import annotations

import hashlib
import json
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
from secateur.importance import Taylor, score
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
    _check_files(json_file, picture, resume)
    corpus = _evaluation_text(recipe)
    scored_on = calibration_corpus(recipe) if isinstance(criterion_of(recipe.prune, recipe.seed), Taylor) else None
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
    kept = Measured(json_file, hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest(), resume)
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


class Measured:
    """Losses measured so far, kept beside the result so that a kill loses one at most.

    The first line of the file is the hash of what they depend on, each other line a loss.

    Attributes:
        losses: (group, units removed) -> nats per token.
        key: hash of the model and everything else they depend on.

    Raises:
        KnowledgeError: what is to be resumed has another key.
    """

    def __init__(self, result: Path | None, key: str, resume: bool) -> None:
        self.key = key
        self.file = None if result is None else result.with_name(result.name + ".work")
        self.losses: dict[tuple[str, int], float] = {}
        if result is not None and self.file is not None and resume:
            if self.file.exists():
                self._read(self.file)
            elif result.exists():
                self._read_result(result)
        self._begun = False

    def add(self, group: str, removed: int, loss: float) -> None:
        """Keep a loss."""
        self.losses[group, removed] = loss
        if self.file is None:
            return
        if not self._begun:  # what was read is written again: the last line may have been cut short
            temporary = self.file.with_name(self.file.name + ".part")
            lines = [json.dumps(self.key), *(json.dumps([*cut, loss]) for cut, loss in self.losses.items())]
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
            temporary.replace(self.file)
            self._begun = True
            return
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps([group, removed, loss]) + "\n")

    def forget(self) -> None:
        """Remove the file: the result holds everything."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def _read(self, file: Path) -> None:
        first, *lines = file.read_text(encoding="utf-8").split("\n")
        self._check(json.loads(first) if first.endswith('"') else None, file)
        for line in lines:
            if line.endswith("]"):
                group, removed, loss = json.loads(line)
                self.losses[group, removed] = loss

    def _read_result(self, file: Path) -> None:
        knowledge = Knowledge.load(file)
        self._check(json.loads(file.read_text(encoding="utf-8")).get("key"), file)
        self.losses = {(trial.group, trial.removed): trial.loss for trial in knowledge.trials}

    def _check(self, key: str | None, file: Path) -> None:
        if key != self.key:
            raise KnowledgeError(
                f"{file} holds an analysis of another model, text or setting, or by other versions; leave out --resume "
                "to begin anew, or choose another --json"
            )


def _check_files(json_file: Path | None, picture: Path | None, resume: bool) -> None:
    """Find out before anything is measured whether results can be written.

    Raises:
        KnowledgeError: they cannot, or there is nothing to resume from.
    """
    if resume and json_file is None:
        raise KnowledgeError("--resume goes on from what is kept beside the result: say which with --json FILE")
    if picture is not None:
        check_picture(picture)
    for file in filter(None, (json_file, picture)):
        if not file.absolute().parent.is_dir() or file.is_dir():
            raise KnowledgeError(f"{file} cannot be written: it is a folder, or there is none to hold it")


def _evaluation_text(recipe: Recipe) -> Corpus:
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
