"""HRM-Text: a fast and a slow stack of blocks whose norms have no weights, each attention with a gate on its output.

A prefix that reads itself in both directions (`token_type_ids` = 1 there) is `facts={"prefix_length": n}` here.
"""

import torch

from models.attention.gates import OutputGateConfig
from models.attention.masks import PrefixConfig
from models.attention.site import AttentionConfig
from models.depth.hierarchical_text import HierarchicalTextConfig
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.pretrained.family import Conversion, Fields, register_family
from models.pretrained.rope import rope
from models.pretrained.stored import Stored, stored


@register_family("hrm_text")
def hrm_text(fields: Fields) -> Conversion:
    fields.expect("attention_bias", False, False)
    fields.expect("mlp_bias", False, False)
    # newer files count every run of a layer in num_hidden_layers
    each = fields.get("num_layers_per_stack", None) or fields["num_hidden_layers"]
    width, d_head, d_mlp = fields["hidden_size"], fields.get("head_dim", 128), fields["intermediate_size"]
    heads = fields["num_attention_heads"] * d_head
    config = LanguageModelConfig(
        2 * each,
        width,
        fields["vocab_size"],
        None,
        AttentionConfig(
            fields["num_attention_heads"],
            d_head=d_head,
            position=rope(fields),
            bias=False,
            mask=PrefixConfig(optional=True) if fields.get("prefix_lm", True) else None,
            post=OutputGateConfig(),
        ),
        MLPConfig(d_mlp, fields.activation("hidden_act", "silu"), gated=True, bias=False),
        norm="rms",
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        embed_scale=fields.get("embedding_scale", 1 / fields.get("initializer_range", 0.02)),
        tie_embeddings=fields.get("tie_word_embeddings", False),
        wiring=HierarchicalTextConfig(each, fields.get("H_cycles", 2), fields.get("L_cycles", 3)),
    )
    conversion = Conversion("hrm-text", config, prefix="model.")
    ones = Stored((), lambda: torch.ones(width))
    conversion["embed.W_E"], conversion["unembed.weight"] = "model.embed_tokens.weight", "lm_head.weight"
    conversion["ln_final.w"] = ones
    if any(name.endswith("z_L_init") for name in fields.names):
        conversion["wiring.start_low"] = "model.z_L_init"
    for layer in range(2 * each):
        own, theirs = f"blocks.{layer}", f"model.{'LH'[layer // each]}_module.layers.{layer % each}"
        packed = stored(f"{theirs}.attn.gqkv_proj.weight")
        for number, part in enumerate(("post.output_gate.gate", "query", "key", "value")):
            conversion[f"{own}.attn.{part}.weight"] = packed.rows(number * heads, (number + 1) * heads)
        conversion.linear(f"{own}.attn.output", f"{theirs}.attn.o_proj")
        packed = stored(f"{theirs}.mlp.gate_up_proj.weight")
        for number, part in enumerate(("gate", "inward")):
            conversion[f"{own}.mlp.{part}.weight"] = packed.rows(number * d_mlp, (number + 1) * d_mlp)
        conversion.linear(f"{own}.mlp.outward", f"{theirs}.mlp.down_proj")
        conversion[f"{own}.ln1.w"] = conversion[f"{own}.ln2.w"] = ones
    return conversion
