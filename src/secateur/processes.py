"""A call in a process of its own, whose output goes to a file from the first import on."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pickle
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from secateur.errors import ProcessError
from secateur.quiet import quiet_libraries

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class OwnProcess:
    """A call that begins now in a fresh process, and ends when this process does, however it does.

    Args:
        function: of a module; what it returns must be picklable, as its arguments.
        arguments: of it.
        log: file to which its output is appended.
        threads: that it computes with.
    """

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...], log: Path, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.log = log
        self._result, sends = context.Pipe(duplex=False)
        call = pickle.dumps((function, arguments))  # unpickled there only when the output goes to the log
        self._process: BaseProcess = context.Process(target=_run, args=(call, str(log), threads, sends))
        self._process.start()
        sends.close()

    @property
    def sentinel(self) -> int:
        """Ready, in the words of `multiprocessing.connection.wait`, when the process has ended."""
        return self._process.sentinel

    def result(self) -> Any:
        """What the call returned; waits for the end.

        Raises:
            ProcessError: the process was killed, or the call raised something.
        """
        self._process.join()
        with suppress(EOFError, OSError):
            return self._result.recv()
        code = self._process.exitcode or 0
        killed = f"was killed by signal {-code} (9 is often the system's, out of memory)" if code < 0 else "broke off"
        raise ProcessError(f"its process {killed}; see {self.log}")

    def stop(self) -> None:
        """End it now, finished or not."""
        self._process.terminate()
        self._process.join()


def _run(call: bytes, log: str, threads: int, result: Connection) -> None:
    """What the process does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with Path(log).open("a", encoding="utf-8") as stream:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(stream, fcntl.LOCK_EX)  # until a process whose parent was killed a moment ago has ended
        os.dup2(stream.fileno(), sys.stdout.fileno())
        os.dup2(stream.fileno(), sys.stderr.fileno())
    os.environ.update(dict.fromkeys(THREADS, str(threads)))
    quiet_libraries(in_logs=True)
    function, arguments = pickle.loads(call)
    result.send(function(*arguments))


def _end_with_parent() -> None:
    """Wait until the parent is gone, however it ended, and end this process."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
