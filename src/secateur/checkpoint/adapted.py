"""Save LoRA adapters that are not merged: with their base, which becomes a checkpoint around them, or alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.checkpoint.card import checkpoint_form
from secateur.checkpoint.folders import output_folder
from secateur.checkpoint.parity import check_same_logits, checked_difference, probed, verify_reload
from secateur.checkpoint.saving import write, write_about
from secateur.errors import CheckpointError
from secateur.plan import PruningPlan
from secateur.surgery.adapters import base_model, packed_base, unsupported

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = "adapter"


def save_adapted(
    model: PeftModel,
    output: Path | str,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    plan: PruningPlan | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the base to `output` and its adapters to `output/adapter`, and read both back.

    `PeftModel.from_pretrained(base, "OUTPUT/adapter")` then gives the model again. PEFT puts every adapter but the one
    called `default` into a folder of its own below that.

    Raises:
        CheckpointError: the adapters are of a kind that is not supported, the folder is in use, or what was written
            does not load to the same model (it is removed then).
    """
    from peft import PeftModel as AnyPeftModel

    if reason := unsupported(model) or packed_base(model):
        raise CheckpointError(reason)
    with output_folder(output, overwrite=overwrite) as folder:
        base = base_model(model)
        write(base, folder, tokenizer=tokenizer)
        parity = {"max_logit_difference": verify_reload(folder, base), "process": "same"}
        write_about(checkpoint_form(base), folder, plan=plan, results={"parity": parity})
        for config in model.peft_config.values():
            config.base_model_name_or_path = str(output)
        model.save_pretrained(str(folder / ADAPTER))
        name = model.active_adapters[0]
        place = folder / ADAPTER if name == "default" else folder / ADAPTER / name
        again = AnyPeftModel.from_pretrained(base, str(place), adapter_name=name).eval()
        check_same_logits(model, again)
    return Path(output)


def write_adapter(
    model: PeftModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    load_base: Callable[[], PreTrainedModel] | None = None,
) -> float:
    """Fill an existing folder with the adapter `default` alone, and put it on a base with PEFT.

    Args:
        load_base: gives the base anew, as a packed one needs, whose kernels remember what ran before; if not given, the
            adapter is taken off the model.

    Returns:
        The largest difference of logits.

    Raises:
        ParityError: it is more than rounding.
    """
    from peft import PeftModel as AnyPeftModel

    wanted = probed(model, tokenizer)
    model.save_pretrained(str(folder), selected_adapters=["default"])
    base = model.unload() if load_base is None else load_base()
    again = AnyPeftModel.from_pretrained(base, str(folder)).eval()
    return checked_difference(wanted.logits, probed(again, tokenizer).logits)
