"""BLOOM (Le Scao et al. 2022): a norm behind the embedding, linear distance biases. Its biases differ from ours by a number per row."""

from models.attention.site import AttentionConfig
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.pretrained.family import Conversion, Fields, register_family


@register_family("bloom")
def bloom(fields: Fields) -> Conversion:
    fields.expect("apply_residual_connection_post_layernorm", False, False)
    width = fields.get("hidden_size", fields.get("n_embed", None)) or fields["hidden_size"]
    layers, heads = fields["n_layer"], fields["n_head"]
    config = LanguageModelConfig(
        layers,
        width,
        fields["vocab_size"],
        None,
        AttentionConfig(heads, position="alibi"),
        MLPConfig(4 * width, "gelu_bloom"),
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        embed_norm=True,
        tie_embeddings=fields.get("tie_word_embeddings", True),
    )
    conversion = Conversion("bloom", config, prefix="transformer.")
    conversion["embed.W_E"] = "transformer.word_embeddings.weight"
    conversion["unembed.weight"] = "lm_head.weight"
    conversion.norm("ln_embed", "transformer.word_embeddings_layernorm")
    conversion.norm("ln_final", "transformer.ln_f")
    for layer in range(layers):
        own, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        conversion.norm(f"{own}.ln1", f"{theirs}.input_layernorm")
        conversion.norm(f"{own}.ln2", f"{theirs}.post_attention_layernorm")
        maps = tuple(f"{own}.attn.{name}" for name in ("query", "key", "value"))
        conversion.grouped(maps, f"{theirs}.self_attention.query_key_value", heads, (1, 1, 1), width // heads)
        conversion.linear(f"{own}.attn.output", f"{theirs}.self_attention.dense")
        conversion.linear(f"{own}.mlp.inward", f"{theirs}.mlp.dense_h_to_4h")
        conversion.linear(f"{own}.mlp.outward", f"{theirs}.mlp.dense_4h_to_h")
    return conversion
