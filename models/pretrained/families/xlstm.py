"""xLSTM-7B: mLSTM layers with soft caps on gates and logits, a norm per head, and gated MLPs. Maps are stored apart or fused in pairs."""

from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.pretrained.family import Conversion, Fields, register_family
from models.pretrained.stored import stored
from models.recurrent.mlstm import MLSTMConfig

APART = {  # maps that a `weight_mode` of "fused" stores together
    "mlp.gate": "ffn.proj_up_gate",
    "mlp.inward": "ffn.proj_up",
    "mixer.query": "mlstm_layer.q",
    "mixer.key": "mlstm_layer.k",
    "mixer.value": "mlstm_layer.v",
    "mixer.gate": "mlstm_layer.ogate_preact",
    "mixer.input_gate": "mlstm_layer.igate_preact",
    "mixer.forget_gate": "mlstm_layer.fgate_preact",
}


@register_family("xlstm")
def xlstm(fields: Fields) -> Conversion:
    fields.expect("use_bias", False, False)
    fields.expect("add_out_norm", True, True)
    fields.expect("tie_word_embeddings", False, False)
    fields.expect("weight_mode", "single", "single", "fused")
    layers = fields.get("num_hidden_layers", None) or fields["num_blocks"]
    width = fields.get("hidden_size", None) or fields["embedding_dim"]
    mixer = MLSTMConfig(
        fields["num_heads"],
        fields.get("qk_dim_factor", 0.5),
        fields.get("v_dim_factor", 1.0),
        fields.get("gate_soft_cap", 15.0),
        norm_eps=fields.get("norm_eps", 1e-6),
        eps=fields.get("eps", 1e-6),
        start=0.0,
    )
    hidden = hidden_units(fields, width)
    config = LanguageModelConfig(
        layers,
        width,
        fields["vocab_size"],
        None,
        mixer,
        MLPConfig(hidden, "silu", gated=True, bias=False),
        norm="rms",
        norm_eps=fields.get("norm_eps", 1e-6),
        logit_softcap=fields.get("output_logit_soft_cap", 30.0),
    )
    conversion = Conversion("mlstm", config, prefix="backbone.")
    conversion["embed.W_E"] = "backbone.embeddings.weight"
    conversion["unembed.weight"] = "lm_head.weight"
    conversion.norm("ln_final", "backbone.out_norm")
    keys, values = int(width * mixer.qk_factor), int(width * mixer.v_factor)
    fused: dict[str, dict[str, int]] = {
        "ffn.proj_up_gate_z": {"mlp.gate": hidden, "mlp.inward": hidden},
        "mlstm_layer.qkv_opreact": {
            "mixer.query": keys,
            "mixer.key": keys,
            "mixer.value": values,
            "mixer.gate": values,
        },
        "mlstm_layer.ifgate_preact": {"mixer.input_gate": mixer.n_heads, "mixer.forget_gate": mixer.n_heads},
    }
    for layer in range(layers):
        own, theirs = f"blocks.{layer}", f"backbone.blocks.{layer}"
        conversion.norm(f"{own}.ln1", f"{theirs}.norm_mlstm")
        conversion.norm(f"{own}.ln2", f"{theirs}.norm_ffn")
        conversion[f"{own}.mixer.norm.norm_weight"] = f"{theirs}.mlstm_layer.multihead_norm.weight"
        conversion.linear(f"{own}.mixer.output", f"{theirs}.mlstm_layer.out_proj")
        conversion.linear(f"{own}.mlp.outward", f"{theirs}.ffn.proj_down")
        if fields.get("weight_mode", "single") == "single":
            for part, name in APART.items():
                conversion.linear(f"{own}.{part}", f"{theirs}.{name}")
            continue
        for name, rows in fused.items():
            below_each_other(conversion, own, f"{theirs}.{name}", rows)
    return conversion


def below_each_other(conversion: Conversion, own: str, theirs: str, rows: dict[str, int]) -> None:
    """Maps stored one below the other: {our name: how many rows}."""
    start = 0
    for part, count in rows.items():
        for kind in ("weight", "bias"):
            conversion[f"{own}.{part}.{kind}"] = stored(f"{theirs}.{kind}").rows(start, start + count)
        start += count


def hidden_units(fields: Fields, width: int) -> int:
    """Of the MLP: a multiple of the width, rounded up."""
    step = fields.get("ffn_round_up_to_multiple_of", 64)
    return int((width * fields.get("ffn_proj_factor", 2.667) + step - 1) // step * step)
