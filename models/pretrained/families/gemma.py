"""Gemma (2024) and Gemma 2: Llama's names; norms store their weight minus 1; the embedding is multiplied by √d_model."""

from models.attention.site import AttentionConfig
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.pretrained.families.llama import layerwise, llama_names
from models.pretrained.family import Conversion, Fields, register_family
from models.pretrained.rope import rope


@register_family("gemma", "gemma2")
def gemma(fields: Fields) -> Conversion:
    fields.expect("use_bidirectional_attention", False, False)
    second = fields.model_type == "gemma2"
    layers, width, heads = fields["num_hidden_layers"], fields["hidden_size"], fields["num_attention_heads"]
    alternating = ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(layers)]
    kinds = fields.get("layer_types", alternating) if second else ["full_attention"] * layers
    activation = fields.get("hidden_activation", None) or fields.get("hidden_act", "gelu_pytorch_tanh")
    config = LanguageModelConfig(
        layers,
        width,
        fields["vocab_size"],
        None,
        layerwise(
            [
                AttentionConfig(
                    heads,
                    fields.get("num_key_value_heads", heads),
                    fields.get("head_dim", 256),
                    position=rope(fields),
                    bias=fields.get("attention_bias", False),
                    scale=fields.get("query_pre_attn_scalar", 256) ** -0.5 if second else None,
                    softcap=fields.record.get("attn_logit_softcapping") if second else None,
                    window=fields["sliding_window"] if kind == "sliding_attention" else None,
                )
                for kind in kinds
            ]
        ),
        MLPConfig(
            fields["intermediate_size"], Fields({**fields.record, "act": activation}).activation("act", ""), True, False
        ),
        norm="rms",
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        norm_placement="both" if second else "before",
        embed_scale=width**0.5,
        logit_softcap=fields.record.get("final_logit_softcapping") if second else None,
        tie_embeddings=fields.get("tie_word_embeddings", True),
    )
    conversion = Conversion("gemma2" if second else "llama", config, prefix="model.")
    llama_names(conversion, layers, norm_plus=1.0)
    if second:
        for layer in range(layers):
            own, theirs = f"blocks.{layer}", f"model.layers.{layer}"
            conversion.norm(f"{own}.ln1_post", f"{theirs}.post_attention_layernorm", 1.0)
            conversion.norm(f"{own}.ln2", f"{theirs}.pre_feedforward_layernorm", 1.0)
            conversion.norm(f"{own}.ln2_post", f"{theirs}.post_feedforward_layernorm", 1.0)
    return conversion
