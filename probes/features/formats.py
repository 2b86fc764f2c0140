"""Dictionaries of other tools, read and written without those tools installed.

SAELens              folder with `cfg.json` and `sae_weights.safetensors`; matrices W_enc [d_in, feature], W_dec [feature, d_in]
dictionary_learning  folder with `config.json` ("trainer": {"dict_class": ...}) and `ae.pt` or `ae.safetensors`; torch Linear layers

A foreign dictionary becomes one of ours with the same codes and the same reconstructions, number for number. What our form cannot express
is refused in words: normalisation that depends on the single row, an architecture without a counterpart. `ae.pt` is a pickle: it is read
with torch's `weights_only`, which builds tensors and runs no code, and is never written.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from probes.features.dictionaries import (
    BatchTopK,
    Dictionary,
    DictionaryConfig,
    Gated,
    JumpReLU,
    Standard,
    TopK,
    build_dictionary,
)
from workbench.instrument.errors import suggestion
from workbench.lab.checkpoints import CheckpointError, read_json, write_json

SAELENS_CONFIG, SAELENS_WEIGHTS = "cfg.json", "sae_weights.safetensors"
State = dict[str, Tensor]


def load_saelens(folder: str | Path) -> tuple[Dictionary, dict[str, Any]]:
    """A dictionary in SAELens's layout (versions 3 to 6) and its `cfg.json`.

    Architectures standard, topk, jumprelu and gated (SAELens stores a trained BatchTopK as jumprelu).

    Raises:
        CheckpointError: a missing or damaged file, a missing tensor, an architecture or option without a counterpart here.
    """
    folder = Path(folder)
    config, weights = read_json(folder / SAELENS_CONFIG), _weights(folder / SAELENS_WEIGHTS)
    kind = config.get("architecture", "standard")
    readers: dict[str, Callable[[State, int], tuple[DictionaryConfig, State]]] = {
        "standard": lambda w, m: (Standard(m), {"b_enc": w["b_enc"]}),
        "topk": lambda w, m: (TopK(m, k=_setting(config, "k", folder)), {"b_enc": w["b_enc"]}),
        "jumprelu": lambda w, m: (JumpReLU(m), {"b_enc": w["b_enc"], "log_threshold": _log(w["threshold"])}),
        "gated": lambda w, m: (Gated(m), {"b_enc": w["b_gate"], "r_mag": w["r_mag"], "b_mag": w["b_mag"]}),
    }
    if kind not in readers:
        raise CheckpointError(
            f"{folder}: architecture {kind!r} has no counterpart here.{suggestion(kind, readers)} Known: {', '.join(readers)}."
        )
    normalised = config.get("normalize_activations", "none")
    if normalised not in ("none", "expected_average_only_in", False, None):
        raise CheckpointError(
            f"{folder}: normalize_activations={normalised!r} depends on each row and has no counterpart here"
        )
    if normalised == "expected_average_only_in":
        raise CheckpointError(
            f"{folder}: its input scale is not in the file; fold it into the weights before saving (normalize_activations 'none')"
        )
    try:
        d_in, features = weights["W_enc"].shape
        own_config, state = readers[kind](weights, features)
        state |= {"W_enc": weights["W_enc"].T, "W_dec": weights["W_dec"], "b_dec": weights["b_dec"]}
    except KeyError as missing:
        raise CheckpointError(
            f"{folder / SAELENS_WEIGHTS}: no tensor {missing}, which architecture {kind!r} needs"
        ) from None
    if config.get("rescale_acts_by_decoder_norm"):
        norms = state["W_dec"].norm(dim=-1)
        state |= {
            "W_enc": state["W_enc"] * norms[:, None],
            "b_enc": state["b_enc"] * norms,
            "W_dec": state["W_dec"] / norms[:, None],
        }
    if not config.get("apply_b_dec_to_input", True):
        _without_input_bias(state)
    return _assembled(own_config, d_in, state, folder), config


def save_saelens(dictionary: Dictionary, folder: str | Path, hook_name: str = "", model_name: str = "") -> Path:
    """Write a dictionary in SAELens's layout. A trained BatchTopK becomes jumprelu, as there.

    Raises:
        CheckpointError: a transcoder (SAELens has another class for those).
    """
    state = _plain(dictionary)
    about: dict[str, Any] = {"architecture": dictionary.config.kind}
    weights = {"W_enc": state["W_enc"].T, "W_dec": state["W_dec"], "b_dec": state["b_dec"], "b_enc": state["b_enc"]}
    if isinstance(dictionary.config, BatchTopK):
        about["architecture"] = "jumprelu"
        weights["threshold"] = state["threshold"].clamp_min(0).expand(dictionary.n_features)
    elif isinstance(dictionary.config, TopK):
        about["k"] = dictionary.config.k
    elif isinstance(dictionary.config, JumpReLU):
        weights["threshold"] = state["log_threshold"].exp()
    elif isinstance(dictionary.config, Gated):
        weights |= {"b_gate": weights.pop("b_enc"), "r_mag": state["r_mag"], "b_mag": state["b_mag"]}
    about |= {
        "d_in": dictionary.d_in, "d_sae": dictionary.n_features, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none",
        "metadata": {"hook_name": hook_name, "model_name": model_name},
    }  # fmt: skip
    return _write(folder, SAELENS_WEIGHTS, weights, SAELENS_CONFIG, about)


def load_dictionary_learning(folder: str | Path) -> tuple[Dictionary, dict[str, Any]]:
    """A dictionary in dictionary_learning's layout and its `config.json`.

    Classes AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder, AutoEncoderTopK, BatchTopKSAE and
    MatryoshkaBatchTopKSAE.

    Raises:
        CheckpointError: as for `load_saelens`.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    trainer = config.get("trainer", config)
    kind = trainer.get("dict_class", "AutoEncoder")
    if kind not in _DICTIONARY_LEARNING:
        raise CheckpointError(
            f"{folder}: dict_class {kind!r} has no counterpart here.{suggestion(kind, _DICTIONARY_LEARNING)}"
        )
    path = folder / "ae.safetensors"
    weights = _weights(path) if path.is_file() else _pickled(folder / "ae.pt")
    try:
        own_config, state = _DICTIONARY_LEARNING[kind](weights, trainer)
    except KeyError as missing:
        raise CheckpointError(f"{folder}: no tensor or setting {missing}, which {kind} needs") from None
    return _assembled(own_config, state["W_enc"].shape[1], state, folder), config


