"""T5 in all its versions (T5, T5 1.1, Flan-T5, mT5, UMT5; also the encoder alone), heads other than the language model's left out.

T5 multiplies what it unembeds by d_model^−½ where the head is the embedding (1.1 and mT5: never); here the last norm's weight holds that
factor. For UMT5, transformers 5 does so whatever `tie_word_embeddings` says, older versions and this file only if it is not false.
"""

from models.architectures.t5 import T5Sizes, t5_config, t5_encoder_config
from models.attention.t5 import T5BiasConfig
from models.parts.channel_mixers import MLPConfig
from models.pretrained.family import Conversion, Fields, UnsupportedCheckpoint, register_family
from models.pretrained.stored import stored

# copies of the shared embedding, and a table that no version reads
COPIES = ("embed_tokens.weight", "EncDecAttention.relative_attention_bias.weight")


@register_family("t5", "mt5", "umt5")
def t5(fields: Fields) -> Conversion:
    fields.expect("is_decoder", False, False)
    layers, shared = fields["num_layers"], fields.model_type != "umt5"
    bias = T5BiasConfig(
        fields.get("relative_attention_num_buckets", 32), fields.get("relative_attention_max_distance", 128), shared
    )
    sizes = T5Sizes(
        fields["d_model"],
        fields["vocab_size"],
        fields["num_heads"],
        fields["d_kv"],
        channel_mixer(fields),
        bias,
        fields.get("layer_norm_epsilon", 1e-6),
    )
    if alone(fields):
        conversion = Conversion("t5-encoder", t5_encoder_config(layers, sizes), ignored=COPIES)
        stack(conversion, "encoder", layers, shared, "")
    else:
        decoder_layers, untied = fields.get("num_decoder_layers", layers), "lm_head.weight" in fields.names
        start = fields.get("decoder_start_token_id", fields.get("pad_token_id", 0))
        config = t5_config(layers, decoder_layers, sizes, tie_embeddings=not untied, start=start)
        conversion = Conversion("t5", config, ignored=COPIES)
        stack(conversion, "encoder", layers, shared, "encoder.")
        stack(conversion, "decoder", decoder_layers, shared, "")
        conversion["unembed.weight"] = "lm_head.weight"
        # T5 by newer versions says it by name; others by whether the head is said to be the embedding
        scaled = fields.get("scale_decoder_outputs", fields.record.get("tie_word_embeddings") is not False)
        factor = sizes.d_model**-0.5 if scaled and fields.model_type != "mt5" else 1.0
        conversion["ln_final.w"] = stored("decoder.final_layer_norm.weight").then(lambda w: w * factor)
    conversion["embed.W_E"] = "shared.weight"
    return conversion


def alone(fields: Fields) -> bool:
    """Whether a checkpoint is the encoder alone: by its tensors, or, before they are known, by the class that wrote it."""
    if fields.names:
        return not any(name.startswith("decoder.") for name in fields.names)
    return any("EncoderModel" in name for name in fields.get("architectures", []))


def channel_mixer(fields: Fields) -> MLPConfig:
    """What `feed_forward_proj` says: an activation, or `gated-` and an activation. `gated-gelu` means the approximation by tanh."""
    given = fields.get("feed_forward_proj", "relu" if fields.model_type == "t5" else "gated-gelu")
    gate, _, name = given.rpartition("-")
    if gate not in ("", "gated"):
        raise UnsupportedCheckpoint(
            f"config.json: feed_forward_proj = {given!r} is not supported. Expected an activation, or 'gated-' and one."
        )
    named = Fields({**fields.record, "feed_forward_proj": "gelu_new" if given == "gated-gelu" else name})
    return MLPConfig(fields["d_ff"], named.activation("feed_forward_proj", "relu"), gated=bool(gate), bias=False)


def stack(conversion: Conversion, name: str, layers: int, shared: bool, prefix: str) -> None:
    """The weights of `encoder` or `decoder`, of which a layer is one block or two. prefix: of our names."""
    blocks = 2 if name == "decoder" else 1
    gated = conversion.config.mlps[-1].gated
    for layer in range(layers):
        theirs = f"{name}.block.{layer}.layer"
        first, last = (f"{prefix}blocks.{blocks * layer + number}" for number in (0, blocks - 1))
        site(conversion, first, f"{theirs}.0.SelfAttention", f"{theirs}.0.layer_norm")
        if layer == 0 or not shared:
            conversion[f"{first}.attn.bias.t5.table"] = f"{theirs}.0.SelfAttention.relative_attention_bias.weight"
        if first != last:
            site(conversion, last, f"{theirs}.1.EncDecAttention", f"{theirs}.1.layer_norm")
        dense = f"{theirs}.{blocks}.DenseReluDense"
        conversion.linear(f"{last}.mlp.inward", f"{dense}.wi_1" if gated else f"{dense}.wi")
        conversion.linear(f"{last}.mlp.gate", f"{dense}.wi_0")
        conversion.linear(f"{last}.mlp.outward", f"{dense}.wo")
        conversion.norm(f"{last}.ln2", f"{theirs}.{blocks}.layer_norm")
    conversion.norm(f"{prefix}ln_final", f"{name}.final_layer_norm")


def site(conversion: Conversion, own: str, theirs: str, norm: str) -> None:
    """An attention site and the norm before it."""
    for part, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
        conversion.linear(f"{own}.attn.{part}", f"{theirs}.{letter}")
    conversion.norm(f"{own}.ln1", norm)
