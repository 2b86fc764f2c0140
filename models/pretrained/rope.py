"""The rotary settings of a published configuration: `rope_parameters`, or `rope_theta` and `rope_scaling` in older files."""

from collections.abc import Mapping
from typing import Any

from models.attention.rotary import RopeConfig
from models.parts.rope_scaling import RopeScaling
from models.pretrained.family import Fields, UnsupportedCheckpoint

_NAMES = {
    "factor": "factor",
    "original_max_position_embeddings": "original_context",
    "attention_factor": "attention_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "truncate": "truncate",
    "low_freq_factor": "low_frequency_factor",
    "high_freq_factor": "high_frequency_factor",
    "short_factor": "short_factors",
    "long_factor": "long_factors",
}
_IGNORED = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}


def rope(
    fields: Fields, fraction: float = 1.0, base: float = 10000.0, parameters: Mapping[str, Any] | None = None
) -> RopeConfig:
    """Rotary positions as configured. fraction, base: the family's defaults. parameters: instead of those of the whole model.

    Raises:
        UnsupportedCheckpoint: a scaling, or a setting of it, that we do not have.
    """
    given = dict(parameters or fields.get("rope_parameters", {}) or fields.get("rope_scaling", {}))
    base = given.get("rope_theta") or fields.get("rope_theta", fields.get("rotary_emb_base", base))
    share = given.get("partial_rotary_factor") or fields.get(
        "partial_rotary_factor", fields.get("rotary_pct", fraction)
    )
    method = given.get("rope_type", given.get("type", "default"))
    if method == "default":
        return RopeConfig(float(base), float(share))
    if method not in ("linear", "dynamic", "yarn", "llama3", "longrope"):
        raise UnsupportedCheckpoint(f"config.json: the rope scaling {method!r} is not supported.")
    unknown = sorted(set(given) - set(_NAMES) - _IGNORED)
    if unknown:
        raise UnsupportedCheckpoint(
            f"config.json: the rope scaling {method!r} has {unknown[0]!r}, which is not supported."
        )
    settings = {_NAMES[name]: value for name, value in given.items() if name in _NAMES and value is not None}
    settings = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    if method != "linear":
        settings.setdefault("original_context", fields["max_position_embeddings"])
    return RopeConfig(float(base), float(share), scaling=RopeScaling(method, **settings))
