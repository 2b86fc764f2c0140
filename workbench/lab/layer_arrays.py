"""The arrays that a trace run stores for one layer: its factors as they are, and the summaries computed from them (numpy only)."""

from typing import Any

import numpy as np

from workbench.lab.factors import LayerFactors
from workbench.lab.run_writer import RunWriter

FACTOR_AXES = {
    "query": ("head", "pos", "width"),
    "key": ("head", "pos", "width"),
    "value": ("head", "pos", "width"),
    "x": ("head", "pos", "neuron"),
    "y": ("head", "pos", "neuron"),
    "pattern": ("head", "query", "key"),
    "states": ("head", "stored", "state_k", "state_v"),
    "state_positions": ("stored",),
}
SUMMARY_AXES = {"overview": ("head", "query_bin", "key_bin")}
UNITS = {"log_normaliser": "nats", "log_decay": "nats per token", "entropy": "nats"}


def add_layer_arrays(run: RunWriter, record: dict[str, Any], factors: dict[str, np.ndarray]) -> None:
    """Write `layer.{l}.<factor>` and `<summary>.{l}` of one layer record (docs/architecture.md, section 4)."""
    layer = record["layer"]
    for name, array in factors.items():
        run.add_array(f"layer.{layer}.{name}", array, axes=FACTOR_AXES.get(name, ("head", "pos")), unit=UNITS.get(name))
    for name, array in LayerFactors(record, factors).summaries().items():
        run.add_array(f"{name}.{layer}", array, axes=SUMMARY_AXES.get(name, ("head", "pos")), unit=UNITS.get(name))


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
