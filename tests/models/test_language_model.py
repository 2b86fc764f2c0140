"""Initial weights of every architecture: what a part gives its parameters is what the model begins with."""

import pytest
import torch
from torch import Tensor, nn

import models
from models.registry import ARCHITECTURES

models.list_models()  # registers all


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_what_a_part_initialises_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that `initialise_own` of any part sets, also in the linear maps below it, is overwritten afterwards."""
    left: list[tuple[nn.Module, dict[str, Tensor], dict[str, Tensor]]] = []
    for kind in {type(module) for module in models.build(name).modules() if hasattr(module, "initialise_own")}:

        def recorded(self: nn.Module, original=kind.initialise_own) -> None:
            before = values(self)
            original(self)
            left.append((self, before, values(self)))

        monkeypatch.setattr(kind, "initialise_own", recorded)
    model = models.build(name)
    assert len(left) == sum(hasattr(module, "initialise_own") for module in model.modules())
    for module, before, after in left:
        final = values(module)
        for parameter, value in after.items():
            if not torch.equal(before[parameter].nan_to_num(), value.nan_to_num()):
                assert torch.equal(final[parameter], value), f"{type(module).__name__}.{parameter} was overwritten"


@pytest.mark.parametrize("name", ["mlstm", "xlstm"])
def test_gates_of_mlstm_begin_as_published(name: str) -> None:
    """Forget gates open from 3 to 6 over the heads; input gates at `input_bias` (xLSTM-7B), or N(0, 0.1²) (the first paper's block)."""
    mixer = models.build(name).blocks[0].mixer
    assert torch.equal(mixer.forget_gate.bias.detach(), torch.linspace(3.0, 6.0, mixer.n_heads))
    assert not mixer.forget_gate.weight.detach().any() and not mixer.input_gate.weight.detach().any()
    bias = mixer.input_gate.bias.detach()
    if name == "mlstm":
        assert mixer.config.input_bias != 0 and torch.equal(bias, torch.full_like(bias, mixer.config.input_bias))
    else:
        assert 0 < float(bias.abs().max()) < 0.5
