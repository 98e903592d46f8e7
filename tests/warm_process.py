"""A process that has imported what `reload_process.py` and most models import, and runs it in a fork for every request.

The product starts a new interpreter for each checkpoint, most of whose seconds are imports. Tests check hundreds, and a
fork of a process that has imported the same libraries, and not Secateur, is as fresh. Lines of JSON in, exit codes out.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import traceback


def serve() -> None:
    import safetensors.torch  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401  and with it what most models import
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: F401

    assert not any(name.partition(".")[0] == "secateur" for name in sys.modules)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            os._exit(run(request))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run(request: dict[str, list[str]]) -> int:
    """Run a script as `python -P SCRIPT ARGUMENTS` would, in a process of its own; its exit code."""
    for stream, name in zip((1, 2), request["streams"], strict=True):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), stream)
    sys.argv = request["command"]
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = 1 if isinstance(end.code, str) else int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve()
