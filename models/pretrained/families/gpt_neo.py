"""GPT-Neo (Black et al. 2021): GPT-2 with unscaled scores and, in every other layer, a window."""

from models.attention.site import AttentionConfig
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.pretrained.families.llama import layerwise
from models.pretrained.family import Conversion, Fields, register_family


@register_family("gpt_neo")
def gpt_neo(fields: Fields) -> Conversion:
    width, layers = fields["hidden_size"], fields["num_layers"]
    kinds = [kind for pattern, times in fields["attention_types"] for _ in range(times) for kind in pattern]
    windows = [fields.get("window_size", 256) if kind == "local" else None for kind in kinds]
    config = LanguageModelConfig(
        layers,
        width,
        fields["vocab_size"],
        fields["max_position_embeddings"],
        layerwise([AttentionConfig(fields["num_heads"], bias=("output",), scale=1.0, window=size) for size in windows]),
        MLPConfig(fields.get("intermediate_size", 4 * width), fields.activation("activation_function", "gelu_new")),
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=fields.get("tie_word_embeddings", True),
    )
    conversion = Conversion(
        "gpt2", config, prefix="transformer.", ignored=(".attention.bias", ".attention.masked_bias")
    )
    conversion["embed.W_E"] = "transformer.wte.weight"
    conversion["pos_embed.W_pos"] = "transformer.wpe.weight"
    conversion["unembed.weight"] = "lm_head.weight"
    conversion.norm("ln_final", "transformer.ln_f")
    for layer in range(layers):
        own, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        conversion.norm(f"{own}.ln1", f"{theirs}.ln_1")
        conversion.norm(f"{own}.ln2", f"{theirs}.ln_2")
        for part, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "out_proj")):
            conversion.linear(f"{own}.attn.{part}", f"{theirs}.attn.attention.{name}")
        conversion.linear(f"{own}.mlp.inward", f"{theirs}.mlp.c_fc")
        conversion.linear(f"{own}.mlp.outward", f"{theirs}.mlp.c_proj")
    return conversion
