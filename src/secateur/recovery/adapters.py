"""Fresh adapters for a model: LoRA of peft (Hu et al. 2021, arXiv:2106.09685), and what trains whole beside it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from secateur.errors import RecipeError, first_line
from secateur.recovery.also_trained import also_trained, peft_ties, tie_copies
from secateur.recovery.settings import RecoverySettings
from secateur.recovery.targets import Targets, all_targets, read_directly

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def with_adapters(model: PreTrainedModel, settings: RecoverySettings, *, experts: bool = True) -> PeftModel:
    """The model itself with fresh LoRA adapters; everything else is frozen but what `also_train` names.

    Args:
        experts: adapt the matrices of stacked experts, too.

    Raises:
        RecipeError: the targets asked for are not there or cannot carry adapters, or what is to train whole cannot.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.tuners_utils import check_target_module_exists
    from transformers import set_seed

    set_seed(settings.seed)
    chosen = Targets(list(settings.targets), []) if settings.targets else all_targets(model)
    stacked = chosen.parameters if experts else []
    whole = also_trained(model, settings.also_train)
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0 if stacked else settings.dropout,
        target_parameters=stacked or None,
        target_modules=chosen.modules,
        modules_to_save=list(whole) or None,
        ensure_weight_tying="embeddings" in settings.also_train and peft_ties(model),
        task_type="CAUSAL_LM",
    )
    if settings.targets and (passed_by := [n for n in read_directly(model) if check_target_module_exists(lora, n)]):
        raise RecipeError(
            f"{passed_by[0]} cannot carry an adapter: the module around it takes its weight without calling it; "
            "leave it out of --targets (recovery.targets)"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft tells what fan_in_fan_out it sets for Conv1D
            adapted = get_peft_model(model, lora)
    except ValueError as error:
        asked = f"--targets {','.join(settings.targets)}" if settings.targets else "adapters for every linear module"
        raise RecipeError(f"{asked}: peft refuses: {first_line(error)}") from error
    tie_copies(adapted, whole)
    return adapted
