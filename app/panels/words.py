"""Facts of a layer in words: what its pattern is, what it remembers, what its kind is called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

KINDS = {
    "attention": "attention", "retention": "retention", "mamba2": "Mamba-2", "mamba": "Mamba", "bdh": "BDH",
    "gla": "gated linear attention", "linear": "linear attention", "delta": "delta rule", "rwkv": "RWKV",
    "gateloop": "GateLoop", "log_linear_mamba2": "log-linear Mamba-2", "log_linear_delta": "log-linear delta rule",
    "aaren": "Aaren", "titans": "Titans memory", "miras": "Miras memory", "infini": "Infini-attention", "mlstm": "mLSTM", "slstm": "sLSTM",
    "lstm": "LSTM", "gru": "GRU", "elman": "Elman network", "paragru": "ParaGRU", "paralstm": "ParaLSTM", "rg_lru": "RG-LRU",
}  # fmt: skip

PATTERN_KIND_WORDS = {
    "jacobian": "Jacobian norms, not weights: how strongly each output moves with each token",
    "mean": "mean over channels that mix differently: not the weights of any one",
}
"""What is said of a map that is no matrix of weights."""


def kind_words(kind: str) -> str:
    """`retention` for "retention", the word itself for an unknown kind."""
    return KINDS.get(kind, kind.replace("_", " "))


def pattern_words(layer: Mapping[str, Any]) -> list[str]:
    """What the pattern of a layer is, fact by fact, so that nobody mistakes one kind of map for another."""
    record = layer.get("pattern") or {}
    signed, total = record.get("signed", layer.get("form") != "softmax"), record.get("rows_sum_to")
    kind = record.get("kind", "weights")
    noun = "weights" if kind == "weights" else "values"
    facts = [f"signed {noun}" if signed else f"no negative {noun}"]
    facts.append("rows do not sum to 1" if total is None else f"rows sum to {total:g}")
    if kind != "weights":
        facts.append(PATTERN_KIND_WORDS.get(kind, kind.replace("_", " ")))
    elif record.get("effective"):
        facts.append("effective: not formed by the model, but map × values is exactly what it computes"
                     if record.get("exact") else "effective and approximate")  # fmt: skip
    elif record.get("exact", True):
        facts.append("exact")
    if record.get("columns") not in (None, "tokens", "token"):
        facts.append(f"columns are {record['columns']}")
    if layer.get("n_columns"):
        facts.append("every token sees the whole source")
    elif record.get("causal", True):
        facts.append("causal, a token never reads itself" if layer.get("strict") else "causal")
    else:
        facts.append("reads in both directions")
    if layer.get("window"):
        facts.append(f"window of {layer['window']} tokens")
    if layer.get("alibi_slopes"):
        facts.append("ALiBi distance bias")
    if record.get("label"):
        facts.append(str(record["label"]))
    facts += [sentence.rstrip(".") for sentence in layer.get("not_stored") or []]
    if layer.get("n_key_heads", layer["n_heads"]) != layer["n_heads"]:
        groups = layer["n_key_heads"]
        facts.append(f"{layer['n_heads']} heads share {groups} key group{'' if groups == 1 else 's'}")
    return facts


def cell_word(layer: Mapping[str, Any]) -> str:
    """What a cell of the layer's pattern is: a weight, unless the map holds norms of derivatives."""
    return "Jacobian norm" if (layer.get("pattern") or {}).get("kind") == "jacobian" else "weight"


def is_signed(layer: Mapping[str, Any]) -> bool:
    """Whether the layer's pattern has negative weights."""
    return bool((layer.get("pattern") or {}).get("signed", layer.get("form") != "softmax"))


def memory_words(layer: Mapping[str, Any]) -> str:
    """What a layer carries from token to token, in one sentence."""
    state, form = layer.get("state"), layer.get("form")
    if form == "softmax":
        window = layer.get("window")
        kept = f"of the last {window} tokens" if window else "of every token so far"
        return f"Softmax attention has no fixed-size state: its memory is the KV cache, the key and the value {kept}."
    if layer.get("n_columns"):
        return f"Cross-attention carries the keys and values of the source's {layer['n_columns']} tokens, made once."
    if not state and not (layer.get("pattern") or {}).get("causal", True):
        return "This layer reads in both directions: it is computed for the whole text at once and hands nothing on from token to token."
    if not state and layer.get("kind") == "attention":
        return (
            "What this layer hands on are the keys and values that later tokens may still read, not a state of fixed size. "
            "The Attention page shows which these are."
        )
    if not state:
        return "This layer records no state."
    slots = layer.get("states") or [{"name": "state", "shape": state["shape"]}]
    parts = [
        _size_words(slot["shape"][1:]) + (f" ({slot_words(slot['name'])})" if len(slots) > 1 else "") for slot in slots
    ]
    who = "The layer" if is_shared(slots[0], layer) else "Each head"
    return f"{who} carries {spoken_list(parts)} from token to token, whatever the length of the text."


def _size_words(shape: Sequence[int]) -> str:
    if not shape:
        return "a number"
    return f"{'a vector' if len(shape) == 1 else 'a matrix'} of {' × '.join(map(str, shape))} numbers"


def is_shared(slot: Mapping[str, Any], layer: Mapping[str, Any]) -> bool:
    """Whether all heads of a layer share one state."""
    return slot["shape"][0] == 1 < layer.get("n_heads", 1)


def slot_words(name: str) -> str:
    """What a reader chooses a state by: its name in the literature and in the hook points."""
    return "main state" if name == "state" else name.replace("_", " ")


SPOKEN_AXES = {"state_k": "key channel", "state_v": "value channel", "state_n": "mode"}
"""Axes of states whose names in the vocabulary are no words; the others are said as they are."""


def state_axes(slot: Mapping[str, Any], neurons: bool = False) -> list[str]:
    """What the axes of a state are, in words, without that of the heads. `neurons`: its rows are neurons, which act as keys."""
    spoken = {**SPOKEN_AXES, **({"state_k": "neuron"} if neurons else {})}
    return [spoken.get(axis, axis.replace("_", " ")) for axis in slot.get("axes", [])[1:]]


def row_and_column(axes: Sequence[str]) -> tuple[str, str]:
    """The two axes of a state as it is drawn: all but the last axis are joined into the rows; a vector is one column."""
    if len(axes) < 2:
        return (axes[0] if axes else ""), ""
    return " × ".join(axes[:-1]), axes[-1]


def spoken_list(items: Sequence[str]) -> str:
    """`a, b and c`."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1] if items else ""
