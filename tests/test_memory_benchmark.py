"""The memory benchmark: its shapes are those of the models they are named after, and every way makes its steps."""

from argparse import Namespace

import loraprune_memory
import loraprune_page
import prunedlora_page
import pytest
import rank_memory
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"150m": 0.15e9, "llama-3-8b": 8.03e9, "llama-13b": 13.0e9, "llama-3-70b": 70.6e9}


@pytest.mark.parametrize("shape", [name for name in loraprune_memory.SHAPES if name != "tiny"])
def test_shapes_have_as_many_parameters_as_their_names_say(shape):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**loraprune_memory.SHAPES[shape]))
    assert model.num_parameters() == pytest.approx(SIZES[shape], rel=0.01)


@pytest.mark.parametrize("recompute", [False, True])
def test_every_way_makes_its_steps_on_a_tiny_shape(recompute, tmp_path, monkeypatch):
    settings = Namespace(
        shape="tiny", device="cpu", dtype="float32", samples=1, seq_len=8, repetitions=1, rank=2, scratch=tmp_path,
        recompute=recompute,
    )  # fmt: skip
    monkeypatch.setattr(loraprune_memory, "in_own_process", loraprune_memory.one_way)
    for name in ("now", "restart", "peak"):  # of a process of its own
        monkeypatch.setattr(loraprune_memory.Meter, name, lambda self: 1)
    rows = loraprune_memory.measure(settings)
    assert [row["way"] for row in rows] == list(loraprune_memory.WAYS) and not list(tmp_path.iterdir())
    assert all(row["recompute"] is recompute and row["seconds"] > 0 for row in rows)
    assert all(row["parameters"] == rows[0]["parameters"] < 1e6 for row in rows)


def test_the_page_takes_ways_that_did_not_fit_and_those_without_a_ratio():
    row = {"parameters": 7, "dtype": "bfloat16", "recompute": True}
    fits = {"way": "lora_4bit", "weights_bytes": 2**20, "peak_bytes": 2**21, "seconds": 0.5}
    rows = [row | {"way": "full_gradients", "failed": "out of memory"}, row | fits]
    data = {"protocol": {"device": "some GPU", "samples": 2, "seq_len": 8}, "rows": rows}
    lines = loraprune_page.memory([data])
    assert "some GPU" in lines[2]
    assert "| bfloat16 | recomputed | full_gradients | | | | out of memory |" in lines
    assert "| bfloat16 | recomputed | lora_4bit | 1 MiB | 2 MiB |  | 0.50 |" in lines


def test_what_a_large_rank_costs_falls_when_it_does(tmp_path, monkeypatch):
    settings = Namespace(
        shape="tiny", device="cpu", dtype="float32", samples=1, seq_len=8, initial_rank=16, target_rank=2, before=2,
        after=2, scratch=tmp_path,
    )  # fmt: skip
    monkeypatch.setattr(rank_memory, "in_own_process", rank_memory.one_way)
    for name in ("now", "restart", "peak"):  # of a process of its own
        monkeypatch.setattr(loraprune_memory.Meter, name, lambda self: 1)
    rows = rank_memory.measure(settings)
    large, pruned, small, dora, adalora = rows
    assert not list(tmp_path.iterdir())
    assert pruned["before"]["state_bytes"] == large["before"]["state_bytes"] == large["after"]["state_bytes"]
    assert pruned["after"]["state_bytes"] == small["after"]["state_bytes"] < large["after"]["state_bytes"] / 7
    assert all(small["after"]["state_bytes"] < row["after"]["state_bytes"] for row in (dora, adalora))
    protocol = vars(settings) | {"device": "some GPU"}
    table = prunedlora_page.memory([{"protocol": protocol, "rows": [*rows, {"way": "x", "failed": "out of memory"}]}])
    assert "some GPU" in table[2] and "| x | | | | out of memory |" in table and len(table) == 6 + 15 + 1 + 1
