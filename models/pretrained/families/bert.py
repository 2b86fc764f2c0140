"""BERT, RoBERTa and DistilBERT, without the heads of their pretraining tasks."""

from models.attention.site import AttentionConfig
from models.encoder import EncoderConfig
from models.parts.channel_mixers import MLPConfig
from models.pretrained.family import Conversion, Fields, register_family
from models.pretrained.stored import stored

HEADS = ("cls.", "lm_head.", "qa_outputs.", "classifier.", "vocab_transform.", "vocab_layer_norm.", "vocab_projector.")


@register_family("bert", "roberta")
def bert(fields: Fields) -> Conversion:
    fields.expect("position_embedding_type", "absolute", "absolute")
    fields.expect("is_decoder", False, False)
    # RoBERTa counts positions from behind its padding token's number
    first = fields.get("pad_token_id", 1) + 1 if fields.model_type == "roberta" else 0
    positions = fields["max_position_embeddings"] - first
    prefix = f"{fields.model_type}."
    pooler = "pooler.dense.weight" in fields.names or f"{prefix}pooler.dense.weight" in fields.names
    config = EncoderConfig(
        fields["num_hidden_layers"],
        fields["hidden_size"],
        fields["vocab_size"],
        positions,
        AttentionConfig(fields["num_attention_heads"], causal=False),
        MLPConfig(fields["intermediate_size"], fields.activation("hidden_act", "gelu")),
        norm_eps=fields.get("layer_norm_eps", 1e-12),
        norm_placement="after",
        embed_norm=True,
        token_types=fields.get("type_vocab_size", 2),
        pooler=pooler,
    )
    conversion = Conversion("bert", config, prefix, HEADS)
    conversion["embed.W_E"] = "embeddings.word_embeddings.weight"
    table = stored("embeddings.position_embeddings.weight")
    conversion["pos_embed.W_pos"] = table.rows(first, first + positions) if first else table
    conversion["W_types"] = "embeddings.token_type_embeddings.weight"
    conversion.norm("ln_embed", "embeddings.LayerNorm")
    conversion.linear("pool", "pooler.dense")
    for layer in range(config.n_layers):
        own, theirs = f"blocks.{layer}", f"encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            conversion.linear(f"{own}.attn.{part}", f"{theirs}.attention.self.{part}")
        conversion.linear(f"{own}.attn.output", f"{theirs}.attention.output.dense")
        conversion.norm(f"{own}.ln1", f"{theirs}.attention.output.LayerNorm")
        conversion.linear(f"{own}.mlp.inward", f"{theirs}.intermediate.dense")
        conversion.linear(f"{own}.mlp.outward", f"{theirs}.output.dense")
        conversion.norm(f"{own}.ln2", f"{theirs}.output.LayerNorm")
    return conversion


@register_family("distilbert")
def distilbert(fields: Fields) -> Conversion:
    config = EncoderConfig(
        fields["n_layers"],
        fields["dim"],
        fields["vocab_size"],
        fields["max_position_embeddings"],
        AttentionConfig(fields["n_heads"], causal=False),
        MLPConfig(fields["hidden_dim"], fields.activation("activation", "gelu")),
        norm_eps=1e-12,
        norm_placement="after",
        embed_norm=True,
        token_types=0,
    )
    conversion = Conversion("bert", config, "distilbert.", HEADS)
    conversion["embed.W_E"] = "embeddings.word_embeddings.weight"
    conversion["pos_embed.W_pos"] = "embeddings.position_embeddings.weight"
    conversion.norm("ln_embed", "embeddings.LayerNorm")
    for layer in range(config.n_layers):
        own, theirs = f"blocks.{layer}", f"transformer.layer.{layer}"
        for part, name in (("query", "q_lin"), ("key", "k_lin"), ("value", "v_lin"), ("output", "out_lin")):
            conversion.linear(f"{own}.attn.{part}", f"{theirs}.attention.{name}")
        conversion.norm(f"{own}.ln1", f"{theirs}.sa_layer_norm")
        conversion.linear(f"{own}.mlp.inward", f"{theirs}.ffn.lin1")
        conversion.linear(f"{own}.mlp.outward", f"{theirs}.ffn.lin2")
        conversion.norm(f"{own}.ln2", f"{theirs}.output_layer_norm")
    return conversion
