"""Transformers that read a text in segments and hand a memory on."""

from models.architecture_record import Architecture, register_architecture
from models.architectures.shared import GELU, GLU, language_model, tiny
from models.attention.infini import InfiniConfig
from models.attention.landmark import LandmarkConfig
from models.attention.memory_slots import MemorySlotsConfig
from models.attention.site import AttentionConfig
from models.attention.transformer_xl import RecentSegmentsConfig, TransformerXLConfig
from models.language_model import LanguageModelConfig
from models.memory_tokens import RecurrentMemory

for _update, _words in (("linear", "adds every segment"), ("delta", "writes only what the memory does not recall yet")):
    language_model(
        name="infini" if _update == "linear" else "infini-delta",
        title=f"Infini-attention, {_update} update",
        paper="infini-attention",
        family="memory",
        presets={"tiny": tiny(InfiniConfig(n_heads=4, segment=5, update=_update), GLU, norm="rms")},
        description=f"Softmax within a segment and a matrix memory of all segments before, which {_words}; exact pattern over all tokens.",
        shows=("pattern", "state", "gate"),
    )
language_model(
    name="transformer-xl",
    title="Transformer-XL (segments with a memory)",
    paper=None,
    family="memory",
    presets={
        "tiny": tiny(TransformerXLConfig(n_heads=4, mask=RecentSegmentsConfig(5, 4)), GELU, norm_placement="after")
    },
    description="Segments that also read the tokens before them; what is carried are hidden states, without gradient.",
    notes="The last head is an ordinary softmax.",
)
language_model(
    name="landmark",
    title="Landmark attention",
    paper="landmark-attention",
    family="memory",
    presets={
        "tiny": tiny(
            (
                AttentionConfig(n_heads=4, position="rope", normalise=LandmarkConfig(block=4)),
                AttentionConfig(n_heads=4, position="rope", normalise=LandmarkConfig(block=4, retrieve=2)),
            ),
            GLU,
            norm="rms",
        )
    },
    description="Earlier blocks are read through the landmark at their end: the weight of every block is a hook point of its own.",
    shows=("pattern", "block gate"),
)
register_architecture(
    Architecture(
        name="recurrent-memory",
        title="Recurrent Memory Transformer",
        paper="rmt",
        family="memory",
        config=LanguageModelConfig,
        module=RecurrentMemory,
        presets={"tiny": tiny(MemorySlotsConfig(n_heads=4, slots=3, segment=5), GLU, norm="rms")},
        description="Memory tokens are read before every segment and written behind it; nothing else goes from one segment to the next.",
        shows=("pattern", "state", "memory pattern"),
        notes="Rotations or no positions. The paper builds on Transformer-XL; its terms of distance and cached hidden states are left out.",
    )
)