def save_dictionary_learning(dictionary: Dictionary, folder: str | Path) -> Path:
    """Write a dictionary in dictionary_learning's layout, weights as `ae.safetensors` (its `ae.pt` would be a pickle)."""
    state = _plain(dictionary)
    config = dictionary.config
    linear = {"encoder.weight": state["W_enc"], "decoder.weight": state["W_dec"].T}
    norms = state["W_dec"].norm(dim=-1)  # there, codes of some classes are in units of the decoder's norms
    if isinstance(config, Gated):
        kind = "GatedAutoEncoder"
        weights = {
            **linear,
            "decoder_bias": state["b_dec"],
            "gate_bias": state["b_enc"],
            "r_mag": state["r_mag"],
            "mag_bias": state["b_mag"],
        }
    elif isinstance(config, JumpReLU):
        kind = "JumpReluAutoEncoder"
        shifted = (
            state["b_enc"] - state["W_enc"] @ state["b_dec"]
        )  # that class does not take the decoder's bias off the input
        weights = {
            "W_enc": state["W_enc"].T,
            "W_dec": state["W_dec"],
            "b_enc": shifted,
            "b_dec": state["b_dec"],
            "threshold": state["log_threshold"].exp(),
        }
    elif isinstance(config, TopK):
        kind = "BatchTopKSAE" if isinstance(config, BatchTopK) else "AutoEncoderTopK"
        threshold = state.get("threshold", torch.tensor(-1.0))
        weights = {
            **linear,
            "encoder.bias": state["b_enc"],
            "b_dec": state["b_dec"],
            "k": torch.tensor(config.k),
            "threshold": threshold,
        }
    else:
        kind = "AutoEncoder"
        weights = {**linear, "encoder.bias": state["b_enc"], "bias": state["b_dec"]}
    about = {
        "dict_class": kind,
        "activation_dim": dictionary.d_in,
        "dict_size": dictionary.n_features,
        "mean_decoder_norm": float(norms.mean()),
    }
    if isinstance(config, TopK):
        about["k"] = config.k
    return _write(folder, "ae.safetensors", weights, "config.json", {"trainer": about})


# --------------------------------------------------------------------------------------------------- classes of dictionary_learning


def _autoencoder(w: State, _: Mapping[str, Any]) -> tuple[DictionaryConfig, State]:
    return Standard(len(w["encoder.weight"])), _linear(w, w["bias"])


def _autoencoder_new(w: State, _: Mapping[str, Any]) -> tuple[DictionaryConfig, State]:
    state = _linear(w, w["decoder.bias"])
    _without_input_bias(state)
    return Standard(len(w["encoder.weight"])), state


def _autoencoder_gated(w: State, _: Mapping[str, Any]) -> tuple[DictionaryConfig, State]:
    """Codes are multiplied by the norms of the decoder's columns, so ours have unit directions and longer magnitudes."""
    norms = w["decoder.weight"].norm(dim=0)
    state = {
        "W_enc": w["encoder.weight"],
        "W_dec": w["decoder.weight"].T / norms[:, None],
        "b_enc": w["gate_bias"],
        "b_dec": w["decoder_bias"],
        "r_mag": w["r_mag"] + norms.log(),
        "b_mag": w["mag_bias"] * norms,
    }
    return Gated(len(norms)), state


