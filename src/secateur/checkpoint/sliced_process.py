"""Load a checkpoint, cut it in memory and store its logits on a probe: what a streamed cut of it should give.

python -m secateur.checkpoint.sliced_process FOLDER PLAN.json TRUST LOGITS.safetensors

Exits with code 2 if a loaded model cannot be cut so.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safetensors.torch import save_file

from secateur.checkpoint.loading import load
from secateur.checkpoint.parity import probed
from secateur.errors import SecateurError
from secateur.plan import PruningPlan
from secateur.surgery import slice


def main(folder: str, plan: str, trust: str, output: str) -> None:
    """Write ids [1, length], logits [1, length, vocab], and what the ids are."""
    checkpoint = load(folder, trust_remote_code=trust == "trust")
    small = slice(checkpoint.model, PruningPlan.load(Path(plan)))
    wanted = probed(small, checkpoint.tokenizer)
    save_file({"ids": wanted.ids, "logits": wanted.logits.contiguous()}, output, {"text": wanted.text})


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except SecateurError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
