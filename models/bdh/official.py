"""Loading and writing state dicts in the layout of the published BDH code.

Published name → here: `encoder` [head, d, neuron] → D_x; `encoder_v` → D_y; `decoder` [head·neuron, d] → E; `embed.weight` → W_E;
`lm_head` [d, vocab] → W_U; `attn.freqs` [1, 1, 1, neuron] → rotation frequencies.
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.bdh.model import BDH, BDHConfig
from workbench.instrument.errors import suggestion
from workbench.lab.checkpoints import CONFIG, WEIGHTS, write_json, write_tensors

NAMES = ("encoder", "encoder_v", "decoder", "embed.weight", "lm_head")
FREQUENCIES = "attn.freqs"


def from_official(state_dict: Mapping[str, Tensor], n_layers: int, **config: Any) -> BDH:
    """Build a BDH from a published state dict. The number of layers is not in the weights (they are shared) and must be given.

    Raises:
        KeyError: a tensor is missing. ValueError: a tensor or configuration field that does not exist, shapes that do not belong together.
    """
    missing = [name for name in NAMES if name not in state_dict]
    if missing:
        raise KeyError(
            f"Not a published BDH state dict: {', '.join(missing)} missing. Expected {', '.join(NAMES)} and optionally attn.freqs."
        )
    for name in state_dict:
        if name not in (*NAMES, FREQUENCIES):
            raise ValueError(
                f"A published BDH state dict has no tensor {name!r}.{suggestion(name, (*NAMES, FREQUENCIES))}"
            )
    settings = {item.name for item in fields(BDHConfig)} - {"n_layers", "d_model", "n_heads", "n_neurons", "vocab_size"}
    for name in config:
        if name not in settings:
            raise ValueError(
                f"{name!r} is no setting beside the weights.{suggestion(name, settings)} Expected one of {', '.join(sorted(settings))}."
            )
    if state_dict["encoder"].dim() != 3:
        raise ValueError(f"encoder has shape {tuple(state_dict['encoder'].shape)}; expected [head, d_model, neuron].")
    heads, width, neurons = state_dict["encoder"].shape
    vocab = state_dict["embed.weight"].shape[0]
    shapes = {
        "encoder_v": (heads, width, neurons),
        "decoder": (heads * neurons, width),
        "lm_head": (width, vocab),
        "embed.weight": (vocab, width),
    }
    for name, expected in shapes.items():
        if tuple(state_dict[name].shape) != expected:
            raise ValueError(
                f"{name} has shape {tuple(state_dict[name].shape)}; expected {expected} beside encoder {(heads, width, neurons)}."
            )
    model = BDH(BDHConfig(n_layers, width, heads, heads * neurons, vocab, **config))
    model.to(state_dict["encoder"].dtype)
    with torch.no_grad():
        model.weights.D_x.copy_(state_dict["encoder"])
        model.weights.D_y.copy_(state_dict["encoder_v"])
        model.weights.E.copy_(state_dict["decoder"].view(heads, neurons, width))
        model.embed.W_E.copy_(state_dict["embed.weight"])
        model.unembed.weight.copy_(state_dict["lm_head"].T)  # type: ignore[union-attr]
        if FREQUENCIES in state_dict:
            model.weights.frequencies.copy_(paired_frequencies(state_dict[FREQUENCIES], neurons))
    return model


def paired_frequencies(stored: Tensor, neurons: int) -> Tensor:
    """`attn.freqs` as rotation frequencies [neuron], float32.

    Raises:
        ValueError: not one per neuron of a head, or two within a pair of neurons.
    """
    frequencies = stored.flatten().to(torch.float32)
    if len(frequencies) != neurons:
        raise ValueError(f"attn.freqs has {len(frequencies)} numbers; expected {neurons}, one per neuron of a head.")
    if not torch.equal(frequencies[::2], frequencies[1::2]):
        raise ValueError("attn.freqs differ within a pair of neurons; a rotation needs one frequency per pair.")
    return frequencies


def save_official(model: BDH, folder: str | Path) -> Path:
    """Write the weights in the published layout, `model.safetensors`, and the published code's settings, `config.json`.

    `models.load` opens the folder; the published code reads the tensors with `load_state_dict`.

    Raises:
        ValueError: a variant, or another epsilon of the norms, which the published code would run as another model.
    """
    config, folder = model.config, Path(folder)
    if config.norm_eps != 1e-5:
        raise ValueError(
            f"norm_eps is {config.norm_eps}; the published code has 1e-5 and would compute something else."
        )
    tensors = to_official(model)
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        "model_type": "bdh",
        "n_layer": config.n_layers,
        "n_embd": config.d_model,
        "n_head": config.n_heads,
        "vocab_size": config.vocab_size,
        "dropout": config.dropout,
    }
    if config.n_neurons % config.d_model == 0:
        record["mlp_internal_dim_multiplier"] = config.n_neurons // config.d_model
    write_tensors(folder / WEIGHTS, tensors)
    write_json(folder / CONFIG, record)
    return folder


def to_official(model: BDH) -> dict[str, Tensor]:
    """The model's weights in the published layout. Raises ValueError for a variant, which the published code would run as another model."""
    if model.config.residual != "stream" or model.config.decay:
        raise ValueError(
            f"residual={model.config.residual!r}, decay={model.config.decay}: the published code has only residual='stream' without decay, "
            "and would compute something else from these weights."
        )
    weights = model.weights
    return {
        "encoder": weights.D_x.detach().clone(),
        "encoder_v": weights.D_y.detach().clone(),
        "decoder": weights.E.detach().flatten(0, 1).clone(),
        "embed.weight": model.embed.W_E.detach().clone(),
        "lm_head": model.W_U.detach().contiguous().clone(),
        FREQUENCIES: weights.frequencies.view(1, 1, 1, -1).clone(),
    }
