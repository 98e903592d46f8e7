"""What optimizers keep follows the components, by whatever name; what cannot follow is refused before any change."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from families import make
from test_prunedlora import adapted, trained

from secateur.discovery.trace import probe_ids
from secateur.errors import PlanError
from secateur.importance.components import ComponentCriterion
from secateur.methods.prunedlora import PrunedLoRA
from secateur.surgery.component_pruning import Pruner
from secateur.surgery.ranks import Components


def optimizer_of(name: str, parameters) -> torch.optim.Optimizer:
    """One that keeps the last gradient, or its square, and moves nothing."""
    if name.startswith("torch "):
        return torch.optim.RMSprop(parameters, lr=0.0, alpha=0.0)
    found = pytest.importorskip("bitsandbytes").optim
    kept = {"alpha": 1e-6} if name == "RMSprop" else {"betas": (0.0, 0.0)}  # it refuses 0
    return getattr(found, name)(parameters, lr=0.0, **kept)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ["AdamW", "RMSprop", "Lion", "torch RMSprop"])
def test_averages_of_squares_are_scaled_as_squares(name, wrapped):
    """After another scale they are what the gradients of the new factors give."""
    model = adapted(make("llama"))
    parts, ids = Components(model), probe_ids(model)
    optimizer = optimizer_of(name, [p for p in model.parameters() if p.requires_grad])

    def kept() -> dict[str, torch.Tensor]:
        states = {path: optimizer.state[parts.up(path)] for path in parts.layers}
        return {f"{path} {key}": value.clone() for path, state in states.items() for key, value in state.items()
                if torch.is_tensor(value) and value.dim()}  # fmt: skip

    def step() -> None:
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()

    step()
    given = SimpleNamespace(state=optimizer.state, optimizer=optimizer) if wrapped else optimizer  # as accelerate does
    parts.rescale({path: 4 * scale for path, scale in parts.scales.items()}, given)
    followed = kept()
    step()
    assert followed
    for key, tensor in kept().items():
        torch.testing.assert_close(followed[key], tensor, rtol=1e-3, atol=1e-6 * float(tensor.abs().max()))


class Packed(torch.Tensor):
    """Stands for a state that holds blocks, with the shape of its parameter."""


def in_blocks(factor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What 8-bit optimizers of bitsandbytes keep."""
    return {
        "state1": torch.zeros_like(factor, dtype=torch.uint8), "qmap1": torch.zeros(256), "absmax1": torch.zeros(4),
    }  # fmt: skip


def in_rows(factor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What Adafactor keeps."""
    return {"exp_avg_sq_row": torch.zeros(factor.shape[0]), "exp_avg_sq_col": torch.zeros(factor.shape[1])}


def packed(factor: torch.Tensor) -> dict[str, torch.Tensor]:
    """What 8-bit optimizers of torchao keep."""
    return {"exp_avg": torch.zeros(factor.shape).as_subclass(Packed)}


@pytest.mark.parametrize("kept", [in_blocks, in_rows, packed])
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("keep", ["alpha", "scale"])
def test_state_that_cannot_be_cut_is_refused_before_any_change(kept, compact, keep):
    model = adapted(make("llama").double())
    pruner = Pruner(model, ComponentCriterion(), keep=keep)
    pruner.compact = compact
    ids = probe_ids(model)
    model(input_ids=ids, labels=ids).loss.backward()
    pruner.observe()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averages = {name: dict(state) for name, state in pruner.averages.items()}
    last = pruner.parts.down(list(pruner.initial)[-1])  # the others could be changed before it is looked at
    with pytest.raises(PlanError, match=r"the optimizer keeps .*: take another optimizer") as refusal:
        pruner.remove(dict.fromkeys(pruner.initial, 2), SimpleNamespace(state={last: kept(last)}))
    assert "compact_every" not in str(refusal.value)
    assert set(pruner.ranks.values()) == {8} == set(pruner.parts.ranks.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(
        pruner.averages[name][key] is tensor for name, state in averages.items() for key, tensor in state.items()
    )


def test_components_are_not_set_to_zero_beside_state_that_cannot_follow():
    parts = Components(adapted(make("llama")))
    name = next(iter(parts.layers))
    before = parts.up(name).clone()
    with pytest.raises(PlanError, match="keeps qmap1"):
        parts.clear({name: torch.tensor([1])}, SimpleNamespace(state={parts.up(name): in_blocks(parts.up(name))}))
    assert torch.equal(parts.up(name), before)


def test_adafactor_is_refused_in_training(tmp_path):
    with pytest.raises(PlanError, match="adamw_torch"):
        trained(adapted(make("llama")), [PrunedLoRA(2, every=2)], tmp_path, optim="adafactor")


@pytest.mark.parametrize("optimizer", ["paged_adamw_32bit", "rmsprop_bnb_32bit", "lion_32bit", "adagrad", "sgd"])
def test_optimizers_whose_state_is_cut(optimizer, tmp_path):
    pytest.importorskip("bitsandbytes")
    pruning = PrunedLoRA(2, every=2)
    trained(adapted(make("llama")), [pruning], tmp_path, optim=optimizer)
    assert set(pruning.finish().values()) == {2}
