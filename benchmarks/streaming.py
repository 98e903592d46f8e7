"""What cutting a checkpoint without loading it costs: memory under a limit, and time against plain copying.

    python benchmarks/streaming.py --output benchmarks/results/streaming.json

A Llama-shaped bfloat16 checkpoint with random weights is written in shards, and a plan that removes a quarter of the
FFN channels and KV groups. Then, in turn:

    cut    `cut_streaming` in a process whose private memory is limited (RLIMIT_DATA) to what it has after its imports
           and `--limit` more. The kernel refuses memory beyond that, so a run that ends has kept to it.
    copy   the same bytes without cutting: the input is read once, and the files that the cut wrote are copied.

Both begin with nothing of the files in the page cache (posix_fadvise) and end when the data is on the disk (fsync).
`ratio` is the time of reading, cutting and writing to the time of `copy`, while the input is hashed in another thread;
`ratio_whole` counts all that `cut_streaming` does: discovery, the proof of the cut on a small model, and what is left
of the hash. The check of the result comes after that and is timed by itself (`verify_seconds`): every tensor is read
again and compared with the input, and a fresh process finds the names and shapes; under the limit, no logits.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import secateur as sc
from secateur.checkpoint import cut_streaming, stream, verify_streamed
from secateur.checkpoint.names import names_to_write
from secateur.checkpoint.shards import Shards, Written, divided, write_index
from secateur.checkpoint.tensorfiles import Cut, Stored, header_bytes
from secateur.pipeline import PACKAGES, write_json
from secateur.plan import PruningPlan

SHAPE = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
SHARD = 10**9
BLOCK = 16 * 2**20


def skeleton(size: float) -> LlamaForCausalLM:
    """A model without weights of about so many bytes."""
    with torch.device("meta"):
        of_layers = [LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=n)).num_parameters() for n in (1, 2)]
        per_layer = of_layers[1] - of_layers[0]
        layers = max(1, round((size / 2 - of_layers[0]) / per_layer) + 1)
        config = LlamaConfig(**SHAPE, num_hidden_layers=layers, dtype="bfloat16")
        return LlamaForCausalLM(config).eval()


def write_checkpoint(model: LlamaForCausalLM, folder: Path) -> None:
    """Random weights in shards, written a block at a time."""
    folder.mkdir()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tensors = {n: Written(Cut(Stored(folder, "BF16", s, 0), {})) for n, (_, s) in names_to_write(model).items()}
    shards = divided(tensors, SHARD)
    noise = (torch.randn(BLOCK // 2) * 0.02).bfloat16().view(torch.int16).numpy().tobytes()
    for name, shard in shards.items():
        with (folder / name).open("wb") as out:
            out.write(header_bytes(shard))
            left = sum(cut.nbytes for _, cut in shard)
            while left > 0:
                left -= out.write(noise[: min(left, BLOCK)])
    write_index(folder, shards, model)
    to_disk(folder)


def make_plan(model: LlamaForCausalLM) -> PruningPlan:
    """A random quarter of the FFN channels and of the KV groups of every layer goes."""
    chosen = np.random.default_rng(0)
    groups = sc.discover(model).of_kinds(["ffn_channel", "kv_group"])
    kept = {g.name: tuple(np.sort(chosen.permutation(g.units)[: g.units * 3 // 4]).tolist()) for g in groups}
    return PruningPlan(kept, {g.name: g.units for g in groups})


def to_disk(folder: Path) -> None:
    """Wait until the files are written, and forget them."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def read(files: Iterable[Path], out: Path | None = None) -> int:
    """Read files a block at a time, copy them to `out` if given; how many bytes."""
    buffer, total = memoryview(bytearray(BLOCK)), 0
    for file in files:
        with file.open("rb") as opened, (out / file.name if out else Path(os.devnull)).open("wb") as copy:
            while count := opened.readinto(buffer):
                total += count
                if out:
                    copy.write(buffer[:count])
    return total


def copying(source: Path, cut: Path, out: Path) -> dict[str, float]:
    """Seconds to read the input and to copy the output."""
    to_disk(source)
    to_disk(cut)
    begin = time.perf_counter()
    read(weights(source))
    between = time.perf_counter()
    out.mkdir()
    read(weights(cut), out)
    to_disk(out)
    return {"read_seconds": between - begin, "copy_seconds": time.perf_counter() - between}


