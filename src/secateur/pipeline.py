"""The steps of the whole job, each from one checkpoint folder to the next, and the recipe that joins them."""

from __future__ import annotations

import json
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from secateur import checkpoint as checkpoints
from secateur.allocation import Budget
from secateur.benchmark import bench
from secateur.checkpoint import Checkpoint, output_folder
from secateur.config import EvaluationSettings, PruneSettings, Recipe, RecoverSettings, dump_recipe
from secateur.data import calibration_tokens, load_corpus
from secateur.errors import BudgetError, CheckpointError, PlanError, RecipeError
from secateur.evaluation import perplexity
from secateur.export.tiers import plainest, tiers
from secateur.importance import CRITERIA, Criterion, Random, Taylor
from secateur.methods import llm_pruner
from secateur.plan import PruningPlan
from secateur.recovery import RecoverySettings, recover
from secateur.surgery import pad, slice

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Results = dict[str, Any]
SCHEMA = 1
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


def prune(recipe: Recipe, output: Path, *, plan: Path | None = None, overwrite: bool = False) -> Results:
    """Prune the recipe's model into the folder `output`, evaluated before and after on the recipe's texts.

    Args:
        plan: replay this plan instead of scoring.

    Raises:
        SecateurError: for anything wrong with the input; nothing is written then.
    """
    wanted = recipe.prune
    if plan is None and wanted.param_sparsity is None and wanted.unit_sparsity is None and not wanted.kind_ratios:
        raise BudgetError("say how much to remove: prune.param_sparsity, or prune.unit_sparsity as the papers count")
    with output_folder(output, overwrite=overwrite) as folder:
        clock = Clock()
        clock.begin("load")
        source = load_model(recipe, to_change=True)
        dense = source.model.num_parameters()
        results = header("prune", source, recipe)
        results["perplexity"] = {}
        clock.begin("evaluate_dense")
        add_perplexity(results, "dense", source, source.model, recipe.evaluation)
        small, used = _cut(source, recipe, plan, clock, results)
        small = in_tier(small, wanted.tier, results)
        clock.begin("evaluate_pruned")
        add_perplexity(results, "pruned", source, small, recipe.evaluation)
        clock.end()
        pruned = small.num_parameters()
        results["params"] = {"dense": dense, "pruned": pruned, "sparsity": round(1 - pruned / dense, 6)}
        results["timing"] = clock.seconds
        results["memory"] = peak_memory()
        used = PruningPlan(used.kept, used.units, {**used.provenance, **results["protocol"]})
        checkpoints.write(small, folder, tokenizer=source.tokenizer, plan=used, results=results, base=source)
        results["parity"] = checkpoints.verify_in_fresh_process(folder, small, source.tokenizer).to_json()
        write_json(folder / "results.json", results)
    return results


def _cut(
    source: Checkpoint, recipe: Recipe, plan: Path | None, clock: Clock, results: Results
) -> tuple[PreTrainedModel, PruningPlan]:
    """The smaller model and the plan behind it, chosen now or replayed."""
    if plan is not None:
        replayed = PruningPlan.load(plan)
        made_for = replayed.provenance.get("model_sha256")
        if made_for and made_for != source.sha256:
            raise PlanError(
                f"{plan} was made for another model: sha256 {made_for[:12]}..., here {str(source.sha256)[:12]}..."
            )
        clock.begin("cut")
        return slice(source.model, replayed), replayed
    batches = [calibration_batch(source, recipe, results)]
    result = llm_pruner.run(source.model, batches, method_settings(recipe.prune, recipe.seed), clock.begin)
    results["left_whole"] = dict(result.left_whole)
    return result.model, result.plan


def in_tier(small: PreTrainedModel, wanted: str, results: Results) -> PreTrainedModel:
    """The model in the form asked for, `auto` being the plainest that loses nothing; what each would cost is noted."""
    found = tiers(small)
    chosen = next((t for t in found if t.name == wanted), plainest(found))
    if chosen.parameters is None:
        raise PlanError(f"the tier {wanted} is not possible: {chosen.reason}")
    results["tier"] = {"chosen": chosen.name, "tiers": [t.to_json() for t in found]}
    return pad(small) if chosen.name == "padded" else small


def method_settings(prune: PruneSettings, seed: int) -> llm_pruner.LLMPruner:
    """The method's settings that a recipe describes."""
    unlimited = prune.param_sparsity is None and prune.unit_sparsity is None
    criterion: Criterion = CRITERIA[prune.criterion]
    if isinstance(criterion, Random):
        criterion = replace(criterion, seed=seed)
    if isinstance(criterion, Taylor):
        criterion = replace(criterion, gradient_checkpointing=prune.gradient_checkpointing)
    return llm_pruner.LLMPruner(
        budget=None if unlimited else Budget(prune.param_sparsity, prune.unit_sparsity),
        criterion=criterion,
        mode=prune.mode,
        kinds=prune.kinds or (tuple(prune.kind_ratios) if unlimited else ()),
        reduction=prune.reduction,
        ranking=prune.ranking,
        iterations=prune.iterations,
        uniform=prune.same_widths,
        round_to=prune.round_to,
        protect_first=prune.protect_first,
        protect_last=prune.protect_last,
        layer_ratios=prune.layer_ratios,
        kind_ratios=prune.kind_ratios,
        layer_choice=prune.layer_choice,
    )


