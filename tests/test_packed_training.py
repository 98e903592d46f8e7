"""LoRAPrune on frozen weights that are packed: scored as their dense form, cut to float weights or packed again."""

import json

import pytest
import torch
from families import make
from test_loraprune import adapted
from test_packed import WIDE
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from secateur import checkpoint
from secateur.checkpoint import QUANTISERS, quantisation, quantised_copy
from secateur.errors import CheckpointError, PlanError
from secateur.importance import lora_guided
from secateur.importance.lora_guided import LoraGuided
from secateur.methods.loraprune import LoRAPrune
from secateur.packed import dense_weight, packed_weights, unpacked_columns
from secateur.surgery.live import LiveModel

TRAINING = ["--data", "demo-calibration", "--steps", "4", "--batch-size", "8", "--seq-len", "64"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    make("llama", **WIDE).save_pretrained(folder)
    return folder


def with_gradients(model):
    """Adapters with the same random factors and gradients for every model of these shapes."""
    live = LiveModel(adapted(model))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in live.base.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
            parameter.grad = torch.randn(parameter.shape, generator=generator)
    return live


@pytest.mark.parametrize("quantise", QUANTISERS)
def test_scores_are_those_of_the_dense_form_unpacked_tile_by_tile(quantise, wide, monkeypatch):
    packed, dense = checkpoint.load(wide, quantise=quantise).model, checkpoint.load(wide).model
    assert len(packed_weights(packed)) == 14
    for name in packed_weights(packed):
        path = name.removesuffix(".weight")
        dense.get_submodule(path).weight.data.copy_(dense_weight(packed.get_submodule(path)))
    found, wanted = with_gradients(packed), with_gradients(dense)
    names = [g.name for g in wanted.groups.of_kinds(("ffn_channel", "kv_group"))]
    tiles = []

    def watched(module, columns):
        tiles.append(len(columns))
        return unpacked_columns(module, columns)

    monkeypatch.setattr(lora_guided, "COLUMNS", 24)
    monkeypatch.setattr(lora_guided, "unpacked_columns", watched)
    for live in (found, wanted):
        live.scores = LoraGuided().scores(live.base, live.groups, {}, names, {})
    for name in names:
        torch.testing.assert_close(found.scores[name], wanted.scores[name], rtol=1e-4, atol=1e-6)
    assert max(tiles) == 24 and len(tiles) > 2 * 14


@pytest.mark.parametrize("quantise", QUANTISERS)
def test_a_packed_base_leaves_a_float_model(secateur, quantise, tmp_path):
    code, out, err = secateur(
        "prune", "demo", "-o", tmp_path / "out", "--method", "loraprune", "--sparsity", "0.3", *TRAINING,
        "--quantize", quantise,
    )  # fmt: skip
    assert code == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    library, _ = QUANTISERS[quantise]
    assert results["protocol"]["quantised"] == library and f"packed by {library}" in " ".join(out.split())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert quantisation(again.config) is None and again.num_parameters() == results["params"]["pruned"]
    assert results["params"]["dense"] == checkpoint.load("demo").model.num_parameters()
    assert abs(results["params"]["sparsity"] - 0.3) < 0.01 and results["parity"]["max_logit_difference"] == 0


@pytest.mark.parametrize(("quantise", "multiple"), [("8bit", 1), ("4bit", 64)])
def test_a_packed_base_leaves_a_packed_model_if_asked(secateur, quantise, multiple, tmp_path):
    code, out, err = secateur(
        "prune", "demo", "-o", tmp_path / "out", "--method", "loraprune", "--sparsity", "0.3", *TRAINING,
        "--quantize", quantise, "--quantize-output", quantise,
    )  # fmt: skip
    assert code == 0, err
    assert ("30.00% asked for" in out) == (multiple > 1)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert quantisation(again.config) == "bitsandbytes"
    assert results["parity"]["max_logit_difference"] <= 1e-5
    assert abs(results["params"]["sparsity"] - 0.3) < (0.01 if multiple == 1 else 0.06)
    assert results["protocol"]["settings"]["width_multiple"] == multiple
    widths = again.config.intermediate_size, again.config.num_key_value_heads * again.config.head_dim
    assert widths[0] < 448 and widths[1] < 96 and not any(width % multiple for width in widths)
    assert "takes the library bitsandbytes" in (tmp_path / "out" / "README.md").read_text()


def test_widths_that_cannot_be_packed_are_refused_before_training(secateur, checkpoint_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.pipeline.adapting.train", lambda *_, **__: pytest.fail("it trains"))
    code, _, err = secateur(
        "prune", checkpoint_folder, "-o", tmp_path / "out", "--method", "loraprune", "--sparsity", "0.1", *TRAINING,
        "--kinds", "ffn_channel", "--quantize-output", "4bit",
    )  # fmt: skip
    assert code == 2 and "does not pack" in err and "leave --quantize-output out" in err.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_is_packed_already(secateur, tmp_path):
    packed = AutoModelForCausalLM.from_pretrained(
        checkpoint.BUNDLED["demo"], quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map="cpu"
    )
    packed.save_pretrained(tmp_path / "packed")
    checkpoint.load("demo").tokenizer.save_pretrained(tmp_path / "packed")
    given = ["-o", tmp_path / "out", "--method", "loraprune", "--sparsity", "0.3", *TRAINING]
    code, _, err = secateur("prune", tmp_path / "packed", *given, "--quantize", "8bit")
    assert code == 2 and "quantised already (bitsandbytes): leave --quantize out" in err
    code, _, err = secateur("prune", tmp_path / "packed", "-o", tmp_path / "out", "--sparsity", "0.3")
    assert code == 2 and "--method loraprune" in err and not (tmp_path / "out").exists()
    code, _, err = secateur("prune", tmp_path / "packed", *given)
    assert code == 0, err
    assert quantisation(AutoModelForCausalLM.from_pretrained(tmp_path / "out").config) is None


def test_packing_is_for_methods_that_train(secateur, tmp_path):
    code, _, err = secateur("prune", "demo", "-o", tmp_path / "out", "--sparsity", "0.3", "--quantize", "8bit")
    assert code == 2 and "auto cuts float weights" in err and not list(tmp_path.iterdir())


def test_widths_that_no_kernel_takes():
    model = make("llama", hidden_size=48, intermediate_size=40)
    with pytest.raises(CheckpointError, match=r"does not pack the cut model as 4bit: .*--round-to 64"):
        quantised_copy(model, "4bit")


@pytest.mark.parametrize("quantise", QUANTISERS)
def test_compaction_is_refused_before_training(quantise, wide):
    model = adapted(checkpoint.load(wide, quantise=quantise).model)
    with pytest.raises(PlanError, match=r"is quantised .*, and so cannot be cut in place"):
        LoRAPrune(0.3, compact_every=5).prepare(model)
