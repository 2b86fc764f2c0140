"""Generalised cross-attention (2025): a transformer whose feed-forward layers read one shared knowledge base."""

from models.architectures.shared import language_model, tiny
from models.attention.site import AttentionConfig
from models.language_model import LanguageModelConfig
from models.parts.knowledge import KnowledgeConfig

language_model(
    name="knowledge-base",
    title="Transformer over a shared knowledge base",
    paper="generalized-cross-attn",
    family="attention",
    presets={
        "tiny": tiny(AttentionConfig(n_heads=4, position="rope"), KnowledgeConfig(entries=18, d_entry=7, d_key=5)),
        "demo": LanguageModelConfig(
            4, 128, 256, None, AttentionConfig(4, position="rope"), KnowledgeConfig(512, 128, 64)
        ),
    },
    description="Feed-forward layers that look up entries shared by all layers: who reads which entry is a token × entry map.",
    shows=("pattern", "knowledge base"),
    notes="The paper's equation without retrieval: every entry is read, with ReLU weights.",
)
