"""The checks of `kernels.arguments`, under the name they had when this folder was their only user."""

from kernels.arguments import (
    HALF_TYPES,
    MODES,
    check_decay,
    check_key,
    check_like,
    check_mode,
    check_positions,
    check_positive_integer,
    check_query,
    check_state,
    check_stops,
    check_tensor,
    check_value,
    check_write,
    compute_dtype,
    shape_of,
)

__all__ = [
    "HALF_TYPES",
    "MODES",
    "check_decay",
    "check_key",
    "check_like",
    "check_mode",
    "check_positions",
    "check_positive_integer",
    "check_query",
    "check_state",
    "check_stops",
    "check_tensor",
    "check_value",
    "check_write",
    "compute_dtype",
    "shape_of",
]
