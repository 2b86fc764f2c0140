"""Dictionaries of other tools: the same codes and reconstructions as their own equations give, both ways."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from probes.features import BatchTopK, Dictionary, Gated, JumpReLU, Standard, TopK, build_dictionary
from probes.features.dictionaries import DictionaryConfig
from probes.features.formats import load_dictionary_learning, load_saelens, save_dictionary_learning, save_saelens
from workbench.lab.checkpoints import CheckpointError

D, M, K = 6, 15, 4


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X = random(40, D, seed=1) + 0.5


def top(x: Tensor, k: int = K) -> Tensor:
    return torch.where(x >= x.topk(k, dim=-1).values[..., -1:], x, 0.0)


def saelens_weights(kind: str) -> dict[str, Tensor]:
    weights = {"W_enc": random(D, M, seed=2), "W_dec": random(M, D, seed=3), "b_dec": random(D, seed=4)}
    if kind == "gated":
        return weights | {"b_gate": random(M, seed=5), "r_mag": 0.3 * random(M, seed=6), "b_mag": random(M, seed=7)}
    weights["b_enc"] = random(M, seed=5)
    return weights | ({"threshold": random(M, seed=8).abs()} if kind == "jumprelu" else {})


def saelens_codes(kind: str, w: dict[str, Tensor], x: Tensor, subtract: bool, rescaled: bool = False) -> Tensor:
    """The published encoders (SAELens 6), from their equations."""
    inner = x - w["b_dec"] if subtract else x
    if kind == "gated":
        return ((inner @ w["W_enc"] + w["b_gate"]) > 0) * (inner @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
    z = inner @ w["W_enc"] + w["b_enc"]
    if kind == "topk":
        return top(z * w["W_dec"].norm(dim=-1) if rescaled else z).relu()
    return z.relu() * (z > w["threshold"]) if kind == "jumprelu" else z.relu()


@pytest.mark.parametrize("kind", ["standard", "topk", "jumprelu", "gated"])
@pytest.mark.parametrize("subtract", [True, False])
def test_saelens_dictionaries_give_their_codes(kind: str, subtract: bool, tmp_path: Path) -> None:
    weights = saelens_weights(kind)
    save_file(weights, tmp_path / "sae_weights.safetensors")
    config = {
        "architecture": kind,
        "d_in": D,
        "d_sae": M,
        "k": K,
        "apply_b_dec_to_input": subtract,
        "normalize_activations": "none",
    }
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    dictionary, read = load_saelens(tmp_path)
    expected = saelens_codes(kind, weights, X, subtract)
    assert read == config and 0 < int((expected > 0).sum()) < expected.numel()
    assert torch.allclose(dictionary.encode(X), expected, atol=1e-5)
    assert torch.allclose(dictionary(X), expected @ weights["W_dec"] + weights["b_dec"], atol=1e-4)


def test_saelens_top_k_on_rescaled_codes(tmp_path: Path) -> None:
    weights = saelens_weights("topk")
    save_file(weights, tmp_path / "sae_weights.safetensors")
    config = {"architecture": "topk", "activation_fn_kwargs": {"k": K}, "rescale_acts_by_decoder_norm": True}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    dictionary, _ = load_saelens(tmp_path)
    codes = saelens_codes("topk", weights, X, True, rescaled=True)
    norms = weights["W_dec"].norm(dim=-1)
    assert torch.allclose(dictionary.encode(X), codes, atol=1e-4)
    assert torch.allclose(dictionary(X), (codes / norms) @ weights["W_dec"] + weights["b_dec"], atol=1e-4)


def learned(config: DictionaryConfig) -> Dictionary:
    """A dictionary of ours with every parameter and both scales away from special values."""
    dictionary = build_dictionary(config, D)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(dictionary.named_parameters()):
            if name == "log_threshold":
                parameter.copy_(0.5 * random(M, seed=30))
            else:
                parameter.add_(0.4 * random(*parameter.shape, seed=20 + i))
        dictionary.scale.fill_(1.3)
        dictionary.out_scale.fill_(1.3)
        if isinstance(config, BatchTopK):
            dictionary.threshold.fill_(0.4)
    return dictionary.eval()


OURS: list[DictionaryConfig] = [Standard(M), TopK(M, k=K), BatchTopK(M, k=K), JumpReLU(M), Gated(M)]


@pytest.mark.parametrize("config", OURS, ids=lambda c: c.kind)
def test_ours_survive_saelens_and_mean_the_same_there(config: DictionaryConfig, tmp_path: Path) -> None:
    dictionary = learned(config)
    save_saelens(dictionary, tmp_path, hook_name="blocks.1.hook_resid_post")
    about = json.loads((tmp_path / "cfg.json").read_text())
    weights = load_file(tmp_path / "sae_weights.safetensors")
    codes = saelens_codes(about["architecture"], weights, X, True)
    assert torch.allclose(codes, dictionary.encode(X), atol=1e-5)
    assert torch.allclose(codes @ weights["W_dec"] + weights["b_dec"], dictionary(X), atol=1e-4)
    assert about["metadata"]["hook_name"] == "blocks.1.hook_resid_post" and about["d_sae"] == M
    again, _ = load_saelens(tmp_path)
    assert torch.allclose(again.encode(X), dictionary.encode(X), atol=1e-5) and torch.allclose(
        again(X), dictionary(X), atol=1e-4
    )


def dictionary_learning(kind: str) -> tuple[dict[str, Tensor], Any]:
    """Weights of a class, and (codes, reconstruction) by its published equations."""
    encoder, decoder, bias = random(M, D, seed=2), random(D, M, seed=3), random(D, seed=4)
    norms = decoder.norm(dim=0)
    linear = {"encoder.weight": encoder, "decoder.weight": decoder}
    if kind == "AutoEncoder":
        weights = {**linear, "encoder.bias": random(M, seed=5), "bias": bias}
        codes = ((X - bias) @ encoder.T + weights["encoder.bias"]).relu()
    elif kind == "AutoEncoderNew":
        weights = {**linear, "encoder.bias": random(M, seed=5), "decoder.bias": bias}
        codes = (X @ encoder.T + weights["encoder.bias"]).relu()
    elif kind == "GatedAutoEncoder":
        weights = {
            **linear,
            "decoder_bias": bias,
            "gate_bias": random(M, seed=5),
            "r_mag": random(M, seed=6),
            "mag_bias": random(M, seed=7),
        }
        inner = (X - bias) @ encoder.T
        codes = (
            ((inner + weights["gate_bias"]) > 0) * (weights["r_mag"].exp() * inner + weights["mag_bias"]).relu() * norms
        )
        return weights, (codes, (codes / norms) @ decoder.T + bias)
    elif kind == "JumpReluAutoEncoder":
        weights = {
            "W_enc": encoder.T,
            "W_dec": decoder.T,
            "b_enc": random(M, seed=5),
            "b_dec": bias,
            "threshold": random(M, seed=8).abs(),
        }
        z = X @ encoder.T + weights["b_enc"]
        codes = (z * (z > weights["threshold"])).relu() * norms
        return weights, (codes, (codes / norms) @ decoder.T + bias)
    else:
        weights = {
            **linear,
            "encoder.bias": random(M, seed=5),
            "b_dec": bias,
            "k": torch.tensor(K),
            "threshold": torch.tensor(0.6),
        }
        z = ((X - bias) @ encoder.T + weights["encoder.bias"]).relu()
        codes = top(z) if kind == "AutoEncoderTopK" else z * (z > 0.6)
        if kind == "MatryoshkaBatchTopKSAE":
            weights = {
                "W_enc": encoder.T,
                "W_dec": decoder.T,
                "b_enc": weights["encoder.bias"],
                "b_dec": bias,
                "k": torch.tensor(K),
                "threshold": torch.tensor(0.6),
            }
    return weights, (codes, codes @ decoder.T + bias)


CLASSES = [
    "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
]  # fmt: skip


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("pickled", [True, False])
def test_dictionary_learning_gives_its_codes(kind: str, pickled: bool, tmp_path: Path) -> None:
    weights, (codes, reconstruction) = dictionary_learning(kind)
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    if pickled:
        torch.save(weights, tmp_path / "ae.pt")
    else:
        save_file(weights, tmp_path / "ae.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": kind}}))
    dictionary, _ = load_dictionary_learning(tmp_path)
    assert torch.allclose(dictionary.encode(X), codes, atol=1e-4)
    assert torch.allclose(dictionary(X), reconstruction, atol=1e-4)


@pytest.mark.parametrize("config", OURS, ids=lambda c: c.kind)
def test_ours_survive_dictionary_learning(config: DictionaryConfig, tmp_path: Path) -> None:
    dictionary = learned(config)
    save_dictionary_learning(dictionary, tmp_path)
    again, _ = load_dictionary_learning(tmp_path)
    assert torch.allclose(again(X), dictionary(X), atol=1e-4)
    assert torch.equal(again.encode(X) > 0, dictionary.encode(X) > 0)
    assert not list(tmp_path.glob("*.pt")) and not list(tmp_path.glob(".*"))


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    def expect(message: str, reader: Any = load_saelens) -> None:
        with pytest.raises(CheckpointError, match=message):
            reader(tmp_path)

    expect("has no cfg.json")
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "jumprelu"}))
    expect("has no sae_weights.safetensors")
    save_file(saelens_weights("standard"), tmp_path / "sae_weights.safetensors")
    expect("no tensor 'threshold'")
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "jumprelus"}))
    expect("Did you mean 'jumprelu'")
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "standard", "normalize_activations": "layer_norm"}))
    expect("depends on each row")
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "topk"}))
    expect("has no 'k'")
    (tmp_path / "sae_weights.safetensors").write_bytes(b"nothing")
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "standard"}))
    expect("not a whole safetensors file")
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "CrossCoder"}}))
    expect("no counterpart", load_dictionary_learning)
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder"}}))
    expect("neither ae.safetensors nor ae.pt", load_dictionary_learning)
    torch.save({"a": open}, tmp_path / "ae.pt")
    expect("holds more than tensors", load_dictionary_learning)
    transcoder = build_dictionary(TopK(8, d_out=3, k=2), 5)
    with pytest.raises(CheckpointError, match="transcoder"):
        save_saelens(transcoder, tmp_path)
