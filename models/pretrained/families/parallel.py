"""Attention and MLP side by side, rotary positions: GPT-J, GPT-NeoX and Pythia, Phi 1 and 2, Falcon.

Where one norm serves both, its weights stand in both of ours.
"""

from collections.abc import Mapping
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


def name_blocks(conversion: Conversion, at: str, norms: tuple[str, str], maps: Mapping[str, str]) -> None:
    """Norms and linear maps of all blocks, stored below `at.<layer>`. norms: their names of both; maps: ours to theirs."""
    for layer in range(conversion.config.n_layers):
        own, theirs = f"blocks.{layer}", f"{at}.{layer}"
        for ours, name in zip(("ln1", "ln2"), norms, strict=True):
            conversion.norm(f"{own}.{ours}", f"{theirs}.{name}")
        for ours, name in maps.items():
            conversion.linear(f"{own}.{ours}", f"{theirs}.{name}")


def split_joined(conversion: Conversion, at: str, name: str, groups: int, shares: tuple[int, int, int]) -> None:
    """Queries, keys and values of all blocks from one stored map of `groups` times so many heads of each."""
    config = conversion.config
    for layer in range(config.n_layers):
        maps = tuple(f"blocks.{layer}.attn.{part}" for part in QKV)
        conversion.grouped(maps, f"{at}.{layer}.{name}", groups, shares, config.d_model // config.mixer.n_heads)


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
    maps = {
        "attn.query": "attn.q_proj",
        "attn.key": "attn.k_proj",
        "attn.value": "attn.v_proj",
        "attn.output": "attn.out_proj",
    }
    maps |= {"mlp.inward": "mlp.fc_in", "mlp.outward": "mlp.fc_out"}
    name_blocks(conversion, "transformer.h", ("ln_1", "ln_1"), maps)
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
    maps = {"attn.output": "attention.dense", "mlp.inward": "mlp.dense_h_to_4h", "mlp.outward": "mlp.dense_4h_to_h"}
    name_blocks(conversion, "gpt_neox.layers", ("input_layernorm", "post_attention_layernorm"), maps)
    split_joined(conversion, "gpt_neox.layers", "attention.query_key_value", heads, (1, 1, 1))
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
    maps = {f"attn.{part}": f"self_attn.{part[0]}_proj" for part in QKV}
    maps |= {"attn.output": "self_attn.dense", "mlp.inward": "mlp.fc1", "mlp.outward": "mlp.fc2"}
    name_blocks(conversion, "model.layers", ("input_layernorm", "input_layernorm"), maps)
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
    before = ("ln_attn", "ln_mlp") if beside and norms == 2 else ("input_layernorm", "input_layernorm")
    both = before if beside else (before[0], "post_attention_layernorm")
    maps = {
        "attn.output": "self_attention.dense",
        "mlp.inward": "mlp.dense_h_to_4h",
        "mlp.outward": "mlp.dense_4h_to_h",
    }
    name_blocks(conversion, "transformer.h", both, maps)
    split_joined(conversion, "transformer.h", "self_attention.query_key_value", groups, (heads // groups, 1, 1))
    return conversion
