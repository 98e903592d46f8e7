"""Verbs of whole jobs: run, recipes, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli.adapters import print_adapter
from secateur.cli.common import Overwrite, out, print_results, print_tasks
from secateur.cli.sweeps import run_sweep

recipes_app = typer.Typer(no_args_is_help=True, help="The recipes that ship with Secateur.")


def run(
    recipe: Annotated[str, typer.Argument(help="Recipe file, or the name of a recipe that ships with Secateur.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, for example prune.param_sparsity=0.3")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder.")] = Path("run"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run; a sweep always does.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Of a sweep: runs at once; as memory and cores allow if not given.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Run a recipe from start to end, or all runs of a sweep."""
    from secateur.config import Sweep, load_job
    from secateur.errors import RecipeError

    loaded = load_job(recipe, overrides or [])
    if isinstance(loaded, Sweep):
        run_sweep(loaded, output, workers, overwrite)
        return
    if workers is not None:
        raise RecipeError(f"--workers is for sweeps, and {recipe} has no section sweep")
    from secateur import pipeline  # which takes seconds, after what is wrong has been told

    results = pipeline.run_recipe(loaded, output, resume=resume, overwrite=overwrite)
    (print_results if loaded.tune is None else print_adapter)(results)
    print_tasks(results)
    out.print(f"run folder: {output}; open {output / 'report.html'} in a browser", soft_wrap=True)


@recipes_app.command("ls")
def recipes_ls() -> None:
    """Names of all recipes."""
    from secateur.config import list_recipes

    for name in list_recipes():
        print(name)


@recipes_app.command("show")
def recipes_show(name: Annotated[str, typer.Argument()]) -> None:
    """Print a recipe."""
    from secateur.config import recipe_text

    print(recipe_text(name), end="")


@recipes_app.command("validate")
def recipes_validate(
    file: Annotated[str, typer.Argument()],
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
) -> None:
    """Check a recipe without running it."""
    from secateur.config import Sweep, load_job

    loaded = load_job(file, overrides or [])
    print(f"{file}: valid" + (f", a sweep of {len(loaded.combinations)} runs" if isinstance(loaded, Sweep) else ""))


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Run folder.")] = Path("demo-run"),
) -> None:
    """Prune and recover the bundled model by 20 % and 50 %, and show what it costs."""
    from secateur.demo import run_demo

    run_demo(output, out)
