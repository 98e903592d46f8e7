"""LLM-Pruner end to end in memory, on a small trained model."""

import pytest
import torch

from secateur.allocation import Budget
from secateur.data import calibration_tokens, load_corpus
from secateur.errors import BudgetError, PlanError
from secateur.evaluation import perplexity
from secateur.importance import Magnitude, Random, Taylor
from secateur.methods.llm_pruner import LLMPruner, run


@pytest.fixture(scope="module")
def tokens(tokenizer, text_file):
    return calibration_tokens(load_corpus(text_file), tokenizer, 8, 32, 0)


@pytest.mark.parametrize("ranking", ["local", "global"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_block_wise_meets_the_budget(trained, tokens, ranking, iterations):
    settings = LLMPruner(Budget(param_sparsity=0.3), Taylor(), ranking=ranking, iterations=iterations)
    before = {n: t.clone() for n, t in trained.state_dict().items()}
    result = run(trained, [tokens], settings)
    left = result.model.num_parameters()
    channel = 3 * 3 * 48  # one FFN channel in each of three layers
    assert abs(left - 0.7 * trained.num_parameters()) <= channel
    assert all(torch.equal(t, before[n]) for n, t in trained.state_dict().items())
    assert result.groups.remaining_parameters(result.plan.kept) == left


def test_taylor_beats_random(trained, tokens, tokenizer, text_file):
    text = load_corpus(text_file)
    values = {}
    for name, criterion in (("taylor", Taylor()), ("random", Random(3))):
        model = run(trained, [tokens], LLMPruner(Budget(param_sparsity=0.3), criterion)).model
        values[name] = perplexity(model, tokenizer, text, seq_len=32).value
    dense = perplexity(trained, tokenizer, text, seq_len=32).value
    assert dense < values["taylor"] < values["random"]


def test_removed_units_never_return(trained, tokens):
    """With refreshed scores, what one step removes the next one removes too."""
    steps = []
    for iterations in (1, 2):
        settings = LLMPruner(Budget(unit_sparsity=0.25 * iterations), Magnitude(), iterations=iterations)
        steps.append(run(trained, [tokens], settings).plan)
    for name in steps[0].kept:
        assert set(steps[1].kept[name]) <= set(steps[0].kept[name])


def test_channel_wise_and_layer_wise(trained, tokens):
    result = run(trained, [tokens], LLMPruner(Budget(param_sparsity=0.25), Taylor(), mode="channel-wise"))
    assert result.model.config.hidden_size < 48 and list(result.plan.kept) == ["hidden"]
    result = run(trained, [tokens], LLMPruner(Budget(unit_sparsity=0.34), Taylor(), mode="layer-wise"))
    assert result.model.config.num_hidden_layers == 2
    settings = LLMPruner(Budget(unit_sparsity=0.34), Taylor(), mode="layer-wise", layer_choice="first")
    assert run(trained, [tokens], settings).plan.kept["model.layers/layer"] == (0, 1)


def test_protected_layers_stay_whole(trained, tokens):
    settings = LLMPruner(Budget(unit_sparsity=0.5), Taylor(), uniform=False, protect_first=1, protect_last=1)
    result = run(trained, [tokens], settings)
    touched = {result.groups.named(n).layer for n, k in result.plan.kept.items() if len(k) < result.plan.units[n]}
    assert touched == {1}


def test_what_cannot_be_pruned_is_told(tokens):
    from families import make

    result = run(make("gpt2"), [tokens.clamp(max=130)], LLMPruner(Budget(param_sparsity=0.1), Taylor()))
    assert "GPT2Config" in result.left_whole["transformer.h.*.attn/attention_head"]
    assert result.model.config.n_inner < 44
    with pytest.raises(PlanError, match=r"no hidden can be pruned: GPT2Config .*--kinds hidden,attention_head"):
        run(make("gpt2"), [tokens], LLMPruner(Budget(param_sparsity=0.1), Taylor(), mode="channel-wise"))


def test_a_kind_asked_for_by_name_must_be_prunable(trained, tokens):
    def refused(kinds, **settings):
        with pytest.raises(PlanError) as raised:
            run(trained, [tokens], LLMPruner(Budget(param_sparsity=0.1), Magnitude(), kinds=kinds, **settings))
        return str(raised.value)

    told = refused(("ffn_channel", "value_dim"))
    assert "no value_dim can be pruned: " in told and "no field" in told
    assert told.count("model.layers.*.self_attn/value_dim") == 1
    told = refused(("ffn_channel", "bogus"))
    assert "the model has no bogus" in told
    offered = told.split("; this model offers, with the same widths in every layer: ")[1].split(", ")
    assert set(offered) == {"ffn_channel", "kv_group", "query_head", "hidden", "layer"}
    assert "sublayer" in refused(("bogus",), uniform=False)
    settings = LLMPruner(Budget(param_sparsity=0.1), Magnitude(), kind_ratios={"bogus": 0.5})
    with pytest.raises(PlanError, match="the model has no bogus"):
        run(trained, [tokens], settings)


def test_a_share_of_a_kind_besides_those_of_the_mode(trained, tokens):
    settings = LLMPruner(Budget(param_sparsity=0.3), Magnitude(), kind_ratios={"hidden": 0.25})
    model = run(trained, [tokens], settings).model
    assert model.config.hidden_size == 36 and model.config.intermediate_size < 96


@pytest.mark.parametrize("share", [1.5, 1.0, -0.1, float("nan")])
def test_shares_out_of_range_are_refused(share):
    with pytest.raises(BudgetError, match=rf"ffn_channel={share:g}: the share of units .* \[0, 1\)"):
        LLMPruner(None, Magnitude(), kind_ratios={"ffn_channel": share})
    with pytest.raises(BudgetError, match="not among the kinds to prune"):
        LLMPruner(None, Magnitude(), kinds=("kv_group",), kind_ratios={"ffn_channel": 0.5})
