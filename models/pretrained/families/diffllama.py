"""DiffLlama: Llama with differential attention (Ye et al. 2024). Maps h and h + heads make a head, with both halves of its values."""

from dataclasses import replace

from torch import Tensor

from models.attention.differential import DifferentialConfig, DifferentialNormConfig
from models.attention.site import AttentionConfig
from models.pretrained.families.llama import llama
from models.pretrained.family import Conversion, Fields, register_family
from models.pretrained.rope import rope
from models.pretrained.stored import stored


@register_family("diffllama")
def diffllama(fields: Fields) -> Conversion:
    conversion = llama(fields)
    maps = fields["num_attention_heads"]
    key_maps, width = fields.get("num_key_value_heads", maps), fields.get("head_dim", fields["hidden_size"] // maps)
    mixer = AttentionConfig(
        maps // 2,
        key_maps // 2,
        width,
        position=rope(fields),
        bias=fields.get("attention_bias", False),
        reweight=DifferentialConfig("halves"),
        post=DifferentialNormConfig(fields.get("rms_norm_eps", 1e-5), affine=False),
    )
    conversion.config = replace(conversion.config, mixer=mixer, norm_eps=fields.get("rms_norm_eps", 1e-5))
    conversion.architecture = "diff-transformer"

    def side_by_side(x: Tensor) -> Tensor:
        return x.reshape(2, key_maps // 2, width, *x.shape[1:]).transpose(0, 1).flatten(0, 2)

    for layer in range(conversion.config.n_layers):
        own, theirs = f"blocks.{layer}.attn", f"model.layers.{layer}.self_attn"
        for kind in ("weight", "bias"):
            conversion[f"{own}.value.{kind}"] = stored(f"{theirs}.v_proj.{kind}").then(side_by_side)
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            conversion[f"{own}.reweight.differential.{name}"] = f"{theirs}.{name}"
    return conversion
