"""The command line: reads flags, calls the pipeline, prints tables. Exit code 0 done, 2 wrong input, 1 a defect."""

from __future__ import annotations

import logging
import os
import sys

import typer

from secateur.cli.adapters import tune
from secateur.cli.analysis import analyze, audit
from secateur.cli.change import prune, recover
from secateur.cli.common import out
from secateur.cli.evaluate import eval_
from secateur.cli.inspect import bench, groups
from secateur.cli.recipes import demo, recipes_app, run
from secateur.cli.report import compare, report
from secateur.cli.ship import export
from secateur.errors import SecateurError

__all__ = ["app", "main", "out"]

# What transformers and peft import where it is installed, and which warns of kernels that are not.
TALKATIVE = ("torchao", "bitsandbytes", "torch.utils._pytree")
# What keeps bars and advice of other libraries out of logs; they are read when those are imported. The user's own win.
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
}

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
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
    try:
        app()
    except SecateurError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
