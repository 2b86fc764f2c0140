"""Transformers whose memory is slots: of a few older tokens each, or written anew behind every segment."""

from models.architectures.shared import GELU, language_model, tiny
from models.attention.compressive import compressive_mixer
from models.attention.site import AttentionConfig
from models.attention.slot_memory import SlotMemoryConfig
from models.attention.transformer_xl import RecentSegmentsConfig

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
language_model(
    name="memformer",
    title="Memformer (slots of every layer)",
    paper="memformer",
    family="memory",
    presets={
        "tiny": tiny(
            AttentionConfig(
                n_heads=4, position="rope", mask=RecentSegmentsConfig(5, 0), mix=SlotMemoryConfig(slots=3, segment=5)
            ),
            GELU,
        )
    },
    description="Every segment reads a few slots, which write themselves anew behind it: slots can be read and patched after any token.",
    shows=("pattern", "state", "slot weights"),
    fidelity="reconstructed",
    notes="A memory per layer instead of one written from the last layer; a language model instead of an encoder and decoder.",
)
