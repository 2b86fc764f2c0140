"""What the experiments share: one small model around a mixer, and tasks that several use."""

from typing import Any

from models.attention.site import AttentionConfig
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from workbench.lab.tasks import Lookup

WIDTH, HEADS, LONGEST = 48, 4, 256


def small(mixer: Any, vocab_size: int, layers: int = 1, **changes: Any) -> LanguageModelConfig:
    """A small pre-norm language model around a mixer; weights begin at N(0, 1/width), since trainings are short."""
    fields: dict[str, Any] = {
        "n_ctx": LONGEST, "mixer": mixer, "mlp": MLPConfig(2 * WIDTH), "norm": "rms", "init_std": WIDTH**-0.5,
    }  # fmt: skip
    return LanguageModelConfig(layers, WIDTH, vocab_size, **{**fields, **changes})


def attention(**changes: Any) -> AttentionConfig:
    """Causal attention of four heads, without positions unless they are given."""
    return AttentionConfig(**{"n_heads": HEADS, "position": "none", **changes})


def lookup(**changes: Any) -> Lookup:
    """Six pairs, and questions at the end of the row."""
    return Lookup(**{"vocab_size": 64, "items": 6, **changes})


NOISY = lookup(length=33, queries=8, scattered=True)  # six pairs among noise
