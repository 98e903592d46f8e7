"""Matrices solved ahead: against the equations, in the model and out of it again, and what cuts cost with them."""

import pytest
import torch
import zoo
from test_compensation import inputs_of

from secateur.compensation import ALONE, Database, Moments, Reader
from secateur.discovery import discover
from secateur.evaluation.cut_losses import CutLosses, losses_of_rows
from secateur.plan import PruningPlan
from secateur.surgery import mask


def ids(rows, seed=0):
    return torch.randint(3, 60, (rows, 24), generator=torch.Generator().manual_seed(seed))


def plan_without(groups, cut):
    kept = {n: tuple(u for u in range(groups.named(n).units) if u not in gone) for n, gone in cut.items()}
    return PruningPlan(kept, {n: groups.named(n).units for n in cut})


@pytest.mark.parametrize("model_type, reader", [("llama", "mlp.down_proj"), ("gpt2", "mlp.c_proj")])
def test_matrices_are_those_of_the_equations_and_the_model_is_restored(model_type, reader, tmp_path):
    model = zoo.tiny_model(model_type).double().eval()
    groups = discover(model)
    group = groups.of_kinds(["ffn_channel"])[1]
    path = next(m.parameter for m in group.members if m.parameter.endswith(f"{reader}.weight")).removesuffix(".weight")
    cut = {group.name: (0, 3, 4)}
    database = Database(model, groups, [ids(6)], tmp_path)
    database.prepare([cut, {}])
    x, keep = inputs_of(model, path, ids(6)), torch.tensor([u not in cut[group.name] for u in range(group.units)])
    wanted = Reader(path, model.get_submodule(path), keep).ridge(
        Moments(x.T @ x, x.T @ x, x.T @ x, x.mean(0), len(x)), ALONE
    )
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with database.in_place(cut):
        weight = model.get_submodule(path).weight
        torch.testing.assert_close(weight if model_type == "llama" else weight.T, wanted)
        changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
        assert changed == [f"{path}.weight"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with database.in_place({}):
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_nothing_is_solved_twice_and_an_error_inside_leaves_the_model_as_it_was(tmp_path):
    model = zoo.tiny_model("llama").eval()
    groups = discover(model)
    name = groups.of_kinds(["ffn_channel"])[0].name
    database = Database(model, groups, [ids(4)], tmp_path)
    database.prepare([{name: (1,)}, {name: (1, 2)}])
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2
    database.batches = []  # nothing left to solve on
    database.prepare([{name: (1,)}, {name: (1, 2)}])
    assert sorted(tmp_path.iterdir()) == files
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError), database.in_place({name: (1,)}):
        raise RuntimeError
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_losses_are_those_of_the_cut_model_with_these_matrices(model_type, tmp_path):
    """Stacked experts are read by no linear module: their cuts cost what they cost without."""
    model = zoo.tiny_model(model_type).eval()
    groups = discover(model)
    kinds = ["expert_channel"] if model_type == "mixtral" else ["ffn_channel", "kv_group", "attention_head"]
    chosen = groups.of_kinds(kinds)
    rows, database = ids(4, seed=1), Database(model, groups, [ids(8)], tmp_path)
    cuts = [{chosen[0].name: (0,)}, {g.name: (1,) for g in chosen}]
    found = CutLosses(model, groups, chosen, [rows], database)(cuts)
    plain = CutLosses(model, groups, chosen, [rows])(cuts)
    for cut, loss in zip(cuts, found, strict=True):
        with database.in_place(cut), mask(model, plan_without(groups, cut), groups):
            assert loss == pytest.approx(float(losses_of_rows(model, rows).mean()), rel=1e-5)
    assert (found == plain) == (model_type == "mixtral")
