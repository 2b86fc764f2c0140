"""Architectures, their registry, and the shipped trained models.

    import models
    model = models.load("bdh-english")
    logits, cache = model.run_with_cache("A dragon hatches.", role="pattern")

Names load on first use.
"""

from workbench.lazy import lazy_names

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


__getattr__ = lazy_names(__name__, _HOME)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
