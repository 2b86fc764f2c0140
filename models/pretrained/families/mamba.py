"""Mamba, Falcon Mamba and Mamba-2 in Hugging Face's layout."""

from collections.abc import Mapping
from typing import Any

from models.language_model import LanguageModelConfig
from models.pretrained.family import Conversion, Fields, UnsupportedCheckpoint, register_family
from models.pretrained.stored import stored
from models.recurrent.mamba import MambaConfig
from models.recurrent.mamba2 import Mamba2Config


@register_family("mamba", "falcon_mamba")
def mamba(fields: Fields) -> Conversion:
    fields.expect("hidden_act", "silu", "silu")
    falcon, width = fields.model_type == "falcon_mamba", fields["hidden_size"]
    rank = fields.get("time_step_rank", "auto")
    inner = fields.get("expand", 2) * width
    mixer = MambaConfig(
        fields["state_size"],
        fields.get("expand", 2),
        None if rank == "auto" else rank,
        next(groups for groups in (8, 4, 2, 1) if inner % groups == 0),
        fields.get("conv_kernel", 4),
        norm_factors=falcon,
        norm_eps=fields.get("mixer_rms_eps", 1e-6),
        bias=fields.get("use_bias", False),
        conv_bias=fields.get("use_conv_bias", True),
    )
    conversion = backbone(fields, mixer, "falcon-mamba" if falcon else "mamba", tied=True)
    for layer in range(conversion.config.n_layers):
        own, theirs = f"blocks.{layer}.mixer", f"backbone.layers.{layer}.mixer"
        conversion.linear(f"{own}.select", f"{theirs}.x_proj")
        conversion[f"{own}.dt_weight"] = f"{theirs}.dt_proj.weight"
        conversion[f"{own}.dt_bias"] = f"{theirs}.dt_proj.bias"
    return conversion


@register_family("mamba2")
def mamba2(fields: Fields) -> Conversion:
    fields.expect("hidden_act", "silu", "silu")
    fields.expect("use_bias", False, False)
    limit = [_number(bound) for bound in fields.get("time_step_limit", (0.0, float("inf")))]
    if limit != [0.0, float("inf")]:
        raise UnsupportedCheckpoint(
            f"config.json: time_step_limit = {limit} is not supported for mamba2. Expected [0, inf]."
        )
    expand = fields.get("expand", 2)
    if fields["num_heads"] * fields["head_dim"] != expand * fields["hidden_size"]:
        raise UnsupportedCheckpoint(
            "config.json: num_heads · head_dim is not expand · hidden_size, which is not supported for mamba2."
        )
    mixer = Mamba2Config(
        fields["state_size"],
        fields["head_dim"],
        expand,
        fields.get("n_groups", 8),
        fields.get("conv_kernel", 4),
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        conv_bias=fields.get("use_conv_bias", True),
    )
    conversion = backbone(fields, mixer, "mamba2", tied=False)
    for layer in range(conversion.config.n_layers):
        own, theirs = f"blocks.{layer}.mixer", f"backbone.layers.{layer}.mixer"
        conversion[f"{own}.dt_bias"] = f"{theirs}.dt_bias"
        conversion[f"{own}.norm_weight"] = f"{theirs}.norm.weight"
    return conversion


def backbone(fields: Fields, mixer: Any, architecture: str, tied: bool) -> Conversion:
    """Everything but what the two kinds of mixer call by different names."""
    layers = fields["num_hidden_layers"]
    config = LanguageModelConfig(
        layers,
        fields["hidden_size"],
        fields["vocab_size"],
        None,
        mixer,
        None,
        norm="rms",
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=fields.get("tie_word_embeddings", tied),
    )
    conversion = Conversion(architecture, config, prefix="backbone.")
    conversion["embed.W_E"] = "backbone.embeddings.weight"
    conversion["unembed.weight"] = "lm_head.weight"
    conversion.norm("ln_final", "backbone.norm_f")
    for layer in range(layers):
        own, theirs = f"blocks.{layer}.mixer", f"backbone.layers.{layer}.mixer"
        conversion.norm(f"blocks.{layer}.ln1", f"backbone.layers.{layer}.norm")
        conversion.linear(f"{own}.input", f"{theirs}.in_proj")
        conversion.linear(f"{own}.output", f"{theirs}.out_proj")
        conversion[f"{own}.conv"] = stored(f"{theirs}.conv1d.weight").then(lambda x: x[:, 0])
        conversion[f"{own}.conv_bias"] = f"{theirs}.conv1d.bias"
        for name in ("A_log", "D"):
            conversion[f"{own}.{name}"] = f"{theirs}.{name}"
    return conversion


def _number(value: Any) -> float:
    """A number of a published configuration, which writes infinity as a tagged object."""
    return float(value["__float__"] if isinstance(value, Mapping) else value)
