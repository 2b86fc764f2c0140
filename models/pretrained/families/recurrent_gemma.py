"""RecurrentGemma: Griffin's layers with Gemma's embedding scale, norms (stored minus 1) and a cap on the logits."""

import torch

from models.attention.site import AttentionConfig
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.pretrained.families.llama import gated_mlp_names
from models.pretrained.family import Conversion, Fields, UnsupportedCheckpoint, register_family
from models.pretrained.rope import rope
from models.pretrained.stored import stored
from models.recurrent.rg_lru import RGLRUConfig


@register_family("recurrent_gemma")
def recurrent_gemma(fields: Fields) -> Conversion:
    layers, width, heads = fields["num_hidden_layers"], fields["hidden_size"], fields["num_attention_heads"]
    kinds = fields.get("block_types", ("recurrent", "recurrent", "attention"))
    unknown = sorted(set(kinds) - {"recurrent", "attention"})
    if unknown:
        raise UnsupportedCheckpoint(
            f"config.json: block_types holds {unknown[0]!r}. Expected 'recurrent' and 'attention' only."
        )
    fields.expect("embeddings_scale_by_sqrt_dim", True, True)
    activation = fields.activation("hidden_activation", "gelu_pytorch_tanh")
    biased = ("query", "key", "value") if fields.get("attention_bias", False) else ()
    mixers = {
        "recurrent": RGLRUConfig(heads, fields.get("lru_width", width), fields.get("conv1d_width", 4), activation),
        "attention": AttentionConfig(
            heads,
            fields.get("num_key_value_heads", heads),
            width // heads,
            position=rope(fields, fraction=0.5),
            bias=(*biased, "output"),
            window=fields.get("attention_window_size", 2048),
        ),
    }
    config = LanguageModelConfig(
        layers,
        width,
        fields["vocab_size"],
        None,
        tuple(mixers[kind] for kind in kinds),
        MLPConfig(fields["intermediate_size"] // 2, activation, gated=True, gate_bias=True),
        norm="rms",
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        # the published code keeps √d_model in bfloat16, whatever the model runs in
        embed_scale=float(torch.tensor(width**0.5, dtype=torch.bfloat16)),
        logit_softcap=fields.get("logits_soft_cap", 30.0),
        tie_embeddings=fields.get("tie_word_embeddings", True),
    )
    conversion = Conversion("griffin", config, prefix="model.")
    conversion["embed.W_E"] = "model.embed_tokens.weight"
    conversion["unembed.weight"] = "lm_head.weight"
    conversion.norm("ln_final", "model.final_norm", 1.0)
    for layer in range(layers):
        own, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        conversion.norm(f"{own}.ln1", f"{theirs}.temporal_pre_norm", 1.0)
        conversion.norm(f"{own}.ln2", f"{theirs}.channel_pre_norm", 1.0)
        gated_mlp_names(conversion, f"{own}.mlp", f"{theirs}.mlp_block")
        mixer, block = f"{own}.mixer", f"{theirs}.temporal_block"
        for part, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "o_proj")):
            conversion.linear(f"{own}.attn.{part}", f"{block}.{name}")
        for part, name in (("input", "linear_x"), ("gate", "linear_y"), ("output", "linear_out")):
            conversion.linear(f"{mixer}.{part}", f"{block}.{name}")
        conversion[f"{mixer}.conv"] = stored(f"{block}.conv_1d.weight").then(lambda x: x[:, 0])
        conversion[f"{mixer}.conv_bias"] = f"{block}.conv_1d.bias"
        conversion[f"{mixer}.decay"] = f"{block}.rg_lru.recurrent_param"
        for part, name in (("recurrence", "recurrent"), ("input", "input")):
            conversion[f"{mixer}.{part}_gate"] = f"{block}.rg_lru.{name}_gate_weight"
            conversion[f"{mixer}.{part}_bias"] = stored(f"{block}.rg_lru.{name}_gate_bias").then(lambda x: x.flatten())
    return conversion
