"""OPT (Zhang et al. 2022). The first two rows of its position table belong to no position."""

from models.attention.site import AttentionConfig
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.pretrained.family import Conversion, Fields, register_family
from models.pretrained.stored import stored

OFFSET = 2


@register_family("opt")
def opt(fields: Fields) -> Conversion:
    width, layers, positions = fields["hidden_size"], fields["num_hidden_layers"], fields["max_position_embeddings"]
    fields.expect("do_layer_norm_before", True, True)
    fields.expect("_remove_final_layer_norm", False, False)
    fields.expect("word_embed_proj_dim", width, width)
    fields.expect("layer_norm_elementwise_affine", True, True)
    biased = fields.get("enable_bias", True)
    config = LanguageModelConfig(
        layers,
        width,
        fields["vocab_size"],
        positions,
        AttentionConfig(fields["num_attention_heads"], bias=biased),
        MLPConfig(fields["ffn_dim"], fields.activation("activation_function", "relu"), bias=biased),
        tie_embeddings=fields.get("tie_word_embeddings", True),
    )
    conversion = Conversion("gpt2", config, prefix="model.")
    conversion["embed.W_E"] = "model.decoder.embed_tokens.weight"
    conversion["pos_embed.W_pos"] = stored("model.decoder.embed_positions.weight").rows(OFFSET, OFFSET + positions)
    conversion["unembed.weight"] = "lm_head.weight"
    conversion.norm("ln_final", "model.decoder.final_layer_norm")
    for layer in range(layers):
        own, theirs = f"blocks.{layer}", f"model.decoder.layers.{layer}"
        conversion.norm(f"{own}.ln1", f"{theirs}.self_attn_layer_norm")
        conversion.norm(f"{own}.ln2", f"{theirs}.final_layer_norm")
        for part, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "out_proj")):
            conversion.linear(f"{own}.attn.{part}", f"{theirs}.self_attn.{name}")
        conversion.linear(f"{own}.mlp.inward", f"{theirs}.fc1")
        conversion.linear(f"{own}.mlp.outward", f"{theirs}.fc2")
    return conversion