def calibration_batch(source: Checkpoint, recipe: Recipe, results: Results) -> torch.Tensor:
    """Calibration tokens [samples, seq_len]; where they come from goes into the protocol."""
    wanted = recipe.prune.calibration
    corpus = load_corpus(wanted.source, field=wanted.field)
    tokens = calibration_tokens(corpus, needs_tokenizer(source), wanted.samples, wanted.seq_len, recipe.seed)
    results["protocol"]["calibration"] = {
        "source": wanted.source,
        "sha256": corpus.sha256,
        "samples": wanted.samples,
        "seq_len": wanted.seq_len,
    }
    return tokens


def recover_checkpoint(
    recipe: Recipe, folder_in: Path | str, output: Path, *, resume: bool = False, overwrite: bool = False
) -> Results:
    """Recover a (pruned) checkpoint with LoRA into the folder `output`: merged model, and the adapter beside it.

    Training checkpoints lie in `<output>.work` until the run ends; `resume` continues from the last one.

    Raises:
        SecateurError: for anything wrong with the input.
    """
    assert recipe.recovery is not None
    settings = recipe.recovery
    work = output.with_name(output.name + ".work")
    if work.exists() and not resume:
        shutil.rmtree(work)
    with output_folder(output, overwrite=overwrite) as folder:
        clock = Clock()
        clock.begin("load")
        source = load_model(recipe, folder_in, to_change=True)
        results = header("recover", source, recipe)
        results["perplexity"] = {}
        corpora = [load_corpus(name, field=settings.field) for name in settings.data]
        clock.begin("evaluate_pruned")
        add_perplexity(results, "pruned", source, source.model, recipe.evaluation)
        clock.begin("recover")
        outcome = recover(
            source.model,
            needs_tokenizer(source),
            corpora,
            recovery_settings(settings, recipe.seed),
            work,
            evaluate=lambda model: values(source, model, recipe.evaluation),
            resume=resume,
        )
        clock.begin("evaluate_recovered")
        add_perplexity(results, "recovered", source, outcome.model, recipe.evaluation)
        clock.end()
        results["params"] = {"recovered": outcome.model.num_parameters()}
        results["recovery"] = {
            "settings": asdict(recovery_settings(settings, recipe.seed)),
            "data": [{"source": c.source, "sha256": c.sha256} for c in corpora],
            "log": outcome.log,
        }
        results["timing"], results["memory"] = clock.seconds, peak_memory()
        base = replace(source, source=recipe.model.source)  # not the pruned folder in between
        checkpoints.write(outcome.model, folder, tokenizer=source.tokenizer, results=results, base=base)
        shutil.copytree(outcome.adapter, folder / "adapter")
        results["parity"] = checkpoints.verify_in_fresh_process(folder, outcome.model, source.tokenizer).to_json()
        write_json(folder / "results.json", results)
    shutil.rmtree(work, ignore_errors=True)
    return results


def recovery_settings(settings: RecoverSettings, seed: int) -> RecoverySettings:
    """What the recovery room needs of a recipe's recovery section."""
    chosen = settings.model_dump(exclude={"data", "field"}, exclude_none=True)
    return RecoverySettings(**chosen, seed=seed)


def run_recipe(recipe: Recipe, output: Path, *, resume: bool = False, overwrite: bool = False) -> Results:
    """Run a recipe from start to end into a run folder: `pruned/`, `recovered/`, `recipe.yaml`, `results.json`.

    With `resume`, stages whose folder is complete are not repeated, and training goes on from its last checkpoint.

    Raises:
        SecateurError: for anything wrong with the input, or a run folder made by another recipe.
    """
    _open_run(recipe, output, resume, overwrite)
    pruned, recovered = output / "pruned", output / "recovered"
    results = _finished(pruned) or prune(recipe, pruned)
    if recipe.recovery is not None:
        after = _finished(recovered) or recover_checkpoint(recipe, pruned, recovered, resume=resume)
        results = joined(results, after)
    if recipe.benchmark:
        dense = load_model(recipe)
        small = load_model(recipe, recovered if recipe.recovery else pruned)
        results["benchmark"] = bench(small.model, against=dense.model).to_json()
    results["command"] = "run"
    write_json(output / "results.json", results)
    return results


