"""What every command shares: loading by recipe, evaluation, and the parts of `results.json`."""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur import checkpoint as checkpoints
from secateur.benchmark import count_macs
from secateur.checkpoint import Checkpoint
from secateur.config import EvaluationSettings, Recipe
from secateur.data import load_corpus
from secateur.errors import CheckpointError
from secateur.evaluation import NEW_TOKENS, continuation, perplexity
from secateur.export.tiers import PROMPT_LENGTH
from secateur.plan import PruningPlan
from secateur.surgery.per_layer import is_per_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Results = dict[str, Any]
SCHEMA = 1
REPEATABLE = ("prune", "recover", "tune")  # whose recipe goes into the results, for `secateur report`
PACKAGES = ("secateur", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors")


@dataclass
class Clock:
    """Seconds spent in named steps, and who wants to know when one begins."""

    seconds: dict[str, float] = field(default_factory=dict)
    quiet: bool = False
    _name: str = ""
    _since: float = 0.0

    def begin(self, name: str) -> None:
        """End the running step and begin `name`."""
        self.end()
        self._name, self._since = name, time.perf_counter()
        if not self.quiet:
            print(f"- {name}", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._name:
            spent = self.seconds.get(f"{self._name}_s", 0.0) + time.perf_counter() - self._since
            self.seconds[f"{self._name}_s"] = round(spent, 3)
            self._name = ""


def load_model(recipe: Recipe, source: Path | str | None = None, *, to_change: bool = False) -> Checkpoint:
    """The recipe's model, or another checkpoint loaded in the same way; `to_change` as in `checkpoint.load`."""
    wanted = recipe.model
    return checkpoints.load(
        source or wanted.source,
        dtype=wanted.dtype,
        device=wanted.device,
        trust_remote_code=wanted.trust_remote_code,
        to_change=to_change,
        quantise=wanted.quantize,
    )


def needs_tokenizer(source: Checkpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        CheckpointError: it has none.
    """
    if source.tokenizer is None:
        raise CheckpointError(f"{source.source} has no tokenizer, and text must be read; save one beside the model")
    return source.tokenizer


def header(command: str, source: Checkpoint, recipe: Recipe, plan: PruningPlan | None = None) -> Results:
    """The part of `results.json` that every command has.

    Args:
        plan: that is replayed: its provenance says how units were chosen, and the recipe's settings do not.
    """
    earlier = checkpoints.earlier(source) if command in checkpoints.WRITERS else None
    choice: Results = {"settings": {}}
    if command == "prune" and plan is None:
        settings = recipe.prune.model_dump(mode="json", exclude={"calibration"})
        choice = {"method": recipe.method.name, "settings": settings}
    return {
        "schema": SCHEMA,
        "command": command,
        "model": {"source": str(source.source), "sha256": source.sha256, "architecture": source.architecture},
        "protocol": {
            "model_sha256": source.sha256,
            "seed": recipe.seed,
            "dtype": str(source.model.dtype).removeprefix("torch."),
            "device": str(source.model.device),
            **({"quantised": packed} if (packed := checkpoints.quantisation(source.model.config)) else {}),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
            **choice,
        },
        **({"recipe": recipe.model_dump(mode="json")} if command in REPEATABLE else {}),
        **({"plan": {"provenance": dict(plan.provenance)}} if plan is not None else {}),
        **({"before": earlier} if earlier is not None else {}),
    }


def class_note(before: PreTrainedModel, after: PreTrainedModel) -> str | None:
    """What to say where a model is saved as another stock class than the one it was; None if it is not."""
    was: Any = type(before).base if is_per_layer(before) else type(before)  # type: ignore[attr-defined]
    if is_per_layer(after) or type(after).__name__ == was.__name__:
        return None
    return (
        f"saved as {type(after).__name__}: {was.__name__} refuses these sizes; with the same parameters both compute "
        "the same, which the logits showed"
    )


def write_checked(
    model: PreTrainedModel, folder: Path, source: Checkpoint, results: Results, plan: PruningPlan | None = None
) -> None:
    """Fill an existing folder with a checkpoint, load it in a fresh process, and write what tells about it.

    Args:
        source: what the model was made from.
        results: parity is added.

    Raises:
        CheckpointError: it does not load, or gives other logits.
    """
    checkpoints.write(model, folder, tokenizer=source.tokenizer, base=source)
    results["parity"] = checkpoints.verify_in_fresh_process(folder, model, source.tokenizer).to_json()
    checkpoints.write_about(checkpoints.checkpoint_form(model), folder, plan=plan, results=results, base=source)


def measured(source: Checkpoint, model: PreTrainedModel, settings: EvaluationSettings) -> Iterator[tuple[str, Any]]:
    """(name, Perplexity) for every text and length; the length is part of the name if there are several."""
    for text in settings.texts:
        corpus = load_corpus(text, field=settings.field)
        for seq_len in settings.seq_len:
            name = corpus.name if len(settings.seq_len) == 1 else f"{corpus.name}@{seq_len}"
            yield (
                name,
                perplexity(
                    model,
                    needs_tokenizer(source),
                    corpus,
                    seq_len=seq_len,
                    stride=settings.stride,
                    bos=settings.bos,
                    batch_size=settings.batch_size,
                ),
            )


def values(source: Checkpoint, model: PreTrainedModel, settings: EvaluationSettings) -> dict[str, float]:
    """Perplexity by name, nothing else."""
    return {name: p.value for name, p in measured(source, model, settings)}


def add_stage(
    results: Results, stage: str, source: Checkpoint, model: PreTrainedModel, settings: EvaluationSettings
) -> None:
    """Measure one stage (`dense`, `pruned`, `recovered`) and file its perplexities and samples beside the others'.

    Where there is a text to measure on, the model also continues the settings' prompts, which goes under `samples`.
    """
    for name, p in measured(source, model, settings):
        facts = {k: v for k, v in p.to_json().items() if k != "value"}
        results["perplexity"].setdefault(name, facts)[stage] = p.value
    if settings.texts and settings.prompts:
        told = {"prompts": list(settings.prompts), "new_tokens": NEW_TOKENS, "decoding": "greedy"}
        tokenizer = needs_tokenizer(source)
        made = [continuation(model, tokenizer, prompt) for prompt in settings.prompts]
        results.setdefault("samples", told | {"continuations": {}})["continuations"][stage] = made


def add_macs(results: Results, stage: str, model: PreTrainedModel) -> None:
    """Count the multiply-accumulates of one prompt and file them beside those of the other stages.

    Nothing is filed for weights that are packed, whose products the counter does not know.
    """
    if checkpoints.quantisation(model.config) is None:
        counted = {stage: count_macs(model, PROMPT_LENGTH)}
        results["macs"] = {"prompt_length": PROMPT_LENGTH} | results.get("macs", {}) | counted


def peak_memory() -> dict[str, int | None]:
    """Peak resident memory of this process, and of the accelerator if there is one [bytes]."""
    accelerator = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_rss_bytes": kilobytes * 1024, "peak_accelerator_bytes": accelerator}


def write_json(path: Path, data: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write JSON, so that a reader never sees half of it."""
    write_whole(path, json.dumps(data, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a text through a temporary file."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
