"""Load a checkpoint as any user would and store its logits. Run as a script, in a process without Secateur.

python reload_process.py FOLDER DTYPE DEVICE TRUST IDS.safetensors LOGITS.safetensors
python reload_process.py FOLDER auto meta TRUST

On the device `meta` nothing is computed and no memory taken: transformers gets names, shapes and types from the headers
of the files, of which it could not map those larger than memory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

KEYS = ("missing_keys", "unexpected_keys", "mismatched_keys")
DTYPES = {"BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
          "I64": torch.int64, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32,
          "F64": torch.float64}  # fmt: skip


def main(folder: str, dtype: str, device: str, trust: str, ids: str = "", output: str = "") -> None:
    """Write the logits [1, length, vocab] of the ids [1, length].

    Raises:
        SystemExit: weights are missing, left over, of other shapes, or not tied; says which.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    trusted = trust == "trust"
    facts = {"dtype": getattr(torch, dtype, dtype), "output_loading_info": True, "ignore_mismatched_sizes": True}
    if device == "meta":
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trusted))
        facts |= {"config": config, "state_dict": headers(Path(folder)), "device_map": "meta"}
        model, info = kind.from_pretrained(None, **facts)
    else:
        model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusted, **facts)
    if wrong := [f"{key.replace('_', ' ')}: {_some(info[key])}" for key in KEYS if info.get(key)]:
        sys.exit("; ".join(wrong))
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    if untied := [name for name, of in model.all_tied_weights_keys.items() if tensors[name] is not tensors[of]]:
        sys.exit(f"weights that are not tied: {_some(untied)}")
    if device == "meta":
        return
    with torch.no_grad():
        logits = model.to(device).eval()(load_file(ids, device)["ids"], use_cache=False).logits
    save_file({"logits": logits.cpu().contiguous()}, output)


def headers(folder: Path) -> dict[str, torch.Tensor]:
    """Every stored tensor without its values."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                found[name] = torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")
    return found


def _some(names: Any) -> str:
    return ", ".join(sorted(map(str, names))[:5])


if __name__ == "__main__":
    main(*sys.argv[1:])
