"""Reports of a recipe's training: refused before anything long, kept beside what was trained."""

from __future__ import annotations

import shutil
from pathlib import Path

from secateur.config import Recipe


def check_reporting(recipe: Recipe) -> None:
    """Make sure that a recipe's training can report to what it names.

    Raises:
        RecipeError: a package is not installed.
    """
    if recipe.recovery is not None:
        from secateur.recovery import check_reporters  # imported where something trains: peft takes seconds

        check_reporters(recipe.recovery.report_to)


def keep_logs(work: Path, folder: Path) -> None:
    """Copy what reports wrote while training, if anything, into the folder of what was trained."""
    from secateur.recovery import LOGS

    if (work / LOGS).is_dir():
        shutil.copytree(work / LOGS, folder / LOGS, symlinks=True)
