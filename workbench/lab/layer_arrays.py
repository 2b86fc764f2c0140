"""The arrays that a trace run stores for one layer: its factors as they are, and the summaries computed from them (numpy only)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.lab.factors import LayerFactors
from workbench.lab.run_writer import RunWriter

if TYPE_CHECKING:
    from workbench.lab.stacks import ArraysOf

FACTOR_AXES = {
    "query": ("head", "pos", "width"),
    "key": ("head", "pos", "width"),
    "value": ("head", "pos", "width"),
    "x": ("head", "pos", "neuron"),
    "y": ("head", "pos", "neuron"),
    "pattern": ("head", "query", "key"),
    "pattern_rows": ("head", "stored", "key"),
    "row_positions": ("stored",),
    "state_positions": ("stored",),
}
SUMMARY_AXES = {"overview": ("head", "query_bin", "key_bin")}
UNITS = {"log_normaliser": "nats", "log_decay": "nats per token", "entropy": "nats"}


def add_layer_arrays(
    run: RunWriter | ArraysOf,
    record: dict[str, Any],
    factors: dict[str, np.ndarray],
    rows: Sequence[int] | None = None,
    length: int | None = None,
) -> None:
    """Write `layer.{l}.<factor>` and `<summary>.{l}` of one layer record (docs/architecture.md, section 4).

    rows: of a dense layer's pattern, keep these rows only; its summaries are those of the whole pattern. length: number of tokens, for a
    layer without factors that tell.
    """
    layer, kept = record["layer"], dict(factors)
    if rows is not None:
        kept["pattern_rows"] = kept.pop("pattern")[:, list(rows)]
        kept["row_positions"] = np.array(rows, dtype=np.int32)
    for name, array in kept.items():
        run.add_array(f"layer.{layer}.{name}", array, axes=_axes(name, array), unit=UNITS.get(name))
    summaries = {} if record["form"] is None else LayerFactors(record, factors, length).summaries()
    for name, array in summaries.items():
        run.add_array(f"{name}.{layer}", array, axes=SUMMARY_AXES.get(name, ("head", "pos")), unit=UNITS.get(name))


def _axes(name: str, array: np.ndarray) -> tuple[str, ...]:
    if name.partition(".")[0] == "states":
        return ("head", "stored", "state_k", "state_v")[: array.ndim]
    axes = FACTOR_AXES.get(name, ("head", "pos"))
    return (*axes, "state_k") if name == "log_decay" and array.ndim == 3 else axes


def log_normaliser(record: dict[str, Any], query: np.ndarray, key: np.ndarray, block: int = 256) -> np.ndarray:
    """Log of each softmax row's sum of exponentials, from float32 factors, in blocks of rows. [head, pos] float32.

    query [head, pos, width], key [kv_head, pos, width]; scale, ALiBi slopes and window from the layer record.
    """
    heads, length = query.shape[:2]
    window = record["window"] or length
    slopes = record["alibi_slopes"] or [0.0] * heads
    out = np.empty((heads, length))
    for head in range(heads):
        keys = key[head * key.shape[0] // heads].astype(np.float64)
        for start in range(0, length, block):
            rows = np.arange(start, min(start + block, length))
            distance = rows[:, None] - np.arange(length)
            scores = record["scale"] * query[head, rows].astype(np.float64) @ keys.T - slopes[head] * distance
            scores[(distance < 0) | (distance >= window)] = -np.inf
            top = scores.max(1)
            out[head, rows] = top + np.log(np.exp(scores - top[:, None]).sum(1))
    return out.astype(np.float32)
