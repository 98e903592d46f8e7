"""What is known about a class is found once, and only ever saves time."""

import pytest
from families import make

from secateur.discovery import discover
from secateur.surgery import expressible
from secateur.surgery.config_solver import ConfigSolver
from secateur.surgery.rule_cache import cache_folder

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


def test_another_configuration_is_another_entry(fresh):
    for width in (44, 60):
        answers(make("gpt2", n_inner=width))
    assert len(list(cache_folder().glob("*.json"))) == 2


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
