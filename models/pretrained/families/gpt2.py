"""GPT-2 (Radford et al. 2019). Its maps are stored as [in, out], queries, keys and values side by side."""

from models.attention.site import AttentionConfig
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.pretrained.family import Conversion, Fields, register_family
from models.pretrained.stored import stored


@register_family("gpt2")
def gpt2(fields: Fields) -> Conversion:
    fields.expect("scale_attn_weights", True, True)
    fields.expect("scale_attn_by_inverse_layer_idx", False, False)
    width, layers = fields["n_embd"], fields["n_layer"]
    config = LanguageModelConfig(
        layers,
        width,
        fields["vocab_size"],
        fields["n_positions"],
        AttentionConfig(fields["n_head"]),
        MLPConfig(fields.get("n_inner", 4 * width), fields.activation("activation_function", "gelu_new")),
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=fields.get("tie_word_embeddings", True),
    )
    conversion = Conversion("gpt2", config, prefix="transformer.", ignored=(".attn.bias", ".attn.masked_bias"))
    conversion["embed.W_E"] = "transformer.wte.weight"
    conversion["pos_embed.W_pos"] = "transformer.wpe.weight"
    conversion["unembed.weight"] = "lm_head.weight"
    conversion.norm("ln_final", "transformer.ln_f")
    for layer in range(layers):
        own, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        conversion.norm(f"{own}.ln1", f"{theirs}.ln_1")
        conversion.norm(f"{own}.ln2", f"{theirs}.ln_2")
        conv1d_attention(conversion, f"{own}.attn", f"{theirs}.attn", width)
        conversion.linear(f"{own}.mlp.inward", f"{theirs}.mlp.c_fc", transposed=True)
        conversion.linear(f"{own}.mlp.outward", f"{theirs}.mlp.c_proj", transposed=True)
    return conversion


def conv1d_attention(conversion: Conversion, own: str, theirs: str, width: int) -> None:
    """Queries, keys and values as columns of one map, and the output map."""
    for part, name in enumerate(("query", "key", "value")):
        start, stop = part * width, (part + 1) * width
        weight, bias = stored(f"{theirs}.c_attn.weight"), stored(f"{theirs}.c_attn.bias")
        conversion[f"{own}.{name}.weight"] = weight.columns(start, stop).transposed
        conversion[f"{own}.{name}.bias"] = bias.rows(start, stop)
    conversion.linear(f"{own}.output", f"{theirs}.c_proj", transposed=True)
