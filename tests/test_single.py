"""Proofs hold in float32 too: what differs there by more than rounding explains is not proven."""

import copy

import pytest
import torch
import zoo
from families import make

from secateur.discovery.reference import Reference
from secateur.surgery.proof import prove
from secateur.surgery.single import LIMIT, SinglePrecision
from secateur.surgery.slicing import cut, layer_solver
from secateur.surgery.trial import LogitCheck, with_noise


def cut_in_double(model, kind="ffn_channel"):
    """The reference in double precision, what is kept, and the cut model."""
    subject = with_noise(copy.deepcopy(model))
    reference = Reference(subject)
    kept = {g.name: tuple(range(1, g.units)) for g in reference.groups.of_kinds([kind])}
    solver = layer_solver(subject, reference.groups, reference)
    return reference, kept, cut(subject, reference.groups, kept, LogitCheck(subject, kept, reference), solver)


def test_the_same_cut_holds_in_float32():
    reference, kept, small = cut_in_double(make("llama"))
    found = SinglePrecision(reference).difference(small, kept)
    assert 0 <= found.largest < LIMIT and not found.failure and small.dtype == torch.float32


@pytest.mark.parametrize(("own_rounding", "holds"), [(None, False), (1e-4, False), (1e-3, True)])
def test_a_difference_is_rounding_only_if_the_model_itself_loses_as_much(monkeypatch, own_rounding, holds):
    reference, kept, small = cut_in_double(make("llama"))
    with torch.no_grad():
        small.lm_head.weight *= 1.001
    if own_rounding is not None:
        monkeypatch.setattr(SinglePrecision, "_rounding", lambda *_: own_rounding)
    found = SinglePrecision(reference).difference(small, kept)
    assert found.largest == pytest.approx(1e-3, rel=0.5)  # the embedding is tied to it
    assert bool(found.failure) is not holds
    assert holds or "in float32 the logits differ by 1.4e-03 of the largest" in found.failure


def test_what_the_model_itself_loses_is_measured_against_double_precision():
    reference, kept, _ = cut_in_double(make("llama"))
    single = SinglePrecision(reference)
    assert 0 < single._rounding(kept, *single._original(kept)) < LIMIT


@pytest.mark.parametrize("model_type", ["llama", "dbrx"])  # which experts of DBRX run depends on values
def test_every_proof_says_what_differs_in_float32(model_type):
    found = [p for p in prove(zoo.tiny_model(model_type)) if p.proven]
    assert found and all(0 <= p.relative_difference_float32 <= LIMIT for p in found)


def test_a_cut_that_does_not_run_in_float32_is_not_proven():
    subject = with_noise(zoo.tiny_model("deepseek_v2"))
    reference = Reference(subject)
    kept = {g.name: range(27) for g in reference.groups if "kv_a_proj" in g.name and g.kind == "latent"}
    config = copy.deepcopy(subject.config)
    config.kv_lora_rank = 27
    found = SinglePrecision(reference).difference(type(subject)(config).double(), kept)
    assert found.largest is None and "does not run in float32: Tensor must have a stride" in found.failure
