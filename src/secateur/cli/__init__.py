"""The command line: reads flags, calls the pipeline, prints tables. Exit code 0 done, 2 wrong input, 1 a defect."""

from __future__ import annotations

import sys

import typer

from secateur.cli.adapters import tune
from secateur.cli.analysis import analyze, audit
from secateur.cli.change import prune
from secateur.cli.common import out
from secateur.cli.evaluate import eval_
from secateur.cli.inspect import bench, groups
from secateur.cli.recipes import demo, recipes_app, run
from secateur.cli.recovering import recover
from secateur.cli.report import compare, report
from secateur.cli.ship import export
from secateur.errors import SecateurError
from secateur.quiet import quiet_libraries

__all__ = ["app", "main", "out"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make a large language model smaller and faster by cutting whole structures out of it.",
)
app.command()(groups)
app.command()(prune)
app.command()(recover)
app.command()(tune)
app.command()(analyze)
app.command()(audit)
app.command(name="eval")(eval_)
app.command()(bench)
app.command()(export)
app.command()(run)
app.command()(report)
app.command()(compare)
app.add_typer(recipes_app, name="recipes")
app.command()(demo)


def main() -> None:
    """Entry point of the `secateur` command."""
    quiet_libraries(in_logs=not sys.stderr.isatty())
    try:
        app()
    except SecateurError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
