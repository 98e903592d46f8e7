"""Compensation: equations against least squares on the activations themselves, exact cases, what is restored."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM

import secateur as sc
from secateur.compensation import ALONE, STRENGTHS, Compensation, Moments, Reader, compensated
from secateur.discovery import discover
from secateur.errors import PlanError
from secateur.methods.llm_pruner import LLMPruner, run
from secateur.plan import PruningPlan


def ids(rows, length=24, seed=0):
    return torch.randint(3, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


def plan_of(groups, kinds=("ffn_channel",), share=0.5):
    """Every second unit, say, of each group."""
    chosen = groups.of_kinds(kinds)
    kept = {g.name: tuple(range(max(1, round(g.units * (1 - share))))) for g in chosen}
    return PruningPlan(kept, {g.name: g.units for g in chosen})


def inputs_of(model, path, batch):
    found = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda m, a: found.append(a[0].detach()))
    with torch.no_grad():
        model(input_ids=batch, use_cache=False)
    handle.remove()
    return found[0].flatten(0, -2).double()


def test_the_answer_is_damped_least_squares():
    """min |W y - V x_K|^2 + lambda d |V - W_K|^2, as an ordinary least-squares problem on the tokens."""
    torch.manual_seed(0)
    x, y, dense = torch.randn(200, 12).double(), torch.randn(200, 12).double(), torch.randn(7, 12).double()
    keep = torch.arange(12) < 8
    module = torch.nn.Linear(12, 7, bias=False).double()
    module.weight.data.copy_(dense)
    reader = Reader("", module, keep)
    for target in (x, y):
        moments = Moments(x.T @ x, target.T @ x, target.T @ target, x.mean(0), 200)
        for strength in STRENGTHS[:-1]:
            damping = (strength * float((x.T @ x)[:8, :8].diagonal().mean())) ** 0.5
            tokens = torch.cat([x[:, :8], damping * torch.eye(8)])
            results = torch.cat([target @ dense.T, damping * dense[:, :8].T])
            wanted = torch.linalg.lstsq(tokens, results).solution.T
            found = reader.ridge(moments, strength)
            torch.testing.assert_close(found[:, :8], wanted, rtol=1e-6, atol=1e-7)
            assert not found[:, 8:].any()
            direct = float((target @ dense.T - x @ found.T).square().sum() / (target @ dense.T).square().sum())
            assert moments.error(dense, found) == pytest.approx(direct, rel=1e-9)
    plain = dense * keep
    assert torch.equal(reader.ridge(moments, float("inf")), plain)
    moments = Moments(x.T @ x, x.T @ x, x.T @ x, x.mean(0), 200)
    shift = torch.randn(7).double()
    direct = float((x @ (dense - plain).T - shift).square().sum() / (x @ dense.T).square().sum())
    assert moments.error(dense, plain, shift) == pytest.approx(direct, rel=1e-9)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_channels_that_others_repeat_are_made_up_for_entirely(model_type):
    """Where every channel that goes is a copy of one that stays, the cut model computes what the dense one does."""
    model = zoo.tiny_model(model_type).double()
    groups = discover(model)
    state, chosen = dict(model.named_parameters()), groups.of_kinds(["ffn_channel"])
    for group in chosen:
        half = group.units // 2
        for m in group.members:
            if m.role == "producer":
                index = torch.from_numpy(m.index[:, 0])
                state[m.parameter].data.index_copy_(
                    m.dim, index[half : 2 * half], state[m.parameter].data.index_select(m.dim, index[:half])
                )
    kept = {g.name: (*range(g.units // 2), *range(2 * (g.units // 2), g.units)) for g in chosen}
    plan = PruningPlan(kept, {g.name: g.units for g in chosen})
    batch = ids(40)
    with torch.no_grad():
        dense = model(input_ids=batch[:2]).logits
        plain = sc.slice(model, plan)(input_ids=batch[:2]).logits
        with compensated(model, plan, [batch]) as done:
            small = sc.slice(model, plan)
        found = small(input_ids=batch[:2]).logits
    assert len(done) == len(chosen) and all(c.before > 0.01 > 1e-5 > c.after and c.strength == 1e-4 for c in done)
    assert (found - dense).norm() < 0.01 * (plain - dense).norm()


@pytest.mark.parametrize(
    "how", [Compensation(), Compensation(target="dense"), Compensation(target="halfway"), Compensation("bias")]
)
def test_errors_are_those_on_the_activations_and_the_model_is_restored(how):
    model = zoo.tiny_model("gpt2").double().train()
    groups, batch = discover(model), ids(8)
    plan = plan_of(groups, groups.kinds_in_blocks())
    before = copy.deepcopy(model.state_dict())
    original = copy.deepcopy(model).eval()
    with compensated(model, plan, [batch[:3], batch[3:]], how) as done:
        assert not model.training
        checked = batch[3::4] if how.form == "ridge" else batch
        for made in done:
            module, dense = model.get_submodule(made.module), original.get_submodule(made.module)
            x = inputs_of(model, made.module, checked)
            y = x + how.dense_share * (inputs_of(original, made.module, checked) - x)
            shift = module.bias - dense.bias
            wanted, found = y @ dense.weight, x @ module.weight + shift
            error = float((wanted - found).square().sum() / wanted.square().sum())
            if how.form == "bias":
                assert made.strength is None and made.after == pytest.approx(error, rel=1e-4)
            elif made.strength == float("inf"):
                assert made.after == pytest.approx(error, rel=1e-4)
            assert made.after <= made.before + 1e-12
    assert [c.module for c in done] == [f"transformer.h.{i}.{m}.c_proj" for i in range(2) for m in ("attn", "mlp")]
    assert model.training and all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_halfway_is_the_mean_of_what_the_two_targets_give():
    """Of each matrix, at the inputs that it has by then."""
    model = zoo.tiny_model("llama").double()
    groups, batch = discover(model), ids(3)  # so few that lambda is not chosen
    plan = plan_of(groups, groups.kinds_in_blocks())
    dense = copy.deepcopy(model).eval()
    with compensated(model, plan, [batch], Compensation(target="halfway")) as done:
        for made in done:
            x, y = inputs_of(model, made.module, batch), inputs_of(dense, made.module, batch)
            weight, found = dense.get_submodule(made.module).weight, model.get_submodule(made.module).weight
            keep = found.abs().sum(0) > 0
            own = x[:, keep].T @ x[:, keep]
            damped = own + ALONE * own.diagonal().mean() * torch.eye(len(own)).double()
            answers = []
            for z in (x, y):
                missing = (z @ weight.T - x[:, keep] @ weight[:, keep].T).T @ x[:, keep]
                answers.append(weight[:, keep] + missing @ torch.linalg.inv(damped))
            assert torch.allclose(found[:, keep], (answers[0] + answers[1]) / 2, rtol=1e-5, atol=1e-8)
    assert len(done) > 2


def test_one_sequence_chooses_no_strength():
    model = zoo.tiny_model("llama")
    groups = discover(model)
    with compensated(model, plan_of(groups), [ids(1)]) as done:
        assert {c.strength for c in done} == {ALONE}


def test_what_cannot_be_compensated_is_refused():
    model = zoo.tiny_model("llama")
    groups = discover(model)
    with (
        pytest.raises(PlanError, match="no linear module that reads what goes has a bias"),
        compensated(model, plan_of(groups), [ids(4)], Compensation("bias")),
    ):
        pass
    with (
        pytest.raises(PlanError, match="no linear module reads what goes"),
        compensated(model, plan_of(groups, ["hidden"]), [ids(4)]),
    ):
        pass


def test_it_brings_back_much_of_what_the_cut_costs(trained, tokenizer, text_file):
    """Half of the FFN channels of a model that knows the text."""
    text = sc.load_corpus(str(text_file))
    tokens = sc.calibration_tokens(text, tokenizer, 64, 32, 0)
    settings = [LLMPruner(sc.Budget(0.3), sc.Gate(), compensation=c) for c in (None, Compensation())]
    plain, repaired = (run(trained, [tokens], s) for s in settings)
    assert plain.plan.kept == repaired.plan.kept
    dense, without, with_it = (
        sc.perplexity(m, tokenizer, text, seq_len=32).value for m in (trained, plain.model, repaired.model)
    )
    assert with_it - dense < 0.7 * (without - dense), (dense, without, with_it)


def test_from_the_command_line_with_scores_and_with_a_plan(secateur, checkpoint_folder, text_file, tmp_path):
    calibration = ["--calibration", text_file, "--samples", "16", "--seq-len", "32", "--compensate", "ridge"]
    given = ["--sparsity", "0.3", "--criterion", "gate", "--text", text_file]
    code, out, err = secateur(
        "prune", checkpoint_folder, "-o", tmp_path / "a", "--method", "llm-pruner", *given, *calibration
    )
    assert code == 0, err
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert f"compensated: {len(results['compensation'])} matrices" in out
    assert all(c["after"] <= c["before"] for c in results["compensation"])
    assert results["protocol"]["settings"]["compensate"] == "ridge" and "compensate_s" in results["timing"]
    plan = tmp_path / "a" / "plan.json"
    code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "b", "--plan", plan, *calibration)
    assert code == 0, err
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / f).state_dict() for f in "ab")
    assert all(torch.equal(a[n], b[n]) for n in a)
    code, _, err = secateur("prune", checkpoint_folder, "-o", tmp_path / "c", "--plan", plan)
    assert code == 0, err
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "c").state_dict()
    assert any(not torch.equal(a[n], plain[n]) for n in a)


WRONG = {
    "while training": (
        ["--method", "loraprune", "--data", "demo-calibration"],
        "loraprune has no use for --compensate",
    ),
    "no such form": (["--compensate", "svd"], "prune.compensate"),
    "a reduction": (["--criterion", "gate", "--reduction", "max"], "leave out the reduction max"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_told(secateur, checkpoint_folder, text_file, tmp_path, wrong):
    options, words = WRONG[wrong]
    calibration = [] if wrong == "while training" else ["--calibration", text_file, "--samples", "4"]
    given = ["--sparsity", "0.3", *calibration, *(["--compensate", "ridge"] if "--compensate" not in options else [])]
    code, _, err = secateur(
        "prune", checkpoint_folder, "-o", tmp_path / "out", "--method", "llm-pruner", *given, *options
    )
    assert code == 2 and words in " ".join(err.split()), err
    assert not list(tmp_path.iterdir())
