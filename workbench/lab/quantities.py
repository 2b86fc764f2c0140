"""Special quantities of a run: what only some models compute (λ, gates, halting, depth weights, clusters, token types, block weights, …).

Every hook point whose role is not one of the `ORDINARY` ones is such a quantity, so a new part's is kept and shown without being listed
anywhere; `WORDS` merely gives some of them better names. Nothing here needs torch: the dashboard reads runs with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

_ORDINARY = """
    embed pos_embed step_embed degree_embed token_types resid resid_mid resid_post resid_sum norm_scale normalized
    query key value rotated_query rotated_key unit_query unit_key normalised_query query_input key_input value_input
    query_base key_base query_low_rank key_low_rank retrieval_query attention_query attention_key attention_value attention_z
    scores content_scores memory_scores mask pattern channel_pattern result z
    mixer_input mixer_out mixer_out_pre mlp_input mlp_pre mlp_pre_linear
    mlp_post mlp_out expert_post expert_out gate_pre neuron neuron_pre neuron_gated neuron_added logits unembed_input
    state memory_input retrieved conv skip drive pseudo_value symbols depth_average write_feature read_feature
    type_logits region_scores router_scores output head_pre head_post
"""
# What every model has, or what is a vector to be looked at with other means, or what a kept quantity is made of.
ORDINARY = frozenset(_ORDINARY.split())
BIASES = frozenset(("position_bias", "score_bias"))  # named terms that are added to scores
# Vectors whose size is the quantity; of other vectors the mean is.
SIZES = frozenset(("low_state", "high_state", "local_z", "memory_z", "z_relations"))

WORDS: dict[str, tuple[str, str]] = {
    "alignment": ("Alignment of values", "What each place's value becomes a mixture of before anybody reads it."),
    "attention": ("Attention beside the memory", "Weights of every token over memory slots and tokens."),
    "block_gate": (
        "Weight of every block",
        "How much of each earlier block a token reads through its landmark; the last is its own.",
    ),
    "closeness": ("Closeness", "1 where query and key coincide, less the farther apart they are."),
    "context_count": ("Tokens counted", "How many tokens each head has counted when it reaches the reading token."),
    "context_gate": ("What heads count", "The gate of every pair: whether the source counts towards the distance."),
    "context_position": ("Contextual positions", "How far away a source is, in tokens that the head counts."),
    "decay": ("Decay", "Logarithm of the share of the memory that a token leaves."),
    "denominator": ("Denominator", "What each row is divided by."),
    "depth_weights": (
        "Depth weights (DWA)",
        "What each earlier output counts in what the next block reads: row 0 is the embedding, the last row the newest.",
    ),
    "forget_gate": ("Forget gate", "Before its activation: large keeps the memory."),
    "gate": ("Gate", "How much is let through."),
    "gates": ("Gates of the cell", "Every gate of the cell, each the mean over its units."),
    "halting": ("Halting", "Probability of stopping behind each step, having reached it."),
    "high_state": ("Slow state", "Size of the slow stack's state behind each of its runs."),
    "importance": ("Importance of tokens", "What every row is weighed by once more."),
    "input_gate": ("Input gate", "Large writes the token strongly."),
    "key_affinity": (
        "Clusters of keys",
        "How near each token's key is to each cluster's centre; it belongs to the nearest.",
    ),
    "key_phase": ("Frequencies of keys", "What each frequency of the kernel makes of a key."),
    "lambda": ("λ", "Share of the second map that is subtracted from the first."),
    "layout_scores": (
        "Scores of the layout",
        "How places on the page match: the one map of all layers, before the softmax.",
    ),
    "level": ("Weight of every level", "With what weight a token reads each level of the past."),
    "local_z": ("What the segment gives", "Size of what attention within the segment contributes, before the gate."),
    "low_state": ("Fast state", "Size of the fast stack's state behind each of its runs."),
    "match": ("Match", "Whether a source agrees with the reading token (1) or contradicts it (−1)."),
    "memory_loss": ("Loss of the memory", "How badly the memory recalls a token before it learns it."),
    "memory_pattern": (
        "Weight of every memory slot",
        "How much of each slot of the memory a token reads; its own segment gets the rest.",
    ),
    "memory_z": ("What the memory gives", "Size of what is read from the memory, before the gate."),
    "momentum_decay": ("Decay of the momentum", "Logarithm of the share of the momentum that a token leaves."),
    "position_bias": ("Position bias", "The term that positions add to the scores."),
    "position_code": ("Codes of positions", "What the transformer over digits gives for every position."),
    "query_affinity": (
        "Clusters of queries",
        "How near each token's query is to each cluster's centre; it reads the nearest.",
    ),
    "query_phase": ("Frequencies of queries", "What each frequency of the kernel makes of a query."),
    "raw_pattern": ("Map before reweighting", "The softmax map of which the pattern is made."),
    "recurrence_gate": ("Recurrence gate", "How much of the state a token takes away."),
    "region_pattern": ("Weight of every region", "What each earlier region as a whole is given."),
    "relations": ("Relations", "How strongly each pair of tokens is related."),
    "router": ("Experts chosen", "The weight of each expert; 0 where it was not chosen."),
    "score_bias": ("Score bias", "A named term that is added to the scores."),
    "score_hidden": ("Hidden units of the score", "Mean of the small network's units for each pair."),
    "slot_pattern": (
        "Weight of every compressed slot",
        "How much of each slot a token reads; 0 for slots it does not read.",
    ),
    "slot_weights": ("Reading of slots", "How much of each slot of the memory a token reads; the sum over slots is 1."),
    "step_weight": (
        "Weight of every step (ponder map)",
        "What each step's state counts in the output; its sum over steps is 1.",
    ),
    "surprise": ("Surprise", "How much a token differs from what the memory recalls."),
    "symbol_pattern": ("Symbols chosen", "Which symbol each token is given."),
    "token_type": (
        "Token types",
        "Row 0: global, read by all; row 1: local, until the next local one; row 2: sliding, within the window.",
    ),
    "within_region": ("Share within the region", "How a region's weight is split among its tokens."),
    "write": ("Write strength", "How strongly a token is written."),
    "writing_pattern": (
        "What is written into each slot",
        "The weight of each token for each slot of the memory, when the token's segment is full and written; the memory gets the rest.",
    ),
    "z_relations": ("What relations give", "Size of what relational heads contribute."),
}

# What one number of a role is, for the colour bar; of others the bar says "value".
UNITS = {
    **dict.fromkeys(("position_bias", "score_bias"), "added to the score, nats"),
    **dict.fromkeys(("halting", "lambda", "context_gate", "recurrence_gate", "raw_pattern"), "share"),
    **dict.fromkeys(("gate", "input_gate", "forget_gate"), "gate"),
    **dict.fromkeys(("step_weight", "depth_weights", "block_gate", "region_pattern", "within_region"), "weight"),
    **dict.fromkeys(
        ("attention", "memory_pattern", "writing_pattern", "router", "symbol_pattern", "importance", "level"), "weight"
    ),
    **dict.fromkeys(("slot_pattern", "slot_weights", "alignment"), "weight"),
    "layout_scores": "score, nats",
    **dict.fromkeys(("context_position", "context_count"), "tokens"),
    **dict.fromkeys(("query_affinity", "key_affinity"), "cosine"),
    **dict.fromkeys(SIZES, "L2 norm"),
    **dict.fromkeys(("decay", "momentum_decay"), "nats per token"),
    "token_type": "1: is of this type",
}


@dataclass(frozen=True)
class Quantity:
    """One special quantity of a run.

    Args:
        name: what it is called in the run: its hook point, or a signal's array. label, words: its title, and a sentence.
        layer: None where it belongs to the model as a whole. array: [which, row, column], "" where it was not kept.
        axes: names of the three. why: in words, why it was not kept. notes: how the array was made of the tensor, in words.
        unit: what one number is. row_shape: sizes of what the rows count, where these are several things.
    """

    name: str
    label: str
    words: str
    layer: int | None
    array: str
    axes: tuple[str, str, str]
    why: str = ""
    notes: tuple[str, ...] = ()
    unit: str = "value"
    row_shape: tuple[int, ...] = ()


def title_of(role: str) -> tuple[str, str]:
    """(title, sentence) of a role."""
    plain = role.replace("_", " ")
    return WORDS.get(role, (plain[:1].upper() + plain[1:], "A quantity that this model's parts compute."))


def run_quantities(manifest: Mapping[str, Any], layer: int | None = None) -> list[Quantity]:
    """The special quantities of a run, those of the whole model first; of one layer and the whole model if `layer` is given.

    Signals that layers store per head and token, and write strengths, are among them.
    """
    found = [_recorded(record) for record in manifest.get("quantities") or ()]
    for record in manifest.get("layers") or ():
        found += _signals(record, manifest["arrays"])
    chosen = [each for each in found if layer is None or each.layer in (None, layer)]
    return sorted(_told_apart(chosen), key=lambda each: -1 if each.layer is None else each.layer)


def _recorded(record: Mapping[str, Any]) -> Quantity:
    label, words = title_of(str(record["role"]))
    part = str(record.get("part") or "")
    if record["role"] in BIASES:  # the score maps of the layer go by the same names
        label = f"{label}: {_place_of(str(record['point']))}"
    return Quantity(
        str(record["point"]), f"{label} ({part})" if part else label, words, record["layer"], str(record.get("array") or ""),
        tuple(record["axes"]), str(record.get("why") or ""), tuple(record.get("notes") or ()),
        UNITS.get(str(record["role"]), "value"), tuple(record.get("row_shape") or ()),
    )  # fmt: skip


def _signals(record: Mapping[str, Any], arrays: Mapping[str, Any]) -> list[Quantity]:
    """What a layer's record stores per head and token."""
    index, axes = int(record["layer"]), ("one", "head", "pos")
    signals = record.get("signals") or ()
    found, write = [], f"layer.{index}.write"
    if write in arrays and write not in {signal["array"] for signal in signals}:
        found.append(Quantity(write, *title_of("write"), index, write, axes, unit="write strength"))
    for signal in signals:
        name, label = signal["array"], str(signal.get("label") or signal["name"])
        if len(arrays[name]["shape"]) == 2:
            title = label[:1].upper() + label[1:] if label[:1].isascii() else label
            unit = str(signal.get("unit") or UNITS.get(signal["name"], "value"))
            words = WORDS[signal["name"]][1] if signal["name"] in WORDS else "One number per head and token."
            found.append(Quantity(name, title, words, index, name, axes, unit=unit))
    return found


def _told_apart(found: Sequence[Quantity]) -> list[Quantity]:
    """Quantities of one title in one layer are called by their part, or by their hook point, as well."""
    counts = Counter((each.layer, each.label) for each in found)
    return [
        replace(each, label=f"{each.label}: {_place_of(each.name)}") if counts[each.layer, each.label] > 1 else each
        for each in found
    ]


def _place_of(name: str) -> str:
    """`after layer 2` for `wiring.after.2.hook_weights`, `bam` for `….bias.bam.hook_bias`, `first` for `….hook_first`."""
    *owners, own = name.split(".")
    if own in ("hook_bias", "hook_weights") and owners:
        return (
            f"{owners[-2]} layer {owners[-1]}"
            if owners[-1].isdigit() and len(owners) > 1
            else owners[-1].replace("_", " ")
        )
    return own.removeprefix("hook_").replace("_", " ")
