"""Generated programs, run in a process of their own: with limits on time and memory, and without a network."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).with_name("code_process.py")
SECONDS = 10
MEMORY = 1 << 30
# A network namespace of its own has no network at all; the second form needs no root where users may make namespaces.
NAMESPACES = (("unshare", "--net"), ("unshare", "--user", "--map-root-user", "--net"))


@functools.cache
def without_network() -> tuple[str, ...]:
    """The command that starts a program in a network namespace of its own; empty where there is none."""
    for command in NAMESPACES:
        if shutil.which(command[0]) and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
            return command
    return ()


def protection() -> dict[str, Any]:
    """How programs are kept in check here."""
    namespace = without_network()
    network = f"none ({' '.join(namespace)})" if namespace else "sockets refused by an audit hook in the process"
    return {"seconds": SECONDS, "memory_bytes": MEMORY, "network": network}


def passes(program: str, *, seconds: int = SECONDS, memory: int = MEMORY) -> bool:
    """Whether a program runs to its end, within limits and without an exception.

    It runs in a Python of its own with nothing of this process's environment, in a folder that goes afterwards.

    Args:
        seconds: of the clock, and of the processor.
        memory: address space in bytes.
    """
    token = secrets.token_hex(16)
    command = [*without_network(), sys.executable, "-I", "-B", str(SCRIPT), str(seconds), str(memory)]
    with tempfile.TemporaryDirectory(prefix="secateur-code-") as folder:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": os.defpath},
            start_new_session=True,
        )
        try:
            answer, _ = process.communicate(json.dumps({"program": program, "token": token}).encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            answer = b""
        finally:
            _end(process)
    return answer == token.encode()


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with everything that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def completions(responses: Sequence[Sequence[str]], documents: Sequence[dict[str, Any]]) -> list[list[str]]:
    """What the model wrote, each with the prompt in front of it."""
    return [[doc["prompt"] + answer for answer in answers] for answers, doc in zip(responses, documents, strict=True)]


def pass_at_1(references: Sequence[str], predictions: Sequence[Sequence[str]], **_: Any) -> dict[str, float]:
    """pass@1 of one item: the share of its completions with which its tests pass.

    Chen et al., Evaluating Large Language Models Trained on Code (https://arxiv.org/abs/2107.03374), with k = 1.
    """
    (tests,), (programs,) = references, predictions
    return {"pass@1": sum(passes(f"{program}\n{tests}") for program in programs) / len(programs)}