def _open_run(recipe: Recipe, output: Path, resume: bool, overwrite: bool) -> None:
    """Make the run folder, or check that the one to resume belongs to this recipe."""
    text = dump_recipe(recipe)
    file = output / "recipe.yaml"
    if resume and file.exists() and file.read_text() != text:
        raise RecipeError(f"{output} holds a run of another recipe ({file}); choose another output folder")
    if output.exists() and any(output.iterdir()) and not resume:
        if not overwrite:
            raise CheckpointError(f"{output} exists and is not empty; choose another folder, --resume or --overwrite")
        shutil.rmtree(output)
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def _finished(folder: Path) -> Results | None:
    """The results of a stage that was completed before (folders appear only when complete)."""
    file = folder / "results.json"
    return json.loads(file.read_text()) if file.exists() else None


def evaluate(source: Checkpoint, recipe: Recipe, *, adapter: Path | None = None) -> Results:
    """Perplexity of one checkpoint, with a PEFT adapter on top if given, on every text and length of the recipe.

    Raises:
        CheckpointError: the adapter does not load on this model.
    """
    results = header("eval", source, recipe)
    model = source.model
    if adapter is not None:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise CheckpointError(f"cannot put the adapter {adapter} on {source.source}: {error}") from error
        results["adapter"] = str(adapter)
    results["perplexity"] = {name: p.to_json() for name, p in measured(source, model, recipe.evaluation)}
    results["memory"] = peak_memory()
    return results


def benchmark(recipe: Recipe, against: str | None, settings: Mapping[str, Any]) -> Results:
    """Parameters, MACs, memory and speed of one checkpoint, against a second one in the same process if given."""
    source = load_model(recipe)
    other = load_model(recipe, against).model if against else None
    results = header("bench", source, recipe)
    results["benchmark"] = bench(source.model, against=other, **settings).to_json()
    results["memory"] = peak_memory()
    return results


def prune_and_recover(recipe: Recipe, output: Path, *, plan: Path | None = None, overwrite: bool = False) -> Results:
    """`prune` and `recover_checkpoint` in one go; only the recovered checkpoint is kept, with the plan beside it."""
    with output_folder(output, overwrite=overwrite) as folder:
        pruned = folder / "pruned"
        results = prune(recipe, pruned, plan=plan)
        after = recover_checkpoint(recipe, pruned, folder / "recovered")
        results = joined(results, after)
        for file in (folder / "recovered").iterdir():
            shutil.move(str(file), folder / file.name)
        shutil.move(str(pruned / "plan.json"), folder / "plan.json")
        shutil.rmtree(pruned)
        (folder / "recovered").rmdir()
        write_json(folder / "results.json", results)
    return results


def joined(pruned: Results, recovered: Results) -> Results:
    """The results of pruning with those of recovery filed beside them."""
    perplexity = {name: dict(figures) for name, figures in pruned["perplexity"].items()}
    for name, figures in recovered["perplexity"].items():
        perplexity.setdefault(name, {}).update(recovered=figures["recovered"])
    times = {k: v for k, v in recovered["timing"].items() if k in ("recover_s", "evaluate_recovered_s")}
    return {
        **pruned,
        "perplexity": perplexity,
        "timing": pruned["timing"] | times,
        "recovery": recovered["recovery"],
        "parity": recovered["parity"],
    }


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


def add_perplexity(
    results: Results, stage: str, source: Checkpoint, model: PreTrainedModel, settings: EvaluationSettings
) -> None:
    """Measure one stage (`dense`, `pruned`, `recovered`) and file the values beside the others."""
    for name, p in measured(source, model, settings):
        facts = {k: v for k, v in p.to_json().items() if k != "value"}
        results["perplexity"].setdefault(name, facts)[stage] = p.value


def load_model(recipe: Recipe, source: Path | str | None = None, *, to_change: bool = False) -> Checkpoint:
    """The recipe's model, or another checkpoint loaded in the same way; `to_change` as in `checkpoint.load`."""
    wanted = recipe.model
    return checkpoints.load(
        source or wanted.source,
        dtype=wanted.dtype,
        device=wanted.device,
        trust_remote_code=wanted.trust_remote_code,
        to_change=to_change,
    )


def needs_tokenizer(source: Checkpoint) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer.

    Raises:
        CheckpointError: it has none.
    """
    if source.tokenizer is None:
        raise CheckpointError(f"{source.source} has no tokenizer, and text must be read; save one beside the model")
    return source.tokenizer


def header(command: str, source: Checkpoint, recipe: Recipe) -> Results:
    """The part of `results.json` that every command has."""
    return {
        "schema": SCHEMA,
        "command": command,
        "model": {"source": str(source.source), "sha256": source.sha256, "architecture": source.architecture},
        "protocol": {
            "model_sha256": source.sha256,
            "seed": recipe.seed,
            "dtype": str(source.model.dtype).removeprefix("torch."),
            "device": str(source.model.device),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
            "settings": recipe.prune.model_dump(mode="json", exclude={"calibration"}) if command == "prune" else {},
        },
    }


def peak_memory() -> dict[str, int | None]:
    """Peak resident memory of this process, and of the accelerator if there is one [bytes]."""
    accelerator = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_rss_bytes": kilobytes * 1024, "peak_accelerator_bytes": accelerator}


def write_json(path: Path, data: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write JSON through a temporary file, so that a reader never sees half of it."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
