"""What is known about a class is found once, and saves time without changing what is found."""

import dataclasses
import json

import pytest
from families import make

from secateur.discovery import discover
from secateur.evaluation.alone import Alone
from secateur.surgery import expressible
from secateur.surgery.config_solver import ConfigSolver
from secateur.surgery.field_rule import FieldRule
from secateur.surgery.live import LiveModel
from secateur.surgery.rule_cache import RuleCache, cache_folder

KINDS = ["ffn_channel", "attention_head", "hidden"]


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def answers(model):
    can = expressible(model, discover(model), KINDS)
    return can.ties, can.refused, [can.feasible("hidden", c) for c in (40, 41, 48)]


def test_the_second_time_nothing_is_searched(fresh, monkeypatch):
    model = make("gpt2")
    first = answers(model)
    assert first[0] and list(cache_folder().glob("*.json"))

    def search(*_):
        raise AssertionError("searched again")

    monkeypatch.setattr(ConfigSolver, "_search", search)
    monkeypatch.setattr(ConfigSolver, "_possible_ties", property(search))
    assert answers(model) == first


def entries(count):
    """How many entries there are of configurations, beside the one of their class."""
    return len(list(cache_folder().glob("*.json"))) == count + 1


def test_another_configuration_is_another_entry(fresh):
    for number, width in enumerate((44, 60), start=1):
        answers(make("gpt2", n_inner=width))
        assert entries(number)


def test_rules_of_a_class_are_tried_first_on_another_configuration(fresh, monkeypatch):
    expected = answers(make("gpt2", n_inner=60))
    for file in cache_folder().glob("*.json"):
        file.unlink()
    answers(make("gpt2", n_inner=44))

    def search(*_):
        raise AssertionError("searched again")

    monkeypatch.setattr(ConfigSolver, "_possible_ties", property(search))
    assert answers(make("gpt2", n_inner=60)) == expected


def test_a_field_that_another_configuration_does_not_set_is_no_error(fresh):
    answers(make("gpt2", n_inner=60))
    known = answers(make("gpt2", n_inner=None))
    for file in cache_folder().glob("*.json"):
        file.unlink()
    assert answers(make("gpt2", n_inner=None)) == known


def test_a_rule_that_is_wrong_for_a_configuration_is_not_taken(fresh):
    """Heads of one configuration may be set by what means nothing, or something else, in another."""
    model = make("llama")
    groups = discover(model)
    right = expressible(model, groups, ["kv_group"])
    cache = RuleCache(model, groups)
    cache.file.unlink()
    family = next(g.family for g in groups if g.kind == "kv_group")
    wrong = [FieldRule((family,), fields) for fields in (("head_dim",), ("no_such_field",), ("num_attention_heads",))]
    cache.class_file.write_text(json.dumps({"rules": [dataclasses.asdict(rule) for rule in wrong]}))
    assert cache.of_class() == wrong
    again = expressible(model, groups, ["kv_group"])
    assert not right.refused and not again.refused and again.feasible(family, 2)
    assert cache.load().rules[frozenset([family])].fields == ("num_attention_heads", "num_key_value_heads")


@pytest.mark.parametrize("content", ["", "{}", '{"rules": [{"families": 3}]}'])
def test_a_damaged_entry_is_found_out_anew(fresh, content):
    model = make("gpt2")
    first = answers(model)
    for file in cache_folder().glob("*.json"):
        file.write_text(content)
    assert answers(model) == first


def test_folds_survive(fresh):
    model = make("gemma2")
    groups = discover(model)
    for _ in range(2):
        assert not expressible(model, groups, ["hidden"]).refused


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert answers(make("gpt2"))[0]


def test_what_masks_amount_to_is_known_the_second_time(fresh, monkeypatch):
    model = make("gpt2")  # whose norms average over the hidden dimension, so that zeros there do not amount to removal
    groups = discover(model)
    first = Alone(model, groups, ["ffn_channel"]).masked
    both = Alone(model, groups, ["ffn_channel", "hidden"]).masked
    assert first == both == {g.family for g in groups.of_kinds(["ffn_channel"])}

    def twin(*_):
        raise AssertionError("tried again")

    monkeypatch.setattr(LiveModel, "twin", property(twin))
    assert Alone(model, groups, ["ffn_channel", "hidden"]).masked == both
    RuleCache(model, groups).zeroed_file.write_text("spoiled")
    with pytest.raises(AssertionError, match="tried again"):
        Alone(model, groups, ["ffn_channel"])


def test_of_code_that_may_change_nothing_is_kept_that_is_not_checked_again(fresh):
    class Changing(type(make("llama"))):
        pass

    model = make("llama")
    groups = discover(model)
    model.__class__ = Changing
    RuleCache(model, groups).save_zeroed({"hidden": True})
    assert RuleCache(model, groups).zeroed() == {} and not list(cache_folder().glob("*"))


def test_masks_are_those_of_the_model_whatever_groups_are_at_hand(fresh):
    model = make("llama")
    groups, kinds = discover(model), ["ffn_channel", "kv_group"]
    some = Alone(model, groups.only(kinds), kinds).masked
    assert some == Alone(model, groups, kinds).masked == {g.family for g in groups.of_kinds(kinds)}
