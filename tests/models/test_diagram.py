"""The block diagram's data, on every architecture."""

import pytest

import models
from models.diagram import model_blocks

models.list_models()  # registers all


@pytest.mark.parametrize("name", list(models.registry.ARCHITECTURES))
def test_every_layer_is_drawn(name: str) -> None:
    model = models.build(name)
    blocks = model_blocks(model)
    assert {block["layer"] for block in blocks} == {None, *range(model.n_layers)}
    assert all(block["label"] and block["detail"] for block in blocks)


def test_states_are_described_by_their_sizes() -> None:
    def details(name: str) -> list[str]:
        return [block["detail"] for block in model_blocks(models.build(name)) if block["layer"] == 0]

    assert details("kda")[0] == "3 × 6×5"  # heads × key × value
    assert details("mamba") == ["48×5"]  # channels × state
    assert details("gateloop")[0] == "3 × 10×5"  # real and imaginary part of 5 rows
