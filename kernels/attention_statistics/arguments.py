"""Checks of the arguments that only attention statistics have."""

import difflib
from collections.abc import Sequence

from torch import Tensor

from kernels.arguments import shape_of


def check_names(argument: str, names: Sequence[str], known: Sequence[str]) -> None:
    if isinstance(names, str):
        raise ValueError(f"{argument}: expected a list of names, got the text {names!r}")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"{argument}: unknown {name!r}; expected some of {', '.join(known)}. Did you mean {near!r}?"
            )


def check_mask(mask: Tensor | None, batch: int, keys: int) -> None:
    if mask is not None and mask.shape != (batch, keys):
        raise ValueError(f"mask: expected [batch={batch}, key={keys}], True at real tokens, got {shape_of(mask)}")


def check_segments(segments: Tensor | None, batch: int, keys: int) -> None:
    if segments is not None and (segments.shape != (batch, keys) or segments.is_floating_point()):
        raise ValueError(
            f"segments: expected whole numbers [batch={batch}, key={keys}], got {shape_of(segments)} in {segments.dtype}"
        )


def check_features(features: Tensor | None, batch: int, keys: int) -> None:
    if features is None:
        return
    if features.ndim != 3 or features.shape[0] not in (1, batch) or features.shape[1] != keys:
        raise ValueError(f"features: expected [batch={batch} or 1, key={keys}, feature], got {shape_of(features)}")
