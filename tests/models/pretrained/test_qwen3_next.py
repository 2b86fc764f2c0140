"""Qwen3-Next checkpoints in the layouts that are published, and what is refused. Parity of logits, streams and states: `test_families`."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import models
from models.pretrained.family import Fields, UnsupportedCheckpoint, family
from tests.models.pretrained.reference import CASES, LENGTH, Pair, all_double, batch, largest, pair

CASE = CASES["qwen3_next-experts"]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair(CASE, tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def logits(both: Pair) -> Tensor:
    with torch.no_grad():
        return both.ours(batch(None)[0])


def rewritten(both: Pair, folder: Path, tensors: dict[str, Tensor], **record: object) -> Tensor:
    """Our logits from the checkpoint with other tensors and settings."""
    settings = json.loads((both.folder / "config.json").read_text())
    for name in ("layer_types", "rope_parameters"):
        if name in record:
            del settings[name], record[name]
    (folder / "config.json").write_text(json.dumps(settings | record))
    save_file(tensors, folder / "model.safetensors")
    with torch.no_grad():
        return models.load(folder, dtype=torch.float64)(batch(None)[0])


def test_router_scores(both: Pair) -> None:
    """What the routers of the two layers with experts say."""
    tokens = batch(None)[0]
    with torch.no_grad(), all_double(CASE.model):
        expected = both.theirs(tokens, output_router_logits=True).router_logits
    _, cache = both.ours.run_with_cache(tokens, role="router_scores")
    assert [name.split(".")[1] for name in cache] == ["0", "2"]
    for ours, theirs in zip(cache.values(), expected, strict=True):
        assert largest(ours - theirs.view(2, LENGTH, -1)) < CASE.exact < largest(ours)


def test_experts_stored_as_one_tensor(both: Pair, logits: Tensor, tmp_path: Path) -> None:
    """transformers keeps all experts of a layer in two tensors while it runs, and files may too."""
    tensors = load_file(both.folder / "model.safetensors")
    for layer in (0, 2):
        at = f"model.layers.{layer}.mlp.experts"
        taken = [
            {name: tensors.pop(f"{at}.{expert}.{name}_proj.weight") for name in ("gate", "up", "down")}
            for expert in range(5)
        ]
        tensors[f"{at}.gate_up_proj"] = torch.stack([torch.cat([one["gate"], one["up"]]) for one in taken])
        tensors[f"{at}.down_proj"] = torch.stack([one["down"] for one in taken])
    assert largest(rewritten(both, tmp_path, tensors) - logits) < 1e-12


def test_published_settings_and_further_heads(both: Pair, logits: Tensor, tmp_path: Path) -> None:
    """The published configuration has an interval instead of a list of layers and its rotary settings at the top; heads that predict
    further tokens are left out."""
    tensors = load_file(both.folder / "model.safetensors")
    tensors["mtp.layers.0.input_layernorm.weight"] = torch.zeros(3)
    settings = {"full_attention_interval": 2, "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    got = rewritten(both, tmp_path, tensors, layer_types=None, rope_parameters=None, **settings)
    assert largest(got - logits) < 1e-12


def test_refused_settings(both: Pair) -> None:
    record = json.loads((both.folder / "config.json").read_text())
    for change, message in (
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types lists 3 layers of the kinds sliding_attention"),
        ({"layer_types": ["full_attention"]}, "Expected 3 of linear_attention and full_attention"),
    ):
        with pytest.raises(UnsupportedCheckpoint, match=message):
            family("qwen3_next")(Fields({**record, **change}))