def _autoencoder_jumprelu(w: State, _: Mapping[str, Any]) -> tuple[DictionaryConfig, State]:
    norms = w["W_dec"].norm(dim=-1)
    state = {
        "W_enc": w["W_enc"].T * norms[:, None],
        "W_dec": w["W_dec"] / norms[:, None],
        "b_enc": w["b_enc"] * norms,
        "b_dec": w["b_dec"],
        "log_threshold": _log(w["threshold"] * norms),
    }
    _without_input_bias(state)
    return JumpReLU(len(norms)), state


def _autoencoder_topk(w: State, trainer: Mapping[str, Any]) -> tuple[DictionaryConfig, State]:
    k = int(w["k"]) if "k" in w else int(trainer["k"])
    return TopK(len(w["encoder.weight"]), k=k), _linear(w, w["b_dec"])


def _autoencoder_batch_topk(w: State, trainer: Mapping[str, Any]) -> tuple[DictionaryConfig, State]:
    config, state = _autoencoder_topk(w, trainer)
    assert isinstance(config, TopK)
    return BatchTopK(config.n_features, k=config.k), {**state, "threshold": w["threshold"].float()}


def _autoencoder_matryoshka(w: State, trainer: Mapping[str, Any]) -> tuple[DictionaryConfig, State]:
    k = int(w["k"]) if "k" in w else int(trainer["k"])
    state = {
        "W_enc": w["W_enc"].T,
        "W_dec": w["W_dec"],
        "b_enc": w["b_enc"],
        "b_dec": w["b_dec"],
        "threshold": w["threshold"].float(),
    }
    return BatchTopK(len(w["W_dec"]), k=k), state


_DICTIONARY_LEARNING: dict[str, Callable[[State, Mapping[str, Any]], tuple[DictionaryConfig, State]]] = {
    "AutoEncoder": _autoencoder,
    "AutoEncoderNew": _autoencoder_new,
    "GatedAutoEncoder": _autoencoder_gated,
    "JumpReluAutoEncoder": _autoencoder_jumprelu,
    "AutoEncoderTopK": _autoencoder_topk,
    "BatchTopKSAE": _autoencoder_batch_topk,
    "MatryoshkaBatchTopKSAE": _autoencoder_matryoshka,
}


# ----------------------------------------------------------------------------------------------------------------------- parts


def _linear(w: State, b_dec: Tensor) -> State:
    return {"W_enc": w["encoder.weight"], "W_dec": w["decoder.weight"].T, "b_enc": w["encoder.bias"], "b_dec": b_dec}


def _without_input_bias(state: State) -> None:
    """Ours takes the decoder's bias off the input; where the other does not, the encoder's biases make up for it."""
    missing = state["W_enc"] @ state["b_dec"]
    state["b_enc"] = state["b_enc"] + missing
    if "b_mag" in state:
        state["b_mag"] = state["b_mag"] + state["r_mag"].exp() * missing


def _log(threshold: Tensor) -> Tensor:
    """log θ; a threshold of 0 or below lets every positive code pass, as −∞ does."""
    return torch.where(threshold > 0, threshold.clamp_min(1e-45).log(), -math.inf)


def _plain(dictionary: Dictionary) -> State:
    """Weights that act on unscaled activations."""
    if dictionary.config.d_out is not None:
        raise CheckpointError("a transcoder cannot be written in this layout: it has one site only")
    state = {name: tensor.detach().float() for name, tensor in dictionary.state_dict().items()}
    scale = state.pop("scale")
    state.pop("out_scale")
    return {**state, "W_enc": state["W_enc"] / scale, "W_dec": state["W_dec"] * scale, "b_dec": state["b_dec"] * scale}


def _assembled(config: DictionaryConfig, d_in: int, state: State, folder: Path) -> Dictionary:
    dictionary = build_dictionary(config, d_in)
    own = dictionary.state_dict()
    for name, tensor in state.items():
        if own[name].shape != tensor.shape:
            raise CheckpointError(
                f"{folder}: {name} has the shape {list(tensor.shape)}, expected {list(own[name].shape)}"
            )
        own[name] = tensor.float()
    dictionary.load_state_dict(own)
    return dictionary.eval()


def _setting(config: Mapping[str, Any], name: str, folder: Path) -> int:
    found = config.get(name, (config.get("activation_fn_kwargs") or {}).get(name))
    if found is None:
        raise CheckpointError(f"{folder / SAELENS_CONFIG} has no {name!r}, which its architecture needs")
    return int(found)


def _weights(path: Path) -> State:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None


def _pickled(path: Path) -> State:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has neither ae.safetensors nor {path.name}")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} holds more than tensors, or is damaged: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{path} is no dictionary of tensors")
    return found


def _write(folder: str | Path, weights_name: str, weights: State, config_name: str, config: dict[str, Any]) -> Path:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{weights_name}.tmp"
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary)
    temporary.replace(folder / weights_name)
    write_json(folder / config_name, json.loads(json.dumps(config)))
    return folder
