"""Runs llama.cpp in a process of its own: reads one request as JSON from stdin, writes one answer to stdout.

    python -P llama_cpp_process.py < request.json

A crash of llama.cpp ends this process and not the one that asked. Everything that it prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any

Ask = Callable[[str, dict[str, Any]], dict[str, Any]]


def main() -> None:
    """Answer one request: log-probabilities along a prompt and its greedy continuation, and tokens of texts.

    `rows` has the most likely next tokens after each token; `following` what the token that follows in the prompt got.
    """
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    ask = serve(request["path"], len(request["prompt"]) + request["new_tokens"])
    text, top = list(request["prompt"]), request["top"]
    printable = ask("/tokenize", {"content": "a", "add_special": False})["tokens"][-1]
    rows = [likely(ask, text[: i + 1], top, printable) for i in range(len(text))]
    following = []
    for i, (row, token) in enumerate(zip(rows, text[1:], strict=False)):
        found = dict(row)
        if token not in found:
            found = dict(likely(ask, text[: i + 1], request["vocabulary"], printable))
        following.append(found[token])
    for _ in range(request["new_tokens"]):
        text.append(rows[-1][0][0])
        rows.append(likely(ask, text, top, printable))
    tokens = [ask("/tokenize", {"content": t, "add_special": True})["tokens"] for t in request["texts"]]
    json.dump({"rows": rows, "following": following, "tokens": tokens}, answer)
    answer.close()
    os._exit(0)  # the server's threads need not wind down


def serve(path: str, length: int) -> Ask:
    """Load a file into llama.cpp's own server, on one thread and with caches in float32."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = max(length + 1, 32)
    params.n_parallel = 1
    params.n_gpu_layers = 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    params.verbosity = 1
    server = xllamacpp.Server(params)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(route: str, body: dict[str, Any]) -> dict[str, Any]:
        content = json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        try:
            with opener.open(urllib.request.Request(server.listening_address + route, content, headers)) as reply:
                found: dict[str, Any] = json.load(reply)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"error: {error.read().decode()}") from error
        return found

    return ask


def likely(ask: Ask, prompt: list[int], top: int, printable: int) -> list[tuple[int, float]]:
    """The `top` most likely next tokens and their log-probabilities [nats], the most likely first.

    Args:
        printable: the token to sample whatever the probabilities, which are those before sampling. The server does not
            report them for tokens without text, such as an end of text or half a character.
    """
    wanted = {"prompt": prompt, "n_predict": 1, "n_probs": top, "temperature": 0.0, "logit_bias": [[printable, 1e6]]}
    found = ask("/completion", wanted)["completion_probabilities"][0]["top_logprobs"]
    return [(token["id"], token["logprob"]) for token in found]


if __name__ == "__main__":
    main()
