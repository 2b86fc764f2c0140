"""BERT, RoBERTa, their relatives and DistilBERT, with the head that predicts masked tokens where it is stored.

Other heads (next sentence, classes, spans) are left out; a pooler is taken where it is stored.
"""

from dataclasses import dataclass

from models.attention.site import AttentionConfig
from models.encoder import EncoderConfig
from models.parts.channel_mixers import MLPConfig
from models.pretrained.family import Conversion, Fields, register_family
from models.pretrained.stored import stored

OTHER_HEADS = (
    "cls.",
    "lm_head.",
    "qa_outputs.",
    "classifier.",
    "vocab_transform.",
    "vocab_layer_norm.",
    "vocab_projector.",
)


@dataclass(frozen=True)
class MaskedHead:
    """Where a family stores the parts of its head for masked tokens.

    decoder: weight and bias of the unembedding, of heads that share neither. bias: of those that share the embedding's rows.
    """

    dense: str
    norm: str
    decoder: str
    bias: str

    def stored_in(self, fields: Fields) -> bool:
        """Whether a checkpoint has this head."""
        return f"{self.dense}.weight" in fields.names

    def convert(self, conversion: Conversion) -> None:
        """Say what our head is made of."""
        conversion.linear("mlm_head.dense", self.dense)
        conversion.norm("mlm_head.ln", self.norm)
        conversion["unembed.weight"] = f"{self.decoder}.weight"
        conversion["unembed.b_U"] = self.bias if conversion.config.tie_embeddings else f"{self.decoder}.bias"


BERT_HEAD = MaskedHead(
    "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.decoder", "cls.predictions.bias"
)  # fmt: skip
ROBERTA_HEAD = MaskedHead("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder", "lm_head.bias")
DISTILBERT_HEAD = MaskedHead("vocab_transform", "vocab_layer_norm", "vocab_projector", "vocab_projector.bias")


@register_family("bert", "roberta", "xlm-roberta", "camembert")
def bert(fields: Fields) -> Conversion:
    fields.expect("position_embedding_type", "absolute", "absolute")
    fields.expect("is_decoder", False, False)
    like_roberta = fields.model_type != "bert"
    # RoBERTa counts positions from behind its padding token's number
    first = fields.get("pad_token_id", 1) + 1 if like_roberta else 0
    positions = fields["max_position_embeddings"] - first
    prefix, head = ("roberta.", ROBERTA_HEAD) if like_roberta else ("bert.", BERT_HEAD)
    activation = fields.activation("hidden_act", "gelu")
    pooler = "pooler.dense.weight" in fields.names or f"{prefix}pooler.dense.weight" in fields.names
    config = EncoderConfig(
        fields["num_hidden_layers"],
        fields["hidden_size"],
        fields["vocab_size"],
        positions,
        AttentionConfig(fields["num_attention_heads"], causal=False),
        MLPConfig(fields["intermediate_size"], activation),
        norm_eps=fields.get("layer_norm_eps", 1e-12),
        norm_placement="after",
        embed_norm=True,
        token_types=fields.get("type_vocab_size", 2),
        pooler=pooler,
        # RoBERTa's head has a GELU whatever the layers have
        masked_head=("gelu" if like_roberta else activation) if head.stored_in(fields) else None,
        tie_embeddings=fields.get("tie_word_embeddings", True),
    )
    conversion = Conversion("bert", config, prefix, OTHER_HEADS)
    head.convert(conversion)
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
    activation = fields.activation("activation", "gelu")
    config = EncoderConfig(
        fields["n_layers"],
        fields["dim"],
        fields["vocab_size"],
        fields["max_position_embeddings"],
        AttentionConfig(fields["n_heads"], causal=False),
        MLPConfig(fields["hidden_dim"], activation),
        norm_eps=1e-12,
        norm_placement="after",
        embed_norm=True,
        token_types=0,
        masked_head=activation if DISTILBERT_HEAD.stored_in(fields) else None,
        tie_embeddings=fields.get("tie_word_embeddings", True),
    )
    conversion = Conversion("bert", config, "distilbert.", OTHER_HEADS)
    DISTILBERT_HEAD.convert(conversion)
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
