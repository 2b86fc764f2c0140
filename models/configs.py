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
    known = {item.name for item in fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for name, value in record.items():
        if name not in known:
            raise ValueError(
                f"{kind.__name__} has no field {name!r}.{suggestion(name, known)} Its fields: {', '.join(sorted(known))}."
            )
        convert = _CONVERSIONS.get(name, _part_from_json)
        value = tuple(convert(kind, item) for item in value) if isinstance(value, list) else convert(kind, value)
        values[name] = value
    for item in fields(kind):  # type: ignore[arg-type]
        if item.name not in values and item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"{kind.__name__} lacks the field {item.name!r}, which has no default.")
    return kind(**values)


def _mlp_from_json(owner: type, value: Any) -> Any:
    from models.parts.channel_mixers import channel_mixer_configs

    if not isinstance(value, Mapping):
        return value
    known, kind = channel_mixer_configs(), str(value.get("kind", "mlp"))
    if kind not in known:
        raise ValueError(f"Unknown channel mixer kind {kind!r}.{suggestion(kind, known)} Known: {', '.join(known)}.")
    return config_from_json(known[kind], value)


def _part_from_json(owner: type, value: Any) -> Any:
    """A part of an attention site is known by its `kind`; everything else is plain."""
    if not isinstance(value, Mapping):
        return tuple(_part_from_json(owner, item) for item in value) if isinstance(value, list) else value
    from models.attention.stages import part_configs

    known, part = part_configs(), value.get("kind")
    if part not in known:
        raise ValueError(
            f"{owner.__name__}: unknown part {part!r}.{suggestion(str(part), known)} Known: {', '.join(known)}."
        )
    return config_from_json(known[part], value)


def _mixer_from_json(owner: type, value: Any) -> Any:
    from models.mixers import mixer_configs

    if not isinstance(value, Mapping):
        raise ValueError(f"{owner.__name__}: mixer is {type(value).__name__}, expected an object with its kind.")
    known = mixer_configs()
    mixer = value.get("kind", "attention")
    if mixer not in known:
        raise ValueError(f"Unknown mixer kind {mixer!r}.{suggestion(str(mixer), known)} Known: {', '.join(known)}.")
    return config_from_json(known[mixer], value)


_CONVERSIONS = {
    "mixer": _mixer_from_json,
    "encoder_mixer": _mixer_from_json,
    "mlp": _mlp_from_json,
    "encoder_mlp": _mlp_from_json,
}
