"""Architectures, their registry, and the shipped trained models.

    import models
    model = models.load("bdh-english")
    logits, cache = model.run_with_cache("A dragon hatches.", role="pattern")

Names load on first use.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "load": "registry",
    "save": "registry",
    "build": "registry",
    "list_models": "registry",
    "describe": "registry",
    "architecture": "registry",
    "register_architecture": "registry",
    "Architecture": "registry",
    "UnknownModel": "registry",
    "LanguageModel": "language_model",
    "LanguageModelConfig": "language_model",
    "BDH": "bdh.model",
    "BDHConfig": "bdh.model",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"models.{_HOME[name]}"), name)
    raise AttributeError(f"module 'models' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
