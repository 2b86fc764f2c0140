"""Llama and its relatives: RMS norms, rotary positions, grouped queries and gated MLPs (Llama 1-3, SmolLM, Mistral, Qwen 2 and 3)."""

from typing import Any

from models.attention.rotary import QKNormConfig
from models.attention.site import AttentionConfig
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.pretrained.family import Conversion, Fields, register_family
from models.pretrained.rope import rope

GATED_MLP = (("gate", "gate_proj"), ("inward", "up_proj"), ("outward", "down_proj"))  # our names and theirs


@register_family("llama", "mistral", "qwen2", "qwen3")
def llama(fields: Fields) -> Conversion:
    kind = fields.model_type
    mlp_bias = fields.get("mlp_bias", False)
    biased = {"qwen2": ("query", "key", "value")}.get(kind, fields.get("attention_bias", False))
    heads = fields["num_attention_heads"]
    config = LanguageModelConfig(
        fields["num_hidden_layers"],
        fields["hidden_size"],
        fields["vocab_size"],
        None,
        layerwise(
            [
                AttentionConfig(
                    heads,
                    fields.get("num_key_value_heads", heads),
                    fields.get("head_dim", 128 if kind == "qwen3" else None),
                    position=rope(fields),
                    bias=biased,
                    window=window,
                    qk_norm=QKNormConfig(eps=fields.get("rms_norm_eps", 1e-6)) if kind == "qwen3" else None,
                )
                for window in windows(fields)
            ]
        ),
        MLPConfig(
            fields["intermediate_size"], fields.activation("hidden_act", "silu"), True, mlp_bias, gate_bias=mlp_bias
        ),
        norm="rms",
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        tie_embeddings=fields.get("tie_word_embeddings", False),
    )
    conversion = Conversion("llama", config, prefix="model.")
    llama_names(conversion, config.n_layers)
    return conversion


def windows(fields: Fields) -> list[int | None]:
    """How far back each layer reads: everywhere the same, or as `layer_types` says."""
    layers, size = fields["num_hidden_layers"], fields.get("sliding_window", None)
    if fields.model_type.startswith("qwen") and not fields.get("use_sliding_window", False):
        size = None
    kinds = fields.get("layer_types", [])
    if not kinds and fields.model_type.startswith("qwen"):
        full = fields.get("max_window_layers", 28)
        kinds = ["full_attention" if layer < full else "sliding_attention" for layer in range(layers)]
    if not kinds:
        return [size] * layers
    return [size if kind == "sliding_attention" else None for kind in kinds]


def layerwise(mixers: list[Any]) -> Any:
    """One configuration if all layers have the same, else a tuple."""
    return mixers[0] if all(mixer == mixers[0] for mixer in mixers) else tuple(mixers)


def llama_names(conversion: Conversion, layers: int, norm_plus: float = 0.0) -> None:
    """The tensor names that Llama's relatives share; `norm_plus`: what norms store less than they multiply with."""
    conversion["embed.W_E"] = "model.embed_tokens.weight"
    conversion["unembed.weight"] = "lm_head.weight"
    conversion.norm("ln_final", "model.norm", norm_plus)
    for layer in range(layers):
        own, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        conversion.norm(f"{own}.ln1", f"{theirs}.input_layernorm", norm_plus)
        conversion.norm(f"{own}.ln2", f"{theirs}.post_attention_layernorm", norm_plus)
        for part, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "o_proj")):
            conversion.linear(f"{own}.attn.{part}", f"{theirs}.self_attn.{name}")
        conversion.norm(f"{own}.attn.qk_norm.query", f"{theirs}.self_attn.q_norm", norm_plus)
        conversion.norm(f"{own}.attn.qk_norm.key", f"{theirs}.self_attn.k_norm", norm_plus)
        gated_mlp_names(conversion, f"{own}.mlp", f"{theirs}.mlp")


def gated_mlp_names(conversion: Conversion, own: str, theirs: str) -> None:
    """The three maps of a gated MLP."""
    for part, name in GATED_MLP:
        conversion.linear(f"{own}.{part}", f"{theirs}.{name}")
