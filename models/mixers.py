"""The sequence mixers a `LanguageModel` can be built from, by the type of their configuration.

A new mixer is one file in `models/attention/` or `models/recurrent/`: a frozen configuration (carrying a unique `kind`) and a module under
`@register_mixer(TheConfig)`. It is found by being there.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from workbench.discovery import import_all

MixerConfig = Any  # one of the registered configuration classes
_PACKAGES = ("models.attention", "models.recurrent")
_MODULES: dict[type, Any] = {}

M = TypeVar("M")


def register_mixer(config: type) -> Callable[[type[M]], type[M]]:
    """Class decorator: the module that is built from configurations of this class.

    Raises:
        ValueError: another mixer has the same `kind` (saved configurations could not be told apart).
    """
    kind = config.kind  # type: ignore[attr-defined]
    for known in _MODULES:
        if known.kind == kind:  # type: ignore[attr-defined]
            raise ValueError(
                f"{config.__name__} and {known.__name__} both have the kind {kind!r}. Expected a unique one."
            )

    def register(module: type[M]) -> type[M]:
        _MODULES[config] = module
        return module

    return register


def mixer_configs() -> dict[str, type]:
    """Configuration classes by their `kind`."""
    for package in _PACKAGES:
        import_all(package)
    return {config.kind: config for config in _MODULES}  # type: ignore[attr-defined]


def build_mixer(config: Any, d_model: int, switches: dict[str, bool]) -> Any:
    """The module for a mixer configuration; raises `TypeError` naming the known ones."""
    if type(config) not in _MODULES:
        known = mixer_configs().values()
        raise TypeError(
            f"{type(config).__name__} is no mixer configuration. Known: {', '.join(c.__name__ for c in known)}."
        )
    return _MODULES[type(config)](config, d_model, switches)
