"""Seeded trace runs without a model, structurally complete, for tests and for trying the dashboard.

The factors are drawn, with structure planted where a reader knows what to expect (a previous-token head, a sink head,
an induction head), and everything derived from them (log normaliser, entropy, overview, received, state norm) is
computed from them, so every array of a run agrees with every other. Their model records say `provenance: random`.

    softmax       two layers, 4 heads in 2 key groups; layer 1 has ALiBi slopes and a window
    gated_linear  a retention layer (constant decays) and a mamba2 layer (decays and write weights from the token)
    bdh           two passes, strict, keys = queries = rotated sparse activations, one value shared by both heads
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from workbench.lab.layer_arrays import add_layer_arrays, log_normaliser
from workbench.lab.runs import RunStore

# Darwin, On the Origin of Species (1859), last sentences; public domain.
TEXT = (
    "There is grandeur in this view of life, with its several powers, having been originally breathed into a few forms "
    "or into one; and that, whilst this planet has gone cycling on according to the fixed law of gravity, from so "
    "simple a beginning endless forms most beautiful and most wonderful have been, and are being, evolved. "
)

LONG_TOKENS = 4096

Layer = tuple[dict[str, Any], dict[str, np.ndarray]]


def write_synthetic_runs(store: RunStore, tokens: int = 96, seed: int = 0, long: bool = False) -> list[str]:
    """Write the three runs, softmax, gated linear, BDH, of `tokens` tokens each, and return their ids in that order.

    `long` adds a fourth: one softmax layer, 2 heads, 4096 tokens. The same arguments give the same arrays.
    """
    if tokens < 2:
        raise ValueError(f"a synthetic run needs at least 2 tokens, got {tokens}")
    ids = [
        _write(store, "softmax", _softmax_layers(_text(tokens), seed), _text(tokens), seed),
        _write(store, "gated_linear", _gated_layers(_text(tokens), seed + 1), _text(tokens), seed + 1),
        _write(store, "bdh", _bdh_layers(_text(tokens), seed + 2), _text(tokens), seed + 2),
    ]
    if long:
        text = _text(LONG_TOKENS)
        ids.append(_write(store, "softmax_long", _long_layers(text, seed + 3), text, seed + 3))
    return ids


def _text(tokens: int) -> bytes:
    return (TEXT.encode() * (tokens // len(TEXT) + 1))[:tokens]


# ---------------------------------------------------------------------------------------------------------------------
# Layers: a record of the run contract and its factors
# ---------------------------------------------------------------------------------------------------------------------


def _record(layer: int, kind: str, form: str, heads: int, *, scale: float, **fields: Any) -> dict[str, Any]:
    softmax = form == "softmax"
    pattern = {"columns": "tokens", "signed": not softmax, "rows_sum_to": 1 if softmax else None, "exact": True,
               "effective": not softmax, "causal": True}  # fmt: skip
    defaults: dict[str, Any] = {
        "n_key_heads": heads, "n_value_heads": heads, "strict": False, "alibi_slopes": None, "window": None,
        "pattern": pattern, "state": None, "signals": [],
    }  # fmt: skip
    return {"layer": layer, "kind": kind, "form": form, "n_heads": heads, "scale": scale, **defaults, **fields}


def _state(heads: int, key: int, value: int) -> dict[str, Any]:
    return {"role": "state", "axes": ["head", "state_k", "state_v"], "shape": [heads, key, value]}


def _directions(generator: np.random.Generator, count: int, width: int) -> np.ndarray:
    """`count` random unit vectors."""
    vectors = generator.standard_normal((count, width))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _softmax_layers(text: bytes, seed: int) -> Iterable[Layer]:
    """Layer 0: heads 0, 1 read the previous token, heads 2, 3 the first one (a sink).

    Layer 1: heads 0, 1 read the token after the last occurrence of the present one (induction), heads 2, 3 are noise;
    ALiBi and a window on all.
    """
    generator, length, width, strength = np.random.default_rng(seed), len(text), 32, 12.0 * np.sqrt(32)
    place, letter = _directions(generator, length, width), _directions(generator, 256, width)
    ids = np.frombuffer(text, np.uint8)
    previous = np.roll(np.arange(length), 1)
    previous[0] = 0

    query, key = np.zeros((2, 4, length, width)), np.zeros((2, 2, length, width))
    query[0, :2], key[0, 0] = place[previous], place
    query[0, 2:], key[0, 1, 0] = place[0], place[0]
    query[1, :2], key[1, 0] = letter[ids], letter[ids[previous]]
    for layer in range(2):
        noisy_query = np.sqrt(strength) * query[layer] + 0.5 * generator.standard_normal(query[layer].shape)
        noisy_key = np.sqrt(strength) * key[layer] + 0.5 * generator.standard_normal(key[layer].shape)
        value = generator.standard_normal((2, length, width))
        biased = {"alibi_slopes": [2.0 ** -(2 * head + 4) for head in range(4)], "window": max(2, length * 3 // 4)}
        state = {"role": "cache", "axes": ["head", "pos", "d_head"], "shape": [2, length, width]}
        record = _record(layer, "attention", "softmax", 4, scale=width**-0.5, n_key_heads=2, n_value_heads=2,
                         state=state, **(biased if layer else {}))  # fmt: skip
        yield record, _with_log_normaliser(record, _float32(query=noisy_query, key=noisy_key, value=value))


def _long_layers(text: bytes, seed: int) -> Iterable[Layer]:
    """Head 0 reads the previous token, head 1 reads the first one."""
    generator, length, width = np.random.default_rng(seed), len(text), 32
    place = _directions(generator, length, width)
    query = np.stack([np.roll(place, 1, axis=0), np.tile(place[0], (length, 1))]) * 12
    key = np.stack([place, place * (np.arange(length) == 0)[:, None]]) * 12
    record = _record(0, "attention", "softmax", 2, scale=width**-0.5)
    value = generator.standard_normal((2, length, width))
    yield record, _with_log_normaliser(record, _float32(query=query, key=key, value=value))


def _gated_layers(text: bytes, seed: int) -> Iterable[Layer]:
    generator, length, heads, width = np.random.default_rng(seed), len(text), 2, 16

    def normal(*shape: int) -> np.ndarray:
        return generator.standard_normal(shape)

    constant = np.log1p(-(2.0 ** -(3.0 + 2 * np.arange(heads))))  # decays 1 − 1/8 and 1 − 1/32 per token
    retention = _record(0, "retention", "gated_linear", heads, scale=width**-0.5, state=_state(heads, width, width))
    query, key, value = normal(3, heads, length, width)
    log_decay = np.tile(constant[:, None], (1, length))
    yield retention, _float32(query=query, key=key, value=value, log_decay=log_decay)

    # A mamba2 layer forgets at spaces: the step size is large there, and with it both the decay and the write.
    at_space = np.frombuffer(text, np.uint8) == ord(" ")
    step = np.log1p(np.exp(normal(heads, length) - 2 + 3 * at_space))
    signal = {"name": "delta", "array": "layer.1.delta", "label": "step size", "unit": None}
    mamba2 = _record(1, "mamba2", "gated_linear", heads, scale=1.0, n_key_heads=1, state=_state(heads, width, 24),
                     signals=[signal])  # fmt: skip
    rate = np.array([[0.2], [1.0]])
    query, key = np.tile(normal(length, width), (heads, 1, 1)), normal(1, length, width)
    value = normal(heads, length, 24)
    yield mamba2, _float32(query=query, key=key, value=value, log_decay=-rate * step, write=step, delta=step)


def _bdh_layers(text: bytes, seed: int) -> Iterable[Layer]:
    """Activations of about one neuron in twenty; each byte value has its own neurons, so equal letters overlap."""
    generator, length, heads, neurons, width = np.random.default_rng(seed), len(text), 2, 128, 24
    ids = np.frombuffer(text, np.uint8)
    angle = np.arange(length)[:, None] * 2.0**-np.linspace(2, 16, neurons // 2)
    for layer in range(2):
        drive = generator.standard_normal((heads, 256, neurons))[:, ids]
        drive += 0.3 * generator.standard_normal(drive.shape)
        x = np.maximum(drive - 1.7, 0).astype(np.float16)
        y = (x * np.maximum(generator.standard_normal(x.shape), 0)).astype(np.float16)
        even, odd = x[..., ::2].astype(np.float64), x[..., 1::2].astype(np.float64)
        rotated = np.empty(x.shape)
        rotated[..., ::2] = even * np.cos(angle) - odd * np.sin(angle)
        rotated[..., 1::2] = even * np.sin(angle) + odd * np.cos(angle)
        record = _record(layer, "bdh", "gated_linear", heads, scale=1.0, n_value_heads=1, strict=True,
                         state=_state(heads, neurons, width))  # fmt: skip
        factors = _float32(query=rotated, key=rotated, value=generator.standard_normal((1, length, width)))
        yield record, {**factors, "x": x, "y": y}


def _float32(**arrays: np.ndarray) -> dict[str, np.ndarray]:
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def _with_log_normaliser(record: dict[str, Any], factors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {**factors, "log_normaliser": log_normaliser(record, factors["query"], factors["key"])}


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------

MODELS = {
    "softmax": ("Synthetic attention", "transformer", "attention"),
    "softmax_long": ("Synthetic attention, long", "transformer", "attention"),
    "gated_linear": ("Synthetic retention and Mamba-2", "mamba2", "recurrent"),
    "bdh": ("Synthetic BDH", "bdh", "bdh"),
}


def _write(store: RunStore, which: str, layers: Iterable[Layer], text: bytes, seed: int) -> str:
    name, architecture, family = MODELS[which]
    model = {"name": name, "architecture": architecture, "family": family, "provenance": "random", "config": {}}
    generator, length, records = np.random.default_rng(seed + 1000), len(text), []
    with store.create("trace", name, model=model, text=text.decode(), seed=seed) as run:
        for record, factors in layers:
            add_layer_arrays(run, record, factors)
            records.append(record)
        ids = np.frombuffer(text, np.uint8).astype(np.int32)
        run.add_array("tokens", ids, axes=("pos",))
        loss, log_probs, next_ids = _predictions(generator, ids)
        run.add_array("loss", loss, axes=("pos",), unit="nats")
        run.add_array("next.log_probs", log_probs, axes=("pos", "rank"), unit="nats")
        run.add_array("next.ids", next_ids, axes=("pos", "rank"))
        growth = np.cumsum(generator.uniform(0.5, 1.5, (len(records) + 1, length)), axis=0)
        run.add_array("resid_norm", growth.astype(np.float32), axes=("depth", "pos"))
        run.set(
            tokens={"ids": ids.tolist(), "strings": [chr(token) for token in ids], "tokenizer": "bytes"},
            layers=records,
            hook_points=[_hook_point(record) for record in records],
            settings={"synthetic": which},
        )
    return run.id


def _hook_point(record: dict[str, Any]) -> dict[str, Any]:
    index = record["layer"]
    if record["form"] == "softmax":
        axes = ["batch", "head", "query", "key"]
        return {"name": f"blocks.{index}.attn.hook_pattern", "role": "pattern", "axes": axes}
    site = "attn" if record["kind"] == "bdh" else "mixer"
    axes = ["batch", "pos", "head", "state_k", "state_v"]
    return {"name": f"blocks.{index}.{site}.hook_state", "role": "state", "axes": axes}


def _predictions(generator: np.random.Generator, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Surprisal of each token and the ten most likely next ones, from one table of drawn logits that leans to the
    truth.
    """
    logits = generator.standard_normal((len(ids), 256)) * 2
    logits[np.arange(len(ids) - 1), ids[1:]] += generator.uniform(0, 9, len(ids) - 1)
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    loss = np.full(len(ids), np.nan)
    loss[1:] = -log_probs[np.arange(len(ids) - 1), ids[1:]]
    best = np.argsort(-log_probs, axis=1, kind="stable")[:, :10]
    return loss.astype(np.float32), np.take_along_axis(log_probs, best, 1).astype(np.float32), best.astype(np.int32)
