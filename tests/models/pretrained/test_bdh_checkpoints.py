"""Weights in the layout of the published BDH code: files, folders, compiled modules, mistakes. Logits against its equations, restated."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import models
from models.bdh.model import BDH
from models.bdh.official import save_official, to_official
from models.pretrained.family import UnsupportedCheckpoint
from models.pretrained.loader import is_published
from models.pretrained.outlook import outlook
from tests.models.test_bdh import CONFIG, published_forward
from workbench.lab.checkpoints import CheckpointError

EXACT, CLOSE = 1e-10, 1e-4
LAYERS = {"n_layer": CONFIG.n_layers}
SETTINGS = {"n_layer": 4, "n_embd": 12, "dropout": 0.0, "n_head": 3, "mlp_internal_dim_multiplier": 2, "vocab_size": 37}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """3 heads of 8 neurons, width 10: the neurons are no multiple of the width, which the shapes tell all the same."""
    return to_official(BDH(CONFIG).double())


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 37, (2, 19), generator=torch.Generator().manual_seed(0))


def largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


def check(path: Path, weights: dict[str, Tensor], tokens: Tensor, **options: Any) -> BDH:
    """Open it, and compare logits in float64 and float32 with the published equations."""
    expected = published_forward(weights, tokens, CONFIG.n_layers)
    model = models.load(path, dtype=torch.float64, **options)
    assert isinstance(model, BDH)
    assert largest(model(tokens) - expected) < EXACT < largest(expected)
    single = models.load(path, **options)
    assert next(single.parameters()).dtype == torch.float32
    assert largest(single(tokens) - expected) < CLOSE * max(1.0, largest(expected))
    return model


def row(folder: Path) -> dict[str, str]:
    """A line of docs/pretrained.md: logits in float64, and in float32 over the largest."""
    weights = to_official(BDH(CONFIG).double())
    path = folder / "dragon.safetensors"
    save_file(weights, path)
    tokens = torch.randint(0, 37, (2, 19), generator=torch.Generator().manual_seed(0))
    expected = published_forward(weights, tokens, CONFIG.n_layers)
    gaps = [largest(models.load(path, dtype=d, config=LAYERS)(tokens) - expected) for d in (torch.float64, None)]
    return {"logits": f"{gaps[0]:.0e}", "float32": f"{gaps[1] / max(1.0, largest(expected)):.0e}"}


def test_a_file_of_tensors(weights: dict[str, Tensor], tokens: Tensor, tmp_path: Path) -> None:
    save_file(weights, tmp_path / "dragon.safetensors")
    model = check(tmp_path / "dragon.safetensors", weights, tokens, config=LAYERS)
    assert model.name == "dragon" and model.architecture == "bdh" and model.origin["provenance"] == "pretrained"
    sizes = model.config
    assert (sizes.n_layers, sizes.d_model, sizes.n_heads, sizes.n_neurons, sizes.vocab_size) == (4, 10, 3, 24, 37)
    (tmp_path / "config.json").write_text(json.dumps(LAYERS))  # beside it
    check(tmp_path / "dragon.safetensors", weights, tokens)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."], ids=["plain", "compiled"])
def test_a_pickled_state_dict_by_choice(
    weights: dict[str, Tensor], tokens: Tensor, tmp_path: Path, prefix: str
) -> None:
    path = tmp_path / "dragon.pt"
    torch.save({prefix + name: tensor for name, tensor in weights.items()}, path)
    with pytest.raises(CheckpointError, match=r"only as pickles \(dragon.pt\).*allow_pickle_conversion=True"):
        models.load(path, config=LAYERS)
    check(path, weights, tokens, config=LAYERS, allow_pickle_conversion=True)


def test_a_folder_with_the_published_settings(tmp_path: Path) -> None:
    """No `model_type`; dropout is the file's; generation, state and saving are as for every model."""
    from dataclasses import replace

    source = BDH(replace(CONFIG, d_model=12)).double().eval()
    save_file(to_official(source), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(SETTINGS))
    assert is_published(tmp_path) and outlook(tmp_path).architecture == "bdh" and not outlook(tmp_path).problem
    model = models.load(tmp_path, dtype=torch.float64)
    prompt = torch.arange(6)[None]
    assert torch.equal(model.generate(prompt, 32), source.generate(prompt, 32))
    assert model.config.dropout == 0.0
    models.save(model, tmp_path / "ours")
    assert torch.equal(models.load(tmp_path / "ours", dtype=torch.float64)(prompt), model(prompt))


