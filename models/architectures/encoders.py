"""BERT and its relatives (Devlin et al. 2019), and a reader of graphs."""

from models.architecture_record import Architecture, register_encoder
from models.attention.graph import GraphDistanceConfig
from models.attention.site import AttentionConfig
from models.depth.centrality import CentralityConfig
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

register_encoder(
    Architecture(
        name="graphormer",
        title="Graphormer (distances and degrees)",
        paper="graphormer",
        family="attention",
        config=EncoderConfig,
        module=Encoder,
        presets={
            "tiny": EncoderConfig(
                3,
                24,
                mixer=AttentionConfig(4, causal=False, position=GraphDistanceConfig(longest=9)),
                mlp=MLPConfig(40, "gelu"),
                token_types=0,
                wiring=CentralityConfig(most=5),
            )
        },
        description="Nodes of a graph read each other by their distance in it and know their degree; a text is read as a chain of tokens.",
        shows=("pattern", "position bias"),
        notes="Without the encoding of edges along paths and without the virtual node.",
    )
)
