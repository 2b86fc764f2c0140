"""BERT and its relatives (Devlin et al. 2019)."""

from models.architecture_record import Architecture, register_encoder
from models.attention.site import AttentionConfig
from models.encoder import Encoder, EncoderConfig
from models.parts.channel_mixers import MLPConfig

register_encoder(
    Architecture(
        name="bert",
        title="BERT",
        paper=None,
        family="attention",
        config=EncoderConfig,
        module=Encoder,
        presets={
            "tiny": EncoderConfig(
                3,
                24,
                256,
                64,
                AttentionConfig(4, causal=False),
                MLPConfig(40, "gelu"),
                norm_placement="after",
                embed_norm=True,
                pooler=True,
            )
        },
        description="An encoder: every token reads every token; its output is the last residual stream.",
    )
)
