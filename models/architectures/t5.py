"""T5 (Raffel et al. 2020): an encoder-decoder whose positions are one learned number per head and bucket of distances."""

from dataclasses import dataclass
from typing import Any

from models.architecture_record import Architecture, register_encoder
from models.attention.cross import CrossAttentionConfig
from models.attention.site import AttentionConfig
from models.attention.t5 import T5BiasConfig
from models.encoder import Encoder, EncoderConfig
from models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from models.parts.channel_mixers import MLPConfig


@dataclass(frozen=True)
class T5Sizes:
    """What encoder and decoder share. mlp: without biases. bias: the buckets of positions."""

    d_model: int
    vocab_size: int
    n_heads: int
    d_head: int
    mlp: MLPConfig
    bias: T5BiasConfig
    norm_eps: float = 1e-6

    def site(self, causal: bool) -> AttentionConfig:
        """Self-attention: unscaled scores, no biases on projections."""
        return AttentionConfig(
            self.n_heads, d_head=self.d_head, position=self.bias, bias=False, scale=1.0, causal=causal
        )


def t5_config(encoder_layers: int, decoder_layers: int, sizes: T5Sizes, **more: Any) -> EncoderDecoderConfig:
    """T5; a decoder layer is two blocks. more: `tie_embeddings`, `source` and `start` of `EncoderDecoderConfig`."""
    cross = CrossAttentionConfig(sizes.n_heads, d_head=sizes.d_head, bias=False, scale=1.0)
    return EncoderDecoderConfig(
        2 * decoder_layers,
        sizes.d_model,
        sizes.vocab_size,
        mixer=(sizes.site(causal=True), cross),
        mlp=(None, sizes.mlp),
        norm="rms",
        norm_eps=sizes.norm_eps,
        encoder_layers=encoder_layers,
        encoder_mixer=sizes.site(causal=False),
        encoder_mlp=sizes.mlp,
        **more,
    )


def t5_encoder_config(n_layers: int, sizes: T5Sizes) -> EncoderConfig:
    """T5's encoder as a model of its own (as sentence embedders use it)."""
    return EncoderConfig(
        n_layers,
        sizes.d_model,
        sizes.vocab_size,
        mixer=sizes.site(causal=False),
        mlp=sizes.mlp,
        norm="rms",
        norm_eps=sizes.norm_eps,
        token_types=0,
    )


_TINY = T5Sizes(24, 256, 4, 5, MLPConfig(40, "relu", bias=False), T5BiasConfig(8, 16))
register_encoder(
    Architecture(
        name="t5",
        title="T5 (encoder-decoder)",
        paper=None,
        family="attention",
        config=EncoderDecoderConfig,
        module=EncoderDecoder,
        presets={"tiny": t5_config(3, 2, _TINY, tie_embeddings=True, source=tuple(b"A source."))},
        description="An encoder reads a source in both directions; columns of the decoder's cross-attention patterns are its tokens.",
        shows=("pattern", "cross pattern", "position bias"),
        notes="Calls that name no source read the preset's, nine bytes. A decoder layer is two blocks.",
    )
)
register_encoder(
    Architecture(
        name="t5-encoder",
        title="T5's encoder",
        paper=None,
        family="attention",
        config=EncoderConfig,
        module=Encoder,
        presets={"tiny": t5_encoder_config(3, _TINY)},
        description="The encoder of T5 alone; its output is the last residual stream behind its norm.",
        shows=("pattern", "position bias"),
    )
)
