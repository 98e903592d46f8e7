"""The whole job by a recipe, each stage a folder, resumed where it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from secateur import report
from secateur.benchmark import bench
from secateur.checkpoint import put_aside, put_back
from secateur.config import Recipe, dump_recipe
from secateur.errors import CheckpointError, RecipeError
from secateur.evaluation import Prepared
from secateur.pipeline.before_cut import adapted_steps
from secateur.pipeline.measuring import with_adapter
from secateur.pipeline.pruning import prune
from secateur.pipeline.results import Results, load_model, write_json, write_whole
from secateur.pipeline.tasks import prepared_tasks, stage, tasks_of_stages


def run_recipe(recipe: Recipe, output: Path, *, resume: bool = False, overwrite: bool = False) -> Results:
    """Run a recipe from start to end into a run folder: `pruned/`, `recovered/`, `recipe.yaml`, `results.json`,
    `report.html`.

    A recipe with a `tune` section makes `adapter/` instead of the first two. Where tasks are to be measured, `tasks/`
    holds the scores of each stage. With `resume`, stages whose folder is complete are not repeated, training goes on
    from its last checkpoint, and no task asks a model twice.

    Raises:
        SecateurError: for anything wrong with the input, or a run folder made by another recipe.
    """
    prepared = prepared_tasks(recipe.evaluation)
    with _open_run(recipe, output, resume, overwrite) as begun:
        stages = _tuned if recipe.tune else _run
        results = stages(recipe, output, prepared, resume, begun)
        results |= {"command": "run", "recipe": recipe.model_dump(mode="json")}
        write_json(output / "results.json", results)
    write_report([output], output)
    return results


def write_report(runs: Sequence[Path], folder: Path) -> Path:
    """Write the report of run folders into a folder, from their results.

    Raises:
        ReportError: the results do not follow their schema, or the report cannot be written.
    """
    file = folder / report.PAGE
    report.write_text(file, report.page(report.read_runs(runs)))
    return file


def _tuned(
    recipe: Recipe, output: Path, prepared: Sequence[Prepared], resume: bool, begun: Callable[[], None]
) -> Results:
    """An adapter, and what it does on tasks."""
    from secateur.pipeline.tuning import tune  # as below: peft takes seconds

    adapter = output / "adapter"
    results = _finished(adapter) or tune(recipe, adapter, resume=resume)
    begun()
    if prepared:
        tuned = stage(recipe, adapt=lambda base: with_adapter(base, adapter))
        tasks_of_stages(results, recipe, prepared, output / "tasks", {"dense": stage(recipe), "tuned": tuned})
    return results


def _run(
    recipe: Recipe, output: Path, prepared: Sequence[Prepared], resume: bool, begun: Callable[[], None]
) -> Results:
    """The stages of a recipe that are not complete yet, and the results of them all."""
    pruned, recovered = output / "pruned", output / "recovered"
    if recipe.method.trains:
        from secateur.pipeline.training import prune_while_training

        results = _finished(pruned) or prune_while_training(recipe, pruned, resume=resume)
    else:
        results = _finished(pruned) or prune(recipe, pruned, resume=resume)
    begun()
    if recipe.recovers:
        from secateur.pipeline.recovering import joined, recover_checkpoint

        after = _finished(recovered) or recover_checkpoint(
            recipe, pruned, recovered, steps_before=adapted_steps(results), resume=resume
        )
        results = joined(results, after)
    if prepared:
        stages = {"dense": stage(recipe), "pruned": stage(recipe, pruned)}
        stages |= {"recovered": stage(recipe, recovered)} if recipe.recovers else {}
        tasks_of_stages(results, recipe, prepared, output / "tasks", stages)
    if recipe.benchmark:
        dense = load_model(recipe)
        small = load_model(recipe, recovered if recipe.recovers else pruned)
        results["benchmark"] = bench(small.model, against=dense.model).to_json()
    return results


@contextmanager
def _open_run(recipe: Recipe, output: Path, resume: bool, overwrite: bool) -> Iterator[Callable[[], None]]:
    """Make the run folder, or check that the one to resume belongs to this recipe.

    If the block fails and nothing but the recipe is in it, it goes, and one that it was to overwrite is put back.

    Yields:
        What to call when a stage is complete: nothing is put back then.
    """
    text, folder = dump_recipe(recipe), output.resolve()  # a link stays one
    file = folder / "recipe.yaml"
    put_back(folder)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{output} is a file; choose another folder for the run")
    if resume and file.exists() and file.read_text() != text:
        raise RecipeError(f"{output} holds a run of another recipe ({file.name}); choose another output folder")
    replaces = folder.exists() and any(folder.iterdir()) and not resume
    if replaces and not overwrite:
        raise CheckpointError(f"{output} exists and is not empty; choose another folder, --resume or --overwrite")
    with put_aside(folder) if replaces else nullcontext(lambda: None) as begun:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write_whole(file, text)
        try:
            yield begun
        except BaseException:
            if list(folder.iterdir()) == [file]:
                shutil.rmtree(folder)
            raise


def _finished(folder: Path) -> Results | None:
    """The results of a stage that was completed before (folders appear only when complete)."""
    file = folder / "results.json"
    return json.loads(file.read_text()) if file.exists() else None
