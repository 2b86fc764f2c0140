"""Configurations as plain JSON and back. Nested dataclasses carry their `kind` or are known by their field."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

from workbench.instrument.errors import suggestion

T = TypeVar("T")


def config_to_json(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain data."""
    return {item.name: _plain(getattr(config, item.name)) for item in fields(config)}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return config_to_json(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def config_from_json(kind: type[T], record: Mapping[str, Any]) -> T:
    """Build `kind` from plain data.

    Raises:
        ValueError: an unknown field, with the nearest known one, a missing field, or an unknown mixer kind.
    """
    from models.parts.channel_mixers import MLPConfig

    known = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in record.items():
        if name not in known:
            raise ValueError(
                f"{kind.__name__} has no field {name!r}.{suggestion(name, known)} Its fields: {', '.join(sorted(known))}."
            )
        if isinstance(value, list):
            value = tuple(value)
        one_per_layer = value if isinstance(value, tuple) else (value,)
        if name == "mixer":
            one_per_layer = tuple(_mixer_from_json(kind, item) for item in one_per_layer)
        elif name == "mlp":
            one_per_layer = tuple(
                config_from_json(MLPConfig, item) if isinstance(item, Mapping) else item for item in one_per_layer
            )
        value = one_per_layer if isinstance(value, tuple) else one_per_layer[0]
        values[name] = value
    for item in fields(kind):  # type: ignore[arg-type]
        if item.name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{kind.__name__} lacks the field {item.name!r}, which has no default.")
    return kind(**values)


def _mixer_from_json(owner: type, value: Any) -> Any:
    from models.mixers import mixer_configs

    if not isinstance(value, Mapping):
        raise ValueError(f"{owner.__name__}: mixer is {type(value).__name__}, expected an object with its kind.")
    known = mixer_configs()
    mixer = value.get("kind", "attention")
    if mixer not in known:
        raise ValueError(f"Unknown mixer kind {mixer!r}.{suggestion(str(mixer), known)} Known: {', '.join(known)}.")
    return config_from_json(known[mixer], value)
