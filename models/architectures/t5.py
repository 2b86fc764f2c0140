"""T5 (Raffel et al. 2020): an encoder-decoder whose positions are one learned number per head and bucket of distances."""

from typing import Any

from models.architecture_record import Architecture, register_encoder
from models.attention.cross import CrossAttentionConfig
from models.attention.site import AttentionConfig
from models.attention.t5 import T5BiasConfig
from models.encoder import Encoder, EncoderConfig
from models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from models.parts.channel_mixers import MLPConfig


def site(n_heads: int, d_head: int, bias: T5BiasConfig, causal: bool) -> AttentionConfig:
    """Unscaled scores, no biases on projections."""
    return AttentionConfig(n_heads, d_head=d_head, position=bias, bias=False, scale=1.0, causal=causal)


def t5_config(
    encoder_layers: int,
    decoder_layers: int,
    d_model: int,
    vocab_size: int,
    n_heads: int,
    d_head: int,
    mlp: MLPConfig,
    bias: T5BiasConfig,
    norm_eps: float = 1e-6,
    tie_embeddings: bool = True,
    **ends: Any,
) -> EncoderDecoderConfig:
    """T5 of these sizes; a decoder layer is two blocks. ends: `source` and `start` of `EncoderDecoderConfig`."""
    cross = CrossAttentionConfig(n_heads, d_head=d_head, bias=False, scale=1.0)
    return EncoderDecoderConfig(
        2 * decoder_layers,
        d_model,
        vocab_size,
        mixer=(site(n_heads, d_head, bias, causal=True), cross),
        mlp=(None, mlp),
        norm="rms",
        norm_eps=norm_eps,
        tie_embeddings=tie_embeddings,
        encoder_layers=encoder_layers,
        encoder_mixer=site(n_heads, d_head, bias, causal=False),
        encoder_mlp=mlp,
        **ends,
    )


def t5_encoder_config(
    n_layers: int,
    d_model: int,
    vocab_size: int,
    n_heads: int,
    d_head: int,
    mlp: MLPConfig,
    bias: T5BiasConfig,
    norm_eps: float = 1e-6,
) -> EncoderConfig:
    """T5's encoder as a model of its own (as sentence embedders use it)."""
    mixer = site(n_heads, d_head, bias, causal=False)
    return EncoderConfig(
        n_layers, d_model, vocab_size, mixer=mixer, mlp=mlp, norm="rms", norm_eps=norm_eps, token_types=0
    )


_BIAS, _RELU = T5BiasConfig(8, 16), MLPConfig(40, "relu", bias=False)
register_encoder(
    Architecture(
        name="t5",
        title="T5 (encoder-decoder)",
        paper=None,
        family="attention",
        config=EncoderDecoderConfig,
        module=EncoderDecoder,
        presets={"tiny": t5_config(3, 2, 24, 256, 4, 5, _RELU, _BIAS, source=tuple(b"A source."))},
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
        presets={"tiny": t5_encoder_config(3, 24, 256, 4, 5, _RELU, _BIAS)},
        description="The encoder of T5 alone; its output is the last residual stream behind its norm.",
        shows=("pattern", "position bias"),
    )
)
