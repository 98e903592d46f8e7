"""A fixed sample of all architectures, examined as the whole sweep does it: nothing wrong is offered."""

import pytest
import zoo
from architectures import controls, discovery, quiet, round_trip

from secateur.surgery import prove

# what no dense decoder has: experts in several layouts, latent attention, state spaces, encoders, scalars to fold
SAMPLE = ["bert", "codegen", "deepseek_v3", "falcon_h1", "gemma3_text", "gpt_oss", "mamba", "mixtral", "qwen3_moe"]
CORE = {"ffn_channel", "attention_head", "kv_group", "query_head", "hidden", "layer", "expert", "expert_channel"}


@pytest.mark.parametrize("model_type", SAMPLE)
def test_offered_groups_are_proven_and_wrong_ones_are_caught(model_type):
    model = zoo.tiny_model(model_type)
    with quiet():
        found = discovery(model)
        proofs = prove(model, sorted(CORE))
        caught, tried = controls(model, proofs)
    assert found["unknown_operations"] == 0 and found["without_data_the_same"] is True
    assert proofs and any(p.proven for p in proofs)
    for proof in proofs:
        assert proof.max_difference < 1e-9 if proof.proven else proof.reason, proof
    assert caught == tried > 0


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_everything_cut_together_reloads(model_type):
    with quiet():
        trip = round_trip(zoo.tiny_model(model_type))
    assert trip["ok"] and trip["cached_generation"] is True, trip
    assert "hidden" in trip["kinds"] and len(trip["kinds"]) >= 3