def test_written_in_the_published_layout(weights: dict[str, Tensor], tokens: Tensor, tmp_path: Path) -> None:
    """There and back: every tensor to the bit, frequencies of neurons in another order too."""
    order = torch.tensor([4, 5, 0, 1, 6, 7, 2, 3])
    moved = {
        **weights,
        "encoder": weights["encoder"][..., order],
        "encoder_v": weights["encoder_v"][..., order],
        "decoder": weights["decoder"].view(3, 8, 10)[:, order].flatten(0, 1),
        "attn.freqs": weights["attn.freqs"][..., order],
    }
    assert largest(published_forward(moved, tokens, 4) - published_forward(weights, tokens, 4)) < 1e-6
    save_file(moved, tmp_path / "moved.safetensors")
    model = check(tmp_path / "moved.safetensors", moved, tokens, config=LAYERS)
    again = check(save_official(model, tmp_path / "there"), moved, tokens)
    for name, tensor in to_official(again).items():
        assert torch.equal(tensor, moved[name]), name
    assert again.weights.frequencies.dtype == torch.float32


def test_only_the_published_model_is_written_in_its_layout(tmp_path: Path) -> None:
    for changes, message in (
        ({"decay": 1.0}, "without decay"),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06; the published code has 1e-5"),
    ):
        with pytest.raises(ValueError, match=message):
            save_official(models.build("bdh", **changes), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_mistakes_are_named(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "dragon.safetensors"

    def given(tensors: dict[str, Tensor], **config: Any) -> None:
        save_file(tensors, path)
        models.load(path, **({"config": config} if config else {}))

    with pytest.raises(UnsupportedCheckpoint, match=r"do not tell how many layers.*config=\{'n_layer'"):
        given(weights)
    with pytest.raises(ValueError, match=r"no field 'n_layers'. Did you mean 'n_layer'"):
        given(weights, n_layers=4)
    with pytest.raises(CheckpointError, match=r"encoder gives weights.D_x the shape \(3, 10, 8\).*\(6, 10, 4\)"):
        given(weights, n_layer=4, n_head=6)
    with pytest.raises(CheckpointError, match=r"holds 1 tensors that its config.json has no place for: encoder_w"):
        given({**weights, "encoder_w": weights["encoder"].clone()}, n_layer=4)
    with pytest.raises(CheckpointError, match=r"these weights \(.*\) are of no kind that is known"):
        given({name: tensor for name, tensor in weights.items() if name != "encoder_v"}, n_layer=4)
    with pytest.raises(ValueError, match="differ within a pair of neurons"):
        given({**weights, "attn.freqs": torch.rand(1, 1, 1, 8)}, n_layer=4)
    torch.save({"model": weights, "step": 3}, tmp_path / "training.pt")
    with pytest.raises(CheckpointError, match=r"holds 'model', 'step'. Expected tensors by name"):
        models.load(tmp_path / "training.pt", config=LAYERS, allow_pickle_conversion=True)
    (tmp_path / "broken.pt").write_bytes(b"no zip file")
    with pytest.raises(CheckpointError, match="is no file of tensors"):
        models.load(tmp_path / "broken.pt", config=LAYERS, allow_pickle_conversion=True)
    with pytest.raises(ValueError, match="config= has no place"):
        models.load("bdh-random", config=LAYERS)
    models.save(models.build("bdh"), tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"was written by models\.save\. Expected the folder"):
        models.load(tmp_path / "ours" / "model.safetensors")


def test_a_pickle_with_code_is_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (print, ("run",))

    torch.save({"encoder": Trap()}, tmp_path / "trap.pt")
    with pytest.raises(CheckpointError, match=r"is no file of tensors that torch.load\(weights_only=True\) reads"):
        models.load(tmp_path / "trap.pt", config=LAYERS, allow_pickle_conversion=True)
