"""The sequence mixers a `LanguageModel` can be built from, by the type of their configuration.

A new mixer is one file with a frozen configuration (carrying a unique `kind`) and a module, and one line in `_MODULES`.
"""

from typing import Any

from models.attention.site import Attention, AttentionConfig
from models.recurrent.mamba2 import Mamba2, Mamba2Config
from models.recurrent.retention import Retention, RetentionConfig

MixerConfig = Any  # one of the configuration classes below
_MODULES: dict[type, type] = {AttentionConfig: Attention, RetentionConfig: Retention, Mamba2Config: Mamba2}
CONFIGS: dict[str, type] = {config.kind: config for config in _MODULES}  # type: ignore[attr-defined]


def build_mixer(config: Any, d_model: int, switches: dict[str, bool]) -> Any:
    """The module for a mixer configuration; raises `TypeError` naming the known ones."""
    if type(config) not in _MODULES:
        raise TypeError(
            f"{type(config).__name__} is no mixer configuration. Known: {', '.join(c.__name__ for c in _MODULES)}."
        )
    return _MODULES[type(config)](config, d_model, switches)


__all__ = ["CONFIGS", "MixerConfig", "build_mixer"]
