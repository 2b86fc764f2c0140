"""GPT (Radford et al. 2018): GPT-2's maps with norms after each sum."""

from models.attention.site import AttentionConfig
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.pretrained.families.gpt2 import conv1d_attention
from models.pretrained.family import Conversion, Fields, register_family


@register_family("openai-gpt")
def openai_gpt(fields: Fields) -> Conversion:
    width, layers = fields["n_embd"], fields["n_layer"]
    fields.expect("afn", "gelu", "gelu")  # which in this family's code is the tanh approximation
    config = LanguageModelConfig(
        layers,
        width,
        fields["vocab_size"],
        fields["n_positions"],
        AttentionConfig(fields["n_head"]),
        MLPConfig(4 * width, "gelu_tanh"),
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        norm_placement="after",
        tie_embeddings=fields.get("tie_word_embeddings", True),
    )
    conversion = Conversion("gpt1", config, prefix="transformer.", ignored=(".attn.bias",))
    conversion["embed.W_E"] = "transformer.tokens_embed.weight"
    conversion["pos_embed.W_pos"] = "transformer.positions_embed.weight"
    conversion["unembed.weight"] = "lm_head.weight"
    for layer in range(layers):
        own, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        conversion.norm(f"{own}.ln1", f"{theirs}.ln_1")
        conversion.norm(f"{own}.ln2", f"{theirs}.ln_2")
        conv1d_attention(conversion, f"{own}.attn", f"{theirs}.attn", width)
        conversion.linear(f"{own}.mlp.inward", f"{theirs}.mlp.c_fc", transposed=True)
        conversion.linear(f"{own}.mlp.outward", f"{theirs}.mlp.c_proj", transposed=True)
    return conversion
