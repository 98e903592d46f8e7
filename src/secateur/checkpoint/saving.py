"""Save checkpoints that `from_pretrained` loads, and read them back to prove it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.checkpoint.card import Form, checkpoint_form, model_card
from secateur.checkpoint.folders import check_space, output_folder
from secateur.checkpoint.lineage import copy_beside
from secateur.checkpoint.loading import Checkpoint
from secateur.checkpoint.parity import verify_reload
from secateur.checkpoint.shards import SHARD_SIZE
from secateur.errors import CheckpointError
from secateur.packed import refuse_packed
from secateur.plan import PruningPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save(
    model: PreTrainedModel,
    output: Path | str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    plan: PruningPlan | None = None,
    results: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint that `from_pretrained` loads, and read it back.

    A model whose layers differ in width brings the file of its class along; without Secateur it then loads with
    `trust_remote_code=True`.

    Raises:
        CheckpointError: the folder is in use, weights are quantised, or what was written does not load to the same
            model (it is removed then).
    """
    refuse_packed(model, "saved by Secateur", CheckpointError)
    with output_folder(output, overwrite=overwrite) as folder:
        write(model, folder, tokenizer=tokenizer)
        parity = {"max_logit_difference": verify_reload(folder, model), "process": "same"}
        write_about(checkpoint_form(model), folder, plan=plan, results={**(results or {}), "parity": parity})
    return Path(output)


def write(
    model: PreTrainedModel,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base: Checkpoint | None = None,
) -> None:
    """Fill an existing folder with what `from_pretrained` loads: configuration, safetensors, tokenizer.

    Args:
        tokenizer: written unless `base` lies in a folder, whose tokenizer files are copied as they are.
        base: the model that this one was made from.

    Raises:
        CheckpointError: the disk has no room for it.
    """
    check_space(folder, weight_bytes(model))
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    if base is not None and base.folder is not None:
        copy_beside(base.folder, folder)
    elif tokenizer is not None:
        tokenizer.save_pretrained(folder)


def weight_bytes(model: PreTrainedModel) -> int:
    """What the parameters take on the disk, tied ones counted once."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def write_about(
    form: Form,
    folder: Path,
    *,
    plan: PruningPlan | None = None,
    results: Mapping[str, Any],
    base: Checkpoint | None = None,
) -> None:
    """Write what tells how the model in a folder came to be: plan.json, results.json, model card.

    Called last, since the card shows how what was written has been checked.
    """
    if plan is not None:
        plan.save(folder / "plan.json")
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(form, results, plan, base), encoding="utf-8")
