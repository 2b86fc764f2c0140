"""Qwen3-Next: layers of Gated DeltaNet and of gated softmax attention, each followed by a mixture of experts or an MLP.

Maps are packed key head by key head (delta rule) and query head by query head (attention: query, then gate). Norms store their weight
minus 1, but for the one inside the delta rule.
"""

from itertools import pairwise

import torch
from torch import Tensor

from models.attention.gates import OutputGateConfig
from models.attention.rotary import QKNormConfig
from models.attention.site import AttentionConfig
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.parts.experts import SparseMLPConfig
from models.pretrained.families.llama import GATED_MLP, gated_mlp_names, llama_names
from models.pretrained.family import Conversion, Fields, UnsupportedCheckpoint, register_family
from models.pretrained.rope import rope
from models.pretrained.stored import Stored, stored
from models.recurrent.delta import DeltaConfig


@register_family("qwen3_next")
def qwen3_next(fields: Fields) -> Conversion:
    fields.expect("attention_bias", False, False)
    fields.expect("hidden_act", "silu", "silu")
    layers, eps = fields["num_hidden_layers"], fields.get("rms_norm_eps", 1e-6)
    heads, width = fields["num_attention_heads"], fields.get("head_dim", 256)
    attention = AttentionConfig(
        heads,
        fields.get("num_key_value_heads", 2),
        width,
        position=rope(fields, fraction=0.25),
        bias=False,
        qk_norm=QKNormConfig(eps=eps),
        post=OutputGateConfig(),
    )
    delta = DeltaConfig(
        fields.get("linear_num_value_heads", 32),
        fields.get("linear_key_head_dim", 128),
        fields.get("linear_value_head_dim", 128),
        fields.get("linear_num_key_heads", 16),
        "scalar",
        "silu",
        d_conv=fields.get("linear_conv_kernel_dim", 4),
        norm_eps=eps,
    )
    kinds = layer_kinds(fields, layers)
    config = LanguageModelConfig(
        layers,
        fields["hidden_size"],
        fields["vocab_size"],
        None,
        tuple(delta if kind == "linear_attention" else attention for kind in kinds),
        channel_mixers(fields, layers),
        norm="rms",
        norm_eps=eps,
        tie_embeddings=fields.get("tie_word_embeddings", False),
    )
    conversion = Conversion("qwen3-next", config, prefix="model.", ignored=("mtp.",))
    llama_names(conversion, layers, norm_plus=1.0)
    for layer in range(layers):
        own, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        packed, parts = f"{theirs}.self_attn.q_proj", (f"{own}.attn.query", f"{own}.attn.post.output_gate.gate")
        conversion.grouped(parts, packed, groups=heads, shares=(1, 1), width=width)
        delta_names(conversion, f"{own}.mixer", f"{theirs}.linear_attn", delta)
        expert_names(conversion, fields, f"{own}.mlp", f"{theirs}.mlp")
    return conversion


def layer_kinds(fields: Fields, layers: int) -> list[str]:
    """The mixer of each layer: listed, or every `full_attention_interval`-th is attention."""
    every = fields.get("full_attention_interval", 4)
    usual = ["full_attention" if (layer + 1) % every == 0 else "linear_attention" for layer in range(layers)]
    kinds = list(fields.get("layer_types", usual))
    unknown = sorted(set(kinds) - {"full_attention", "linear_attention"})
    if unknown or len(kinds) != layers:
        raise UnsupportedCheckpoint(
            f"config.json: layer_types lists {len(kinds)} layers of the kinds {', '.join(sorted(set(kinds)))}. Expected {layers} of "
            "linear_attention and full_attention."
        )
    return kinds


def channel_mixers(fields: Fields, layers: int) -> tuple[MLPConfig | SparseMLPConfig, ...]:
    """What follows the mixer in each layer."""
    dense = MLPConfig(fields.get("intermediate_size", 5632), "silu", gated=True, bias=False)
    experts, step, plain = (
        fields.get("num_experts", 512),
        fields.get("decoder_sparse_step", 1),
        fields.get("mlp_only_layers", []),
    )
    if not experts:
        return (dense,) * layers
    sparse = SparseMLPConfig(
        fields.get("moe_intermediate_size", 512),
        experts,
        fields.get("num_experts_per_tok", 10),
        normalise=fields.get("norm_topk_prob", True),
        d_shared=fields.get("shared_expert_intermediate_size", 512),
    )
    return tuple(dense if layer in plain or (layer + 1) % step else sparse for layer in range(layers))


def delta_names(conversion: Conversion, own: str, theirs: str, delta: DeltaConfig) -> None:
    """A layer of Gated DeltaNet; one key head after the other, its maps are packed as [query, key, values, gates], [writes, decays]."""
    groups = delta.n_key_heads or delta.n_heads
    values = delta.n_heads // groups * delta.d_value
    ends = torch.tensor([0, delta.d_key, delta.d_key, values, values]).cumsum(0).tolist()

    def rows(name: str, *spans: tuple[int, int]) -> Stored:
        """These rows of every key head; several spans one below the other."""

        def pick(x: Tensor) -> Tensor:
            heads = x.unflatten(0, (groups, -1))
            return torch.cat([heads[:, start:stop].flatten(0, 1) for start, stop in spans])

        return stored(f"{theirs}.{name}.weight").then(pick)

    spans = list(pairwise(ends))
    conversion[f"{own}.input.weight"] = rows("in_proj_qkvz", *spans[:3])
    conversion[f"{own}.gate.weight"] = rows("in_proj_qkvz", spans[3])
    share = delta.n_heads // groups
    conversion[f"{own}.write.weight"] = rows("in_proj_ba", (0, share))
    conversion[f"{own}.decay.weight"] = rows("in_proj_ba", (share, 2 * share))
    conversion[f"{own}.conv"] = stored(f"{theirs}.conv1d.weight").then(lambda x: x[:, 0])
    conversion.norm(f"{own}.norm", f"{theirs}.norm")
    conversion.linear(f"{own}.output", f"{theirs}.out_proj")
    for name in ("A_log", "dt_bias"):
        conversion[f"{own}.{name}"] = f"{theirs}.{name}"


def expert_names(conversion: Conversion, fields: Fields, own: str, theirs: str) -> None:
    """A mixture of experts, stored one by one, or all in one tensor whose rows are those of the gates, then of the maps in."""
    experts, width = fields.get("num_experts", 512), fields.get("moe_intermediate_size", 512)
    conversion.linear(f"{own}.router", f"{theirs}.gate")
    conversion.linear(f"{own}.shared_gate", f"{theirs}.shared_expert_gate")
    gated_mlp_names(conversion, f"{own}.shared", f"{theirs}.shared_expert")
    if any(name.endswith(f"{theirs.removeprefix('model.')}.experts.gate_up_proj") for name in fields.names):
        joined = stored(f"{theirs}.experts.gate_up_proj")
        conversion[f"{own}.gate"] = joined.then(lambda x: x[:, :width])
        conversion[f"{own}.inward"] = joined.then(lambda x: x[:, width:])
        conversion[f"{own}.outward"] = f"{theirs}.experts.down_proj"
        return
    for part, name in GATED_MLP:
        each = tuple(f"{theirs}.experts.{expert}.{name}.weight" for expert in range(experts))
        conversion[f"{own}.{part}"] = Stored(each, lambda *matrices: torch.stack(matrices))
