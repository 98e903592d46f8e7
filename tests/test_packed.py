"""Models whose weights bitsandbytes or torchao has packed: discovered like their dense form, cut only as floats."""

import pytest
import torch
from families import make
from test_adapters import adapt, choose
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig
from transformers.integrations.bitnet import BitLinear

from secateur import checkpoint
from secateur.allocation import Budget, allocate
from secateur.benchmark import bench
from secateur.checkpoint import save_adapted
from secateur.discovery import discover
from secateur.errors import CheckpointError, DataError, DiscoveryError, PlanError
from secateur.importance import Gate, Magnitude, leave_one_out, score
from secateur.packed import packed_weights
from secateur.surgery import mask, prove, slice

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
METHODS = {
    "8-bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "4-bit": lambda: BitsAndBytesConfig(load_in_4bit=True),
    "nf4": lambda: BitsAndBytesConfig(**NF4),
    "int8": lambda: TorchAoConfig(Int8WeightOnlyConfig()),
    "int4": lambda: TorchAoConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4)),
}
WIDE = {  # sizes that the 4-bit kernels take
    "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
IDS = torch.arange(2, 20).reshape(2, 9)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A family's tiny model on disk."""

    def save(family, **sizes):
        folder = tmp_path_factory.mktemp(family)
        make(family, **sizes).save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def wide(folder_of):
    return folder_of("llama", **WIDE)


def load(folder, method, **settings):
    config = METHODS[method]()
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu", **settings).eval()


def unpacked(folder, method):
    """The model with the values that its packed weights stand for."""
    model = load(folder, method)
    if method != "int8":
        return model.dequantize()
    floats = AutoModelForCausalLM.from_pretrained(folder).eval()
    for name in packed_weights(model):
        floats.get_parameter(name).data = model.get_parameter(name).dequantize()
    return floats


def logits_of(model):
    with torch.no_grad():
        return model(IDS).logits


def described(groups, *, dims=True):
    """Everything that is known of the groups, as plain values."""
    found = {}
    for g in groups:
        members = [(m.parameter, m.dim if dims else None, m.role, m.index.tolist()) for m in g.members]
        found[g.name] = (g.kind, g.units, g.refusals, g.blocks, g.stays, g.at_least, g.results, members)
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt_neox"])
def test_groups_are_those_of_the_dense_form(family, folder_of):
    dense = discover(make(family))
    folder = folder_of(family)
    for method in METHODS:
        model = load(folder, method)
        assert len(packed_weights(model)) >= 8, method
        found = discover(model)
        assert described(found) == described(dense), method
        assert (found.shapes, found.tied) == (dense.shapes, dense.tied), method
        assert found.total_parameters == make(family).num_parameters(), method


def test_a_packed_conv1d_is_a_linear_module_with_the_same_units(folder_of):
    dense, found = discover(make("gpt2")), discover(load(folder_of("gpt2"), "nf4"))
    assert described(found, dims=False) == described(dense, dims=False)
    name = "transformer.h.0.attn.c_attn.weight"
    assert (dense.shapes[name], found.shapes[name]) == ((48, 144), (144, 48))


@pytest.mark.parametrize("method", ["8-bit", "nf4"])
def test_discovery_leaves_packed_weights_alone(method, wide):
    """Reading the state dict of a bitsandbytes model that has run would repack its weights."""
    model = load(wide, method)
    before = logits_of(model)
    stored = {n: p.data.clone() for n, p in model.named_parameters()}
    discover(model)
    assert all(torch.equal(p.data, stored[n]) for n, p in model.named_parameters())
    assert torch.equal(logits_of(model), before)


def test_a_plan_made_on_packed_weights_meets_its_budget_on_the_float_model(wide):
    groups = discover(load(wide, "nf4"))
    chosen = groups.only(("ffn_channel", "kv_group"))
    scores = {g.name: torch.rand(g.units) for g in chosen}
    plan = allocate(chosen, scores, Budget(param_sparsity=0.2))
    model = AutoModelForCausalLM.from_pretrained(wide)
    small = slice(model, plan)
    assert small.num_parameters() == groups.remaining_parameters(plan.kept)
    unit = max(groups.total_parameters - groups.remaining_parameters({g.name: range(1, g.units)}) for g in chosen)
    assert abs(small.num_parameters() - 0.8 * model.num_parameters()) <= 2 * unit  # one unit in each of two layers


@pytest.mark.parametrize("method", ["8-bit", "nf4", "int8"])
def test_masked_is_sliced_after_unpacking(method, wide):
    model, kinds = load(wide, method), ("ffn_channel", "kv_group", "query_head")
    plan, floats = choose(discover(model), kinds), unpacked(wide, method)
    whole = logits_of(model)
    with torch.no_grad(), mask(model, plan):
        masked = model(IDS).logits
    sliced = logits_of(slice(floats, plan))
    assert (masked - sliced).norm() <= (1e-5 if method == "int8" else 0.02) * sliced.norm()  # kernels round to bfloat16
    assert (masked - whole).norm() > 0.2 * whole.norm()
    assert torch.equal(logits_of(model), whole)


@pytest.mark.parametrize("method", ["8-bit", "nf4", "int8"])
def test_gates_are_scored_on_packed_weights_as_they_are(method, wide):
    found, floats = (
        score(model, discover(model).only(("ffn_channel", "kv_group")), [IDS], Gate())
        for model in (load(wide, method), unpacked(wide, method))
    )
    for name, expected in floats.items():
        assert (found[name] - expected).norm() <= (1e-4 if method == "int8" else 0.05) * expected.norm()


def test_the_callers_gradient_mode_holds_while_masked():
    model = make("llama")
    plan = choose(discover(model), ("ffn_channel",))
    with torch.no_grad(), mask(model, plan):
        assert not model(IDS).logits.requires_grad
    with mask(model, plan):
        assert model(IDS).logits.requires_grad


def test_what_reads_or_cuts_weights_is_refused(wide, tmp_path):
    for method, kind in (("nf4", "Linear4bit, torch.uint8"), ("int8", "Int8Tensor, torch.float32")):
        model = load(wide, method)
        groups = discover(model)
        plan = choose(groups, ("ffn_channel",))
        text = rf"model\.layers\.0\.self_attn\.q_proj\.weight is quantised \({kind}\).*without quantization_config"
        with pytest.raises(PlanError, match=text):
            slice(model, plan)
        with pytest.raises(PlanError, match=text):
            score(model, groups.of_kinds(("ffn_channel",)), [IDS], Magnitude())
        with pytest.raises(PlanError, match=text):
            leave_one_out(model, groups.of_kinds(("kv_group",)), [IDS])
        with pytest.raises(CheckpointError, match=text):
            checkpoint.save(model, tmp_path / "out")
        with pytest.raises(DataError, match=text):
            bench(model)
    assert not (tmp_path / "out").exists()


def test_an_unpacked_model_is_cut_and_saved(wide, tmp_path):
    model = load(wide, "nf4").dequantize()
    assert not packed_weights(model)
    small = slice(model, choose(discover(model), ("ffn_channel", "kv_group")))
    checkpoint.save(small, tmp_path / "out")
    assert torch.equal(logits_of(checkpoint.load(tmp_path / "out").model), logits_of(small))


def test_proof_on_a_twin(folder_of):
    proofs = {p.kind: p for p in prove(load(folder_of("llama"), "8-bit"), ("ffn_channel", "kv_group"))}
    assert {p.route for p in proofs.values()} == {"config"}
    assert all(p.max_difference < 1e-9 for p in proofs.values())
    assert proofs["ffn_channel"].fields == ("intermediate_size",)


def test_other_ways_of_packing_are_refused_by_name():
    model = make("llama")
    model.model.layers[1].mlp.up_proj = BitLinear(48, 44, bias=False, dtype=torch.float32)
    text = r"model\.layers\.1\.mlp\.up_proj\.weight is quantised \(BitLinear, torch\.uint8\).*not known.*load_skeleton"
    with pytest.raises(DiscoveryError, match=text):
        discover(model)


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters_on_a_packed_base(variant, folder_of, tmp_path):
    dense = discover(adapt(make("qwen2"), **variant))
    folder = folder_of("qwen2")
    for method in METHODS:
        model = adapt(load(folder, method), **variant)
        found = discover(model)
        assert described(found) == described(dense), method
        assert found.shapes == dense.shapes, method
    plan = choose(found, ("ffn_channel",))
    text = r"q_proj\.base_layer\.weight is quantised .*PeftModel\.from_pretrained"
    with pytest.raises(PlanError, match=text):
        slice(model, plan)
    with pytest.raises(CheckpointError, match=text):
        save_adapted(model, tmp_path / "out")


def test_groups_of_a_packed_checkpoint(folder_of, tmp_path, secateur):
    load(folder_of("llama"), "nf4").save_pretrained(tmp_path / "packed")
    code, printed, err = secateur("groups", tmp_path / "packed", "--verify")
    assert code == 0, err
    assert "quantised (bitsandbytes)" in printed and "proven on a small model" in printed
    assert "saved through intermediate_size" in printed
    assert f"{make('llama').num_parameters():,} parameters" in printed
