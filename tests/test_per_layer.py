"""Models whose layers differ in width: right, loadable by everyone, and usable like any other model."""

import json
import pickle
import site
import subprocess
import sys

import pytest
import torch
from families import LLAMA_LIKE, make
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, StaticCache, pipeline

from secateur import checkpoint
from secateur.discovery import discover
from secateur.discovery.reference import Reference, plain_logits
from secateur.discovery.trace import probe_ids
from secateur.errors import PlanError
from secateur.modeling_per_layer import config_class, model_class
from secateur.plan import PruningPlan
from secateur.surgery import expressible, prove, slice

HEADS = ("kv_group", "query_head", "attention_head")
DEEP = {"num_hidden_layers": 3}
GROUPED = {**DEEP, "num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 4}
CASES = {
    "llama": (GROUPED, ("ffn_channel", "kv_group")),
    "mistral": (GROUPED, ("ffn_channel", "kv_group", "query_head")),
    "qwen2": (GROUPED, ("ffn_channel", "kv_group")),
    "qwen3": (GROUPED, ("ffn_channel", "kv_group")),
    "gemma2": (GROUPED, ("ffn_channel", "kv_group")),
    "phi3": (GROUPED, ("ffn_channel", "kv_group")),
    "gpt2": ({"n_layer": 3}, ("ffn_channel",)),
    "gpt_neox": (DEEP, ("ffn_channel",)),
    "opt": (DEEP, ("ffn_channel",)),
    "falcon-gqa": (DEEP, ("ffn_channel",)),
}


def deep(family):
    return make(family, **CASES[family][0])


def uneven_plan(groups, kinds):
    """Keep everything in the first layer, fewer units in each later one, and never the first ones."""
    kept, units = {}, {}
    for g in groups.of_kinds(kinds):
        count = max(1, g.units - g.layer * max(1, g.units // 5))
        kept[g.name] = tuple(range(g.units - count, g.units))
        units[g.name] = g.units
    return PruningPlan(kept, units)


def cut(family):
    model = deep(family)
    groups = discover(model)
    return slice(model, uneven_plan(groups, CASES[family][1]), groups)


@pytest.fixture(scope="module")
def small():
    return cut("llama")


@pytest.fixture(scope="module")
def folder(small, tokenizer, tmp_path_factory):
    model = slice(*with_vocabulary(tokenizer))
    return checkpoint.save(model, tmp_path_factory.mktemp("per-layer") / "model", tokenizer=tokenizer)


def with_vocabulary(tokenizer):
    model = make("llama", **GROUPED, vocab_size=len(tokenizer))
    return model, uneven_plan(discover(model), ("ffn_channel", "kv_group"))


@pytest.mark.parametrize("family", CASES)
def test_masked_equals_sliced_and_reloads_exactly(family, tmp_path):
    model = deep(family).double()
    reference = Reference(model)
    plan = uneven_plan(reference.groups, CASES[family][1])
    small = slice(model, plan, reference.groups)
    ids = probe_ids(model)
    assert (plain_logits(small, ids) - reference.logits(ids, plan.kept)).abs().max() < 1e-9
    assert small.num_parameters() == reference.groups.remaining_parameters(plan.kept)
    small.float().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(small) and isinstance(again, type(model))
    assert torch.equal(plain_logits(again, ids), plain_logits(small, ids))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["base_model_type"] == model.config.model_type and set(config["per_layer_config"]) == {"1", "2"}


def test_head_counts_that_llama_refuses(small):
    heads = [layer.num_attention_heads for layer in small.config.per_layer_config]
    assert heads == [12, 10, 8] and small.config.hidden_size % 10
    assert [layer.self_attn.q_proj.out_features for layer in small.model.layers] == [48, 40, 32]


def test_with_removed_layers_and_a_narrower_residual_stream():
    model = make("mistral", num_hidden_layers=4).double()
    reference = Reference(model)
    plan = uneven_plan(reference.groups, ("ffn_channel",))
    kept = {**plan.kept, "hidden": tuple(range(0, 48, 2)), "model.layers/layer": (0, 2, 3)}
    plan = PruningPlan(kept, {**plan.units, "hidden": 48, "model.layers/layer": 4})
    small = slice(model, plan, reference.groups)
    wanted = reference.logits(probe_ids(model), plan.kept)
    assert (plain_logits(small, probe_ids(model)) - wanted).abs().max() < 1e-9
    assert [c.intermediate_size for c in small.config.per_layer_config] == [44, 28, 20]
    assert small.config.hidden_size == 24 and small.config.num_hidden_layers == 3


def test_widths_that_differ_only_in_removed_layers_need_no_special_class():
    model = make("llama", **DEEP)
    groups = discover(model)
    first = next(g for g in groups.of_kinds(["ffn_channel"]) if g.layer == 1)
    kept = {first.name: tuple(range(20)), "model.layers/layer": (0, 2)}
    small = slice(model, PruningPlan(kept, {first.name: 44, "model.layers/layer": 3}), groups)
    assert small.config.model_type == "llama"


def test_cutting_again(small):
    """A per-layer model is discovered, proven and cut further like any other."""
    double = cut("llama").double()
    reference = Reference(double)
    plan = uneven_plan(reference.groups, ("ffn_channel", "kv_group"))
    again = slice(double, plan, reference.groups)
    wanted = reference.logits(probe_ids(double), plan.kept)
    assert type(again) is type(double)
    assert (plain_logits(again, probe_ids(double)) - wanted).abs().max() < 1e-9
    assert all(p.route == "config" and p.max_difference < 1e-9 for p in prove(double, ["ffn_channel", "layer"]))
    groups = discover(small)
    assert not expressible(small, groups, ["ffn_channel", "kv_group"], uniform=False).refused
    refused = expressible(small, groups, ["ffn_channel"]).refused
    assert "--per-layer only" in refused["model.layers.*.mlp/ffn_channel"]


def test_what_no_field_says_is_refused_before_the_weights_are_read(monkeypatch):
    model = make("bloom")
    groups = discover(model)
    plan = uneven_plan(groups, ("ffn_channel",))
    monkeypatch.setattr(Reference, "logits", lambda *_: pytest.fail("computed"))
    with pytest.raises(PlanError, match="BloomConfig has no field"):
        slice(model, plan, groups)


FRESH = """
import json, sys
sys.path += sys.argv[2:]
sys.modules["secateur"] = None  # importing it would fail
import torch
from transformers import AutoModelForCausalLM, pipeline
folder = sys.argv[1]
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    raise SystemExit("loaded without the flag")
except ValueError as error:
    assert "trust_remote_code" in str(error)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
model.save_pretrained(folder + "-again")
again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True).eval()
ids = torch.arange(3, 40)[None]
assert torch.equal(model(ids).logits, again(ids).logits)
text = pipeline("text-generation", folder, trust_remote_code=True)("the old", max_new_tokens=8, do_sample=False)
print(json.dumps([model(ids).logits.sum().item(), model.num_parameters(), text[0]["generated_text"]]))
"""


def test_a_fresh_process_without_secateur_needs_only_the_flag(folder):
    command = [sys.executable, "-S", "-c", FRESH, str(folder), *site.getsitepackages()]
    done = subprocess.run(command, capture_output=True, text=True, env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    total, parameters, text = json.loads(done.stdout.splitlines()[-1])
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert parameters == model.num_parameters()
    assert total == pytest.approx(model(torch.arange(3, 40)[None]).logits.sum().item(), rel=1e-5)
    mine = pipeline("text-generation", str(folder))("the old", max_new_tokens=8, do_sample=False)
    assert mine[0]["generated_text"] == text


def test_importing_secateur_first_makes_the_flag_unnecessary(folder):
    code = (
        "import sys, secateur; assert 'transformers' not in sys.modules and 'torch' not in sys.modules\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r}); print(type(model).__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "secateur.modeling_per_layer", done.stderr[-2000:]


def test_lora_trains_merges_and_saves(small, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = pickle.loads(pickle.dumps(small))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.5)
    ids = torch.arange(3, 60)[None]
    for _ in range(2):
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    assert adapted(input_ids=ids, labels=ids).loss < loss
    trained = adapted.eval()(ids).logits
    adapted.save_pretrained(tmp_path / "adapter")
    small.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.allclose(PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()(ids).logits, trained)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(again(ids).logits, merged(ids).logits) and torch.allclose(again(ids).logits, trained, atol=1e-5)


def tokens(model, **options):
    ids = torch.arange(3, 15)[None]
    return model.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=False, **options)[0].tolist()


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_every_cache_generates_the_same_tokens(family):
    model = cut(family)
    plain = tokens(model, use_cache=False)
    assert tokens(model) == plain
    cache = StaticCache(config=model.config, max_cache_len=32)
    assert tokens(model, past_key_values=cache) == plain
    assert tokens(model, num_beams=2) == tokens(model, num_beams=2, use_cache=False)


def test_attention_implementations_agree_and_reach_every_layer(small):
    ids = probe_ids(small)
    logits = {}
    for name in ("eager", "sdpa"):
        small.set_attn_implementation(name)
        assert {layer.self_attn.config._attn_implementation for layer in small.model.layers} == {name}
        logits[name] = small(ids).logits
    assert torch.allclose(logits["eager"], logits["sdpa"], atol=1e-5)


def test_compiled_equals_eager():
    """One graph over unequal layers; the backend is one that needs no C compiler."""
    widths = {1: {"intermediate_size": 20, "num_key_value_heads": 1}, 2: {"skip": ["attention"]}, 3: {"skip": ["mlp"]}}
    model = built("llama", widths, num_hidden_layers=4)
    ids = probe_ids(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.allclose(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, atol=1e-6)
    torch.compiler.reset()


def built(model_type, per_layer, **sizes):
    """A per-layer model made from a configuration, with random weights."""
    torch.manual_seed(0)
    base = config_class(CONFIG_MAPPING[model_type])
    config = base(**{**LLAMA_LIKE, "num_hidden_layers": 3, **sizes}, per_layer_config=per_layer)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3"])
def test_skipped_sublayers_leave_the_residual_stream_alone(model_type, tmp_path):
    whole = built(model_type, {})
    model = built(model_type, {1: {"skip": ["attention"]}, 2: {"skip": ["mlp"]}})
    model.load_state_dict(whole.state_dict(), strict=False)
    with torch.no_grad():
        # a zero output projection is no sublayer at all
        whole.model.layers[1].self_attn.o_proj.weight.zero_()
        whole.model.layers[2].mlp.down_proj.weight.zero_()
    ids = probe_ids(model)
    assert torch.equal(plain_logits(model, ids), plain_logits(whole, ids))
    assert model.num_parameters() < whole.num_parameters()
    plain = tokens(model, use_cache=False)
    assert tokens(model) == plain
    assert tokens(model, past_key_values=StaticCache(config=model.config, max_cache_len=32)) == plain
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain_logits(again, ids), plain_logits(model, ids))


def test_skips_that_would_go_wrong_are_refused():
    with pytest.raises(ValueError, match="layer 0 must keep its attention"):
        built("llama", {0: {"skip": ["attention"]}})
    with pytest.raises(ValueError, match="cannot skip 'norm'"):
        built("llama", {1: {"skip": ["norm"]}})
    with pytest.raises(ValueError, match="no submodule that is its mlp"):
        built("opt", {1: {"skip": ["mlp"]}}, ffn_dim=44, word_embed_proj_dim=48)
    with pytest.raises(ValueError, match="adds the residual itself"):
        built("bloom", {1: {"skip": ["attention"]}}, n_layer=3, n_head=6)


@pytest.mark.parametrize(
    ("model_type", "sizes", "per_layer"),
    [
        ("mixtral", {"num_local_experts": 4}, {1: {"num_local_experts": 3}, 2: {"intermediate_size": 24}}),
        (
            "qwen3_moe",
            {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "decoder_sparse_step": 1,
                "head_dim": 8,
            },
            {
                1: {"num_experts": 3},
                2: {"moe_intermediate_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2},
            },
        ),
    ],
)
def test_mixtures_of_experts(model_type, sizes, per_layer, tmp_path):
    model = built(model_type, per_layer, **sizes)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(plain_logits(again, probe_ids(model)), plain_logits(model, probe_ids(model)))
    assert tokens(model) == tokens(model, use_cache=False)


def test_configurations_survive_copies_and_pickling(small, tmp_path):
    small.config.save_pretrained(tmp_path)
    again = pickle.loads(pickle.dumps(AutoConfig.from_pretrained(tmp_path)))
    assert again.to_dict()["per_layer_config"] == small.config.to_dict()["per_layer_config"]
    assert model_class(type(small).base) is type(small) and config_class(CONFIG_MAPPING["llama"]) is type(again)


@pytest.fixture
def run(secateur):
    """A command that must succeed."""

    def run(*arguments):
        code, _, err = secateur(*arguments)
        assert code == 0, err

    return run


def test_the_command_line_prunes_recovers_and_measures(checkpoint_folder, text_file, tmp_path, run):
    small, recovered = tmp_path / "small", tmp_path / "recovered"
    run("prune", checkpoint_folder, "-o", small, "--method", "llm-pruner",
        "--sparsity", 0.2, "--criterion", "l2", "--per-layer",
        "--protect-first", 1, "--calibration", text_file, "--samples", 2, "--seq-len", 16)  # fmt: skip
    assert "trust_remote_code=True" in (small / "README.md").read_text()
    assert json.loads((small / "results.json").read_text())["parity"]["max_logit_difference"] == 0.0
    run("recover", small, "-o", recovered, "--data", text_file, "--steps", 1, "--batch-size", 2, "--seq-len", 32)
    run("eval", recovered, "--text", text_file, "--seq-len", 64)
    run("bench", recovered, "--against", checkpoint_folder, "--prompt-length", 8, "--new-tokens", 2,
        "--repetitions", 1)  # fmt: skip
    widths = [c.intermediate_size for c in AutoConfig.from_pretrained(recovered).per_layer_config]
    assert widths[0] == 96 > widths[1] and AutoTokenizer.from_pretrained(recovered)
    run("prune", checkpoint_folder, "-o", tmp_path / "replayed", "--plan", small / "plan.json")
    a, b = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (small, tmp_path / "replayed"))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_a_recipe_of_the_paper_runs_to_its_end(checkpoint_folder, text_file, tmp_path, run):
    run("run", "llm-pruner/llama-7b", f"model.source={checkpoint_folder}", f"prune.calibration.source={text_file}",
        "prune.calibration.seq_len=16", f"recovery.data=[{text_file}]", "recovery.steps=1", "recovery.batch_size=2",
        f"evaluation.texts=[{text_file}]", "evaluation.seq_len=[64]", "prune.protect_first=1", "prune.protect_last=1",
        "benchmark=false", "-o", tmp_path / "run")  # fmt: skip
    widths = [
        c.num_attention_heads for c in AutoConfig.from_pretrained(tmp_path / "run" / "recovered").per_layer_config
    ]
    assert widths == [6, 4, 6]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["parity"]["max_logit_difference"] == 0.0
