"""Load a checkpoint as any user would and store its logits. Run as a script, in a process without Secateur.

python reload_process.py FOLDER IDS.safetensors LOGITS.safetensors DTYPE DEVICE TRUST
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging


def main(folder: str, ids: str, output: str, dtype: str, device: str, trust: str) -> None:
    """Write the logits [1, length, vocab] of the ids [1, length]."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    remote = trust == "trust"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), trust_remote_code=remote)
    with torch.no_grad():
        logits = model.to(device).eval()(load_file(ids, device)["ids"], use_cache=False).logits
    save_file({"logits": logits.cpu().contiguous()}, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
