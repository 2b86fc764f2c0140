"""Attention and MLP side by side, rotary positions: GPT-J, GPT-NeoX and Pythia, Phi 1 and 2, Falcon.

Where one norm serves both, its weights stand in both of ours.
"""

from typing import Any

from models.attention.rotary import RopeConfig
from models.attention.site import AttentionConfig
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.pretrained.family import Conversion, Fields, register_family
from models.pretrained.rope import rope

QKV = ("query", "key", "value")


def parallel_model(
    fields: Fields, layers: int, width: int, attention: AttentionConfig, mlp: MLPConfig, **more: Any
) -> Conversion:
    """The conversion of such a model, with no weights yet."""
    config = LanguageModelConfig(
        layers,
        width,
        fields["vocab_size"],
        None,
        attention,
        mlp,
        **{"parallel": True, "tie_embeddings": fields.get("tie_word_embeddings", False), **more},
    )
    return Conversion("gptj", config)


@register_family("gptj")
def gptj(fields: Fields) -> Conversion:
    width, layers, heads = fields["n_embd"], fields["n_layer"], fields["n_head"]
    turned = RopeConfig(fraction=fields.get("rotary_dim", 64) * heads / width, interleaved=True)
    conversion = parallel_model(
        fields,
        layers,
        width,
        AttentionConfig(heads, position=turned, bias=False),
        MLPConfig(fields.get("n_inner", 4 * width), fields.activation("activation_function", "gelu_new")),
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        unembed_bias=True,
    )
    conversion.prefix, conversion.ignored = "transformer.", (".attn.bias", ".attn.masked_bias", ".embed_positions")
    conversion["embed.W_E"] = "transformer.wte.weight"
    conversion["unembed.weight"], conversion["unembed.b_U"] = "lm_head.weight", "lm_head.bias"
    conversion.norm("ln_final", "transformer.ln_f")
    for layer in range(layers):
        own, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        conversion.norm(f"{own}.ln1", f"{theirs}.ln_1")
        conversion.norm(f"{own}.ln2", f"{theirs}.ln_1")
        for part, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "out_proj")):
            conversion.linear(f"{own}.attn.{part}", f"{theirs}.attn.{name}")
        conversion.linear(f"{own}.mlp.inward", f"{theirs}.mlp.fc_in")
        conversion.linear(f"{own}.mlp.outward", f"{theirs}.mlp.fc_out")
    return conversion


@register_family("gpt_neox")
def gpt_neox(fields: Fields) -> Conversion:
    width, layers, heads = fields["hidden_size"], fields["num_hidden_layers"], fields["num_attention_heads"]
    conversion = parallel_model(
        fields,
        layers,
        width,
        AttentionConfig(heads, position=rope(fields, 0.25), bias=fields.get("attention_bias", True)),
        MLPConfig(fields["intermediate_size"], fields.activation("hidden_act", "gelu")),
        norm_eps=fields.get("layer_norm_eps", 1e-5),
        parallel=fields.get("use_parallel_residual", True),
    )
    conversion.prefix, conversion.ignored = "gpt_neox.", (".attention.bias", ".attention.masked_bias")
    conversion["embed.W_E"] = "gpt_neox.embed_in.weight"
    conversion["unembed.weight"] = "embed_out.weight"
    conversion.norm("ln_final", "gpt_neox.final_layer_norm")
    for layer in range(layers):
        own, theirs = f"blocks.{layer}", f"gpt_neox.layers.{layer}"
        conversion.norm(f"{own}.ln1", f"{theirs}.input_layernorm")
        conversion.norm(f"{own}.ln2", f"{theirs}.post_attention_layernorm")
        maps = tuple(f"{own}.attn.{name}" for name in QKV)
        conversion.grouped(maps, f"{theirs}.attention.query_key_value", heads, (1, 1, 1), width // heads)
        conversion.linear(f"{own}.attn.output", f"{theirs}.attention.dense")
        conversion.linear(f"{own}.mlp.inward", f"{theirs}.mlp.dense_h_to_4h")
        conversion.linear(f"{own}.mlp.outward", f"{theirs}.mlp.dense_4h_to_h")
    return conversion


@register_family("phi")
def phi(fields: Fields) -> Conversion:
    fields.expect("qk_layernorm", False, False)
    width, layers, heads = fields["hidden_size"], fields["num_hidden_layers"], fields["num_attention_heads"]
    conversion = parallel_model(
        fields,
        layers,
        width,
        AttentionConfig(heads, fields.get("num_key_value_heads", heads), position=rope(fields, 0.5)),
        MLPConfig(fields["intermediate_size"], fields.activation("hidden_act", "gelu_new")),
        norm_eps=fields.get("layer_norm_eps", 1e-5),
        unembed_bias=True,
    )
    conversion.prefix = "model."
    conversion["embed.W_E"] = "model.embed_tokens.weight"
    conversion["unembed.weight"], conversion["unembed.b_U"] = "lm_head.weight", "lm_head.bias"
    conversion.norm("ln_final", "model.final_layernorm")
    for layer in range(layers):
        own, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        conversion.norm(f"{own}.ln1", f"{theirs}.input_layernorm")
        conversion.norm(f"{own}.ln2", f"{theirs}.input_layernorm")
        for part, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "dense")):
            conversion.linear(f"{own}.attn.{part}", f"{theirs}.self_attn.{name}")
        conversion.linear(f"{own}.mlp.inward", f"{theirs}.mlp.fc1")
        conversion.linear(f"{own}.mlp.outward", f"{theirs}.mlp.fc2")
    return conversion


@register_family("falcon")
def falcon(fields: Fields) -> Conversion:
    fields.expect("alibi", False, False)  # its biases are divided by √d_head and rounded to 16 bit
    width, layers, heads = fields["hidden_size"], fields["num_hidden_layers"], fields["num_attention_heads"]
    new, beside = fields.get("new_decoder_architecture", False), fields.get("parallel_attn", True)
    groups = fields.get("num_kv_heads", heads) if new or not fields.get("multi_query", True) else 1
    norms = fields.get("num_ln_in_parallel_attn", 2 if new else 1)
    conversion = parallel_model(
        fields,
        layers,
        width,
        AttentionConfig(heads, groups, position=rope(fields), bias=fields.get("bias", False)),
        MLPConfig(
            fields.get("ffn_hidden_size", 4 * width),
            fields.activation("activation", "gelu"),
            bias=fields.get("bias", False),
        ),
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        parallel=beside,
        tie_embeddings=fields.get("tie_word_embeddings", True),
    )
    conversion.prefix = "transformer."
    conversion["embed.W_E"] = "transformer.word_embeddings.weight"
    conversion["unembed.weight"] = "lm_head.weight"
    conversion.norm("ln_final", "transformer.ln_f")
    before = ("ln_attn", "ln_mlp") if beside and norms == 2 else ("input_layernorm",) * 2
    for layer in range(layers):
        own, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        conversion.norm(f"{own}.ln1", f"{theirs}.{before[0]}")
        conversion.norm(f"{own}.ln2", f"{theirs}.{before[1] if beside else 'post_attention_layernorm'}")
        maps = tuple(f"{own}.attn.{name}" for name in QKV)
        conversion.grouped(
            maps, f"{theirs}.self_attention.query_key_value", groups, (heads // groups, 1, 1), width // heads
        )
        conversion.linear(f"{own}.attn.output", f"{theirs}.self_attention.dense")
        conversion.linear(f"{own}.mlp.inward", f"{theirs}.mlp.dense_h_to_4h")
        conversion.linear(f"{own}.mlp.outward", f"{theirs}.mlp.dense_4h_to_h")
    return conversion
