"""A part of a benchmark in a process of its own, since the peak memory of a process never falls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def figures_of(script: str, options: Sequence[str]) -> dict[str, Any]:
    """What a script prints last, as JSON; `failed` with the last line of its error if it fails."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"}  # freed blocks go back to the system
    done = subprocess.run([sys.executable, script, *options], env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def passed_on(args: Any, names: Sequence[str]) -> list[str]:
    """Options of this script as options of the process."""
    return [part for name in names for part in ("--" + name.replace("_", "-"), str(getattr(args, name)))]