def status(key: str) -> int:
    """A size of this process in bytes: VmData (private memory), VmRSS (resident)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def limited_cut(source: Path, plan: Path, out: Path, limit: int) -> dict[str, Any]:
    """Cut under the limit, the files not cached when the copying begins."""
    before = {"data_bytes": status("VmData"), "rss_bytes": status("VmRSS")}
    resource.setrlimit(resource.RLIMIT_DATA, (before["data_bytes"] + limit,) * 2)
    plain, spent = stream.write_shards, []

    def from_and_to_disk(folder: Path, shards: Shards, tensors: dict[str, Written], progress: bool) -> None:
        to_disk(source)
        begin = time.perf_counter()
        plain(folder, shards, tensors, progress)
        to_disk(folder)
        spent.append(time.perf_counter() - begin)

    stream.write_shards = from_and_to_disk
    to_disk(source)
    out.mkdir()
    begin = time.perf_counter()
    replayed = PruningPlan.load(plan)
    report = cut_streaming(source, replayed, out, progress=False)
    after = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    check = verify_streamed(report, source, replayed, out)
    return {
        "after_imports": before,
        "limit_bytes": limit,
        "peak_rss_bytes": peak,
        "bytes_read": report.bytes_read,
        "bytes_written": report.bytes_written,
        "cut_seconds": spent[0],
        "whole_seconds": after - begin,
        "verify_seconds": time.perf_counter() - after,
        "check": check.text,
    }


def one_round(folder: Path, limit: int) -> dict[str, Any]:
    """One cut in its own process, and the copying of the same bytes."""
    for name in ("cut", "copy"):
        shutil.rmtree(folder / name, ignore_errors=True)
    command = [sys.executable, __file__, "--child", str(folder), "--limit", str(limit)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    row |= copying(folder / "dense", folder / "cut", folder / "copy")
    plain = row["read_seconds"] + row["copy_seconds"]
    row["written_bytes_per_second"] = round(row["bytes_written"] / row["cut_seconds"])
    row["ratio"] = round(row["cut_seconds"] / plain, 3)
    row["ratio_whole"] = round(row["whole_seconds"] / plain, 3)
    return {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--gigabytes", type=float, default=6.0, help="size of the checkpoint")
    parser.add_argument("--limit", type=int, default=2**30, help="bytes of memory beyond what the imports take")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where there is room")
    parser.add_argument("--child", type=Path, help="internal: cut what is in this folder and print figures")
    args = parser.parse_args()
    if args.child:
        names = (args.child / name for name in ("dense", "plan.json", "cut"))
        print(json.dumps(limited_cut(*names, args.limit)))
        return
    needed = 3 * args.gigabytes * 1e9
    if shutil.disk_usage(args.folder).free < needed:
        raise SystemExit(f"{needed / 1e9:.0f} GB are needed in {args.folder}; choose another --folder or --gigabytes")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, model = Path(name), skeleton(args.gigabytes * 1e9)
        write_checkpoint(model, folder / "dense")
        make_plan(model).save(folder / "plan.json")
        rows = []
        for _ in range(args.rounds):
            rows.append(one_round(folder, args.limit))
            print(rows[-1], flush=True)
    largest = max(p.numel() for p in model.parameters()) * 2
    protocol = {
        "shape": {**SHAPE, "num_hidden_layers": model.config.num_hidden_layers},
        "checkpoint_bytes": model.num_parameters() * 2,
        "largest_tensor_bytes": largest,
        "shard_bytes": SHARD,
        "removed": "a random quarter of the FFN channels and of the KV groups of every layer",
        "limit": "RLIMIT_DATA, bytes beyond those after the imports",
        "caches": "dropped before each measurement; data on disk at its end",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    names = ("ratio", "ratio_whole", "written_bytes_per_second", "peak_rss_bytes")
    median = {name: statistics.median(row[name] for row in rows) for name in names}
    results = {"schema": 1, "command": "benchmarks/streaming.py", "median": median, "rows": rows, "protocol": protocol}
    if args.output:
        write_json(args.output, results)


if __name__ == "__main__":
    main()
