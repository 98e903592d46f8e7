"""Run a Python program that nobody has read, within limits. Run as a script, in a process without Secateur.

python -I code_process.py SECONDS BYTES < {"program": ..., "token": ...}

Writes the token to standard output if the program ran to its end. Limits on memory, processor time and the size of
files come from the kernel; an audit hook, which Python cannot take off again, stops sockets, other programs, foreign
functions and everything that would change files outside the current folder. That keeps a careless program from doing
harm; it is no wall against one that was written to break out.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any

FORBIDDEN = ("socket.", "subprocess.", "ctypes.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
             "os.kill", "os.killpg", "os.putenv", "os.chdir", "os.chmod", "os.chown", "os.link", "os.symlink",
             "shutil.", "pty.", "webbrowser.", "syslog.", "signal.pthread_kill")  # fmt: skip
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.truncate", "os.utime")


def main(seconds: int, memory: int) -> None:
    request = json.loads(sys.stdin.read())
    answer = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    for limit, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 1 << 20),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))
    sys.setrecursionlimit(10_000)
    sys.addaudithook(guard(os.path.realpath(os.curdir) + os.sep))
    exec(compile(request["program"], "program", "exec"), {"__name__": "program"})
    os.write(answer, request["token"].encode())


def guard(folder: str) -> Any:
    """An audit hook that refuses what a program has no need for."""

    def outside(path: Any) -> bool:
        return isinstance(path, int) or not os.path.realpath(os.fsdecode(path)).startswith(folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(FORBIDDEN):
            raise PermissionError(f"{event} is not allowed here")
        if event == "open":
            path, mode, flags = arguments
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))
            if (writes or (isinstance(mode, str) and set(mode) & set("wax+"))) and outside(path):
                raise PermissionError(f"{path} may not be written here")
        elif event in CHANGES and any(outside(p) for p in arguments if isinstance(p, (str, bytes, os.PathLike))):
            raise PermissionError(f"{event} is not allowed here")

    return hook


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
