"""What heads attend to whatever the words say: neighbours, special tokens, everything alike; which heads are alike (sections 3, 6)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from case_studies.bert_looks_at.encoder import is_punctuation, passages, special_places
from case_studies.harness.context import Context
from case_studies.harness.evidence import NotRun, Sample
from kernels.attention_statistics import label_features
from probes.census import cluster, jensen_shannon
from probes.heads import head_scores, weights_of
from probes.sinks import find_sinks
from probes.statistics import attention_statistics
from workbench.lab.stimuli import load_treebank

BATCH = 16
ALIKE = 16  # passages on which heads are compared with each other


def surface(context: Context, model: Any) -> dict[str, Any]:
    """Measurements on passages of the treebank's development part, each read as [CLS] passage [SEP]."""
    settings = context.settings
    texts = passages(model, load_treebank("dev"), settings["passages"], settings["passage_tokens"])
    tokens, mask = model.pad(texts, side="right")
    context.progress(0.1, "neighbours")
    neighbours = head_scores(model, tokens, ("previous_token", "next_token", "current_token"), mask=mask).weights
    context.progress(0.4, "special tokens and entropy")
    mass, entropy, first_row = special(model, tokens, mask)
    context.progress(0.6, "lengths of values at sinks")
    values = values_at_sinks(model, tokens[:BATCH], mask[:BATCH])
    context.progress(0.7, "which heads are alike")
    distances = alike(context, model, tokens[:ALIKE], mask[:ALIKE])
    by_layer = {name: value.mean((0, 2)) for name, value in mass.items()}  # [layer]
    middle = slice(1, max(2, len(by_layer["cls"]) - 1))
    strongest = max(("cls", "sep"), key=lambda name: by_layer[name][middle].mean())
    longest = np.log(mask.sum(1).numpy())
    return {
        "previous_heads": float((neighbours["previous_token"] > 0.5).sum()),
        "next_heads": float((neighbours["next_token"] > 0.5).sum()),
        "sep_largest_layer": Sample(mass["sep"][:, by_layer["sep"].argmax()].mean(1).tolist(), over="passages"),
        "special_middle": Sample(mass[strongest][:, middle].mean((1, 2)).tolist(), over="passages"),
        "sep_over_cls": Sample((mass["sep"] - mass["cls"])[:, middle].mean((1, 2)).tolist(), over="passages"),
        "sink_values": Sample(values.tolist(), over="heads") if len(values) else NotRun("no head has a sink"),
        "first_layer_broader": Sample(
            ((entropy[:, 0] - entropy[:, 1:].mean(1)).mean(1) / longest).tolist(), over="passages"
        ),
        "cls_broad_last": Sample((first_row[:, -1].mean(1) / longest).tolist(), over="passages"),
        "same_layer_closer": Sample(same_layer_closer(distances, model.n_layers).tolist(), over="passages"),
        "previous": neighbours["previous_token"],
        "next": neighbours["next_token"],
        "own": neighbours["current_token"],
        **{f"mass_{name}": value.mean(0) for name, value in mass.items()},
        "entropy": entropy.mean(0),
        "cls_entropy": first_row.mean(0),
        "distance": distances.mean(0),
        "clusters": cluster(distances.mean(0), 8),
        "facts": {
            "passages": len(texts),
            "tokens": int(mask.sum()),
            "strongest": strongest,
            "chance": float((1 / mask.sum(1)).mean()),
            "chance_punctuation": float((is_punctuation(model, tokens) & mask).sum() / mask.sum()),
            "largest_previous": largest(neighbours["previous_token"]),
            "largest_next": largest(neighbours["next_token"]),
            "largest_sep": largest(mass["sep"].mean(0)),
            "largest_cls": largest(mass["cls"].mean(0)),
        },
    }


def special(
    model: Any, tokens: torch.Tensor, mask: torch.Tensor
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Mean weight on [CLS], [SEP] and punctuation, and the mean entropy of rows and that of [CLS]'s row in nats, [passage, layer, head]."""
    names = ("cls", "sep", "punctuation")
    mass: dict[str, list[np.ndarray]] = {name: [] for name in names}
    entropy, first_row = [], []
    for start in range(0, len(tokens), BATCH):
        some, real = tokens[start : start + BATCH], mask[start : start + BATCH]
        first, last = special_places(some, real)
        labels = torch.where(is_punctuation(model, some) & real, 2, -1)
        labels[torch.arange(len(some)), first] = 0
        labels[torch.arange(len(some)), last] = 1
        found = attention_statistics(
            model, some, statistics=["entropy"], mask=real, features=label_features(labels, 3), whole_patterns=True
        ).values()
        for number, name in enumerate(names):
            mass[name].append(np.stack([f.mean("features")[..., number].numpy() for f in found], 1))
        entropy.append(np.stack([f.mean("entropy").numpy() for f in found], 1))
        rows = [f.need("entropy")[torch.arange(len(some)), :, first].numpy() for f in found]
        first_row.append(np.stack(rows, 1))
    return (
        {name: np.concatenate(parts) for name, parts in mass.items()},
        np.concatenate(entropy),
        np.concatenate(first_row),
    )


def values_at_sinks(model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """Length of the value read at a head's sinks over the median length, one number per head that has a sink."""
    ratio = find_sinks(model, tokens, mask=mask, whole_patterns=True).value_ratio
    return ratio[np.isfinite(ratio)]


def alike(context: Context, model: Any, tokens: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
    """Jensen–Shannon distance between heads, in each passage, [passage, head, head]."""
    found = []
    for row in range(len(tokens)):
        context.progress(0.7 + 0.3 * row / len(tokens), f"which heads are alike, passage {row + 1} of {len(tokens)}")
        with torch.no_grad():
            patterns = model.patterns(tokens[row : row + 1, : int(mask[row].sum())])
        every = torch.cat([weights_of(pattern)[0] for pattern in patterns.values()], 1)
        found.append(jensen_shannon(every).sqrt().numpy())
    return np.stack(found)


def same_layer_closer(distances: np.ndarray, n_layers: int) -> np.ndarray:
    """Mean distance between heads of different layers less that within layers, [passage]. distances [passage, head, head]."""
    layer = np.repeat(np.arange(n_layers), distances.shape[1] // n_layers)
    same = layer[:, None] == layer
    other_head = ~np.eye(len(layer), dtype=bool)
    return distances[:, ~same].mean(1) - distances[:, same & other_head].mean(1)


def largest(scores: np.ndarray) -> dict[str, Any]:
    """Where a score [layer, head] is largest."""
    layer, head = (int(i) for i in np.unravel_index(scores.argmax(), scores.shape))
    return {"layer": layer, "head": head, "score": float(scores[layer, head])}
