"""Stock classes that accept widths which other classes refuse, and compute the same from the same parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from secateur.surgery.config_fields import NOT_ARGUMENTS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# Llama, for one, takes no head counts that do not divide `hidden_size`. A model is saved as one of these only if its
# own class refuses, and only if names, shapes and logits are all the same.
LENIENT_MODEL_TYPES = ("mistral",)
TRIVIAL: tuple[Any, ...] = (None, False, 0, 1, [], {})  # values of fields that another class may go without


def lenient_targets(
    model_type: str, values: Mapping[str, Any]
) -> Iterator[tuple[type[PreTrainedModel], PreTrainedConfig]]:
    """Lenient classes with configurations that mean the same as these values of a configuration of `model_type`.

    A class that does not know one of the fields is left out: the field may matter only to longer texts than those that
    logits are compared on.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    given = {name: value for name, value in values.items() if name not in NOT_ARGUMENTS}
    for lenient in LENIENT_MODEL_TYPES:
        config_class = CONFIG_MAPPING[lenient]
        known = set(config_class().to_dict()) - set(NOT_ARGUMENTS)
        if lenient == model_type or not all(_trivial(v) for k, v in given.items() if k not in known):
            continue
        # a default of the lenient class that the other has no field for would change what is computed
        kept = {name: given.get(name) for name in known if name in given or name == "sliding_window"}
        try:
            yield MODEL_FOR_CAUSAL_LM_MAPPING[config_class], config_class(**kept)
        except Exception:  # a class that cannot take these sizes is no alternative
            continue


def _trivial(value: Any) -> bool:
    """Whether a field with this value may be left out; True is not 1."""
    return any(type(value) is type(other) and value == other for other in TRIVIAL)
