"""Transformers whose memory is compressed as it ages."""

from models.architectures.shared import GELU, language_model, tiny
from models.attention.compressive import compressive_mixer

language_model(
    name="compressive-transformer",
    title="Compressive Transformer",
    paper="compressive-transformer",
    family="memory",
    presets={
        "tiny": tiny(
            (
                compressive_mixer(n_heads=4, segment=4, memory=4, slots=3, rate=2),
                compressive_mixer(n_heads=4, segment=4, memory=4, slots=2, rate=4, learned=True),
            ),
            GELU,
            norm_placement="after",
        )
    },
    description="Transformer-XL's memory, behind which older tokens are one slot per few: exact map over tokens, weight of every slot.",
    shows=("pattern", "slot pattern"),
    fidelity="reconstructed",
    notes="Pooling with weights that channels share instead of convolutions; a slot's position is the mean of its tokens'.",
)
