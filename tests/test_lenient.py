"""Classes that stand in for one that refuses sizes must mean the same, not only have the same parameters."""

import pytest
from transformers import LlamaConfig

from secateur.surgery.lenient import lenient_targets

HEADS = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 3, "num_key_value_heads": 3}


def targets(**fields):
    values = {k: v for k, v in LlamaConfig().to_dict().items() if k != "per_layer_config"}
    return [type(config).__name__ for _, config in lenient_targets("llama", {**values, **HEADS, **fields})]


def test_mistral_stands_in_for_llama():
    (found,) = lenient_targets("llama", {**LlamaConfig().to_dict(), **HEADS})
    assert found[1].sliding_window is None and found[1].head_dim == 16 and targets(pretraining_tp=1)


@pytest.mark.parametrize("field", [{"attention_bias": True}, {"mlp_bias": True}, {"use_something": True}])
def test_a_field_that_it_does_not_know_must_not_matter(field):
    """True equals 1, which is what some fields hold that have no effect."""
    assert targets(**dict.fromkeys(field, False)) and targets(**dict.fromkeys(field, 1)) and not targets(**field)
