"""Configurations as plain JSON and back. Nested dataclasses carry their `kind` or are known by their field."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

from workbench.instrument.errors import suggestion

T = TypeVar("T")


def config_to_json(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain data."""
    return {
        item.name: config_to_json(value) if is_dataclass(value := getattr(config, item.name)) else value
        for item in fields(config)
    }


def config_from_json(kind: type[T], record: Mapping[str, Any]) -> T:
    """Build `kind` from plain data.

    Raises:
        ValueError: an unknown field, with the nearest known one, a missing field, or an unknown mixer kind.
    """
    from models.mixers import CONFIGS
    from models.parts.channel_mixers import MLPConfig

    known = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in record.items():
        if name not in known:
            raise ValueError(
                f"{kind.__name__} has no field {name!r}.{suggestion(name, known)} Its fields: {', '.join(sorted(known))}."
            )
        if name == "mixer":
            if not isinstance(value, Mapping):
                raise ValueError(f"{kind.__name__}: mixer is {type(value).__name__}, expected an object with its kind.")
            mixer = value.get("kind", "attention")
            if mixer not in CONFIGS:
                raise ValueError(
                    f"Unknown mixer kind {mixer!r}.{suggestion(str(mixer), CONFIGS)} Known: {', '.join(CONFIGS)}."
                )
            value = config_from_json(CONFIGS[mixer], value)
        elif isinstance(value, Mapping) and name == "mlp":
            value = config_from_json(MLPConfig, value)
        values[name] = value
    for item in fields(kind):  # type: ignore[arg-type]
        if item.name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{kind.__name__} lacks the field {item.name!r}, which has no default.")
    return kind(**values)
