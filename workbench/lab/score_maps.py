"""Scores of one layer of a run before its softmax, term by term: what content gives each pair of tokens, and what every named term adds.

    maps = ScoreMaps.from_run(store.open(run_id), layer=1)
    maps.labels                                          # {"scores": "scores", "content": "content", "bias.alibi": "bias.alibi"}
    maps.tile("content", head=0, queries=slice(0, 64))   # exact, [query, key]; nan where the row cannot see
    maps.at(head=0, query=12, key=3)                     # every map at one pair

Where factors determine the pattern (`form = softmax`) they determine these too, at any length. Other layers store them as the pass had them
(`workbench.lab.score_arrays`), for texts that are not too long. Which there are follows from the hook points that the layer declares: its
scores, their content, and each bias by its name. numpy only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np

from workbench.lab.factors import LayerFactors
from workbench.lab.pattern_factors import FactorError, Positions
from workbench.lab.pooling import pool
from workbench.lab.run_folder import Run
from workbench.lab.run_format import did_you_mean

TOTAL = "scores"
CONTENT = "content"


def score_labels(layer: Mapping[str, Any]) -> dict[str, str]:
    """{name: what it is called} of the score maps that a layer's record promises, the sum first; {} where there are none."""
    stored = (layer.get("scores") or {}).get("maps")
    if stored:
        return {str(record["name"]): str(record["label"]) for record in stored}
    if layer.get("form") != "softmax":
        return {}
    return {name: name for name in ((TOTAL, CONTENT, "bias.alibi") if layer.get("alibi_slopes") else (TOTAL,))}


def run_score_labels(layers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The same of all layers of a run together; not every layer need have each."""
    return {name: label for layer in layers for name, label in score_labels(layer).items()}


class ScoreMaps:
    """The score maps of one layer.

    Args:
        factors, layer: the layer's factors and its record. arrays: stored maps by name, [head, query, key], nan where a row cannot see.
    """

    def __init__(self, factors: LayerFactors, layer: Mapping[str, Any], arrays: Mapping[str, np.ndarray]):
        self.factors, self.labels = factors, score_labels(layer)
        self._arrays = arrays

    @classmethod
    def from_run(cls, run: Run, layer: int) -> Self:
        """The score maps of layer `layer` of a trace run. FactorError where the run has none, with the reason."""
        record = run.layer(layer)
        kept = record.get("scores") or {}
        if not score_labels(record):
            why = kept.get("why") or "its pattern is not made of scores that a run keeps"
            raise FactorError(f"layer {layer} ({record['kind']}) has no score maps: {why}")
        arrays = {each["name"]: run.array(each["array"]) for each in kept.get("maps") or ()}
        return cls(LayerFactors.from_run(run, layer), record, arrays)

    def tile(self, name: str, head: int, queries: Positions = slice(None), keys: Positions = slice(None)) -> np.ndarray:
        """One map at `queries` × `keys`: float32 [query, key], nan where a row cannot see. FactorError for an unknown name."""
        if name not in self.labels:
            raise FactorError(
                f"layer {self.factors.index} ({self.factors.kind}) has no score map {name!r}.{did_you_mean(name, self.labels)}"
            )
        if name in self._arrays:
            head, rows, columns = self.factors.places(head, queries, keys)
            return np.asarray(self._arrays[name][head][np.ix_(rows, columns)], dtype=np.float32)
        parts = self.factors.score_terms(head, queries, keys)
        total = sum(parts.values()) if name == TOTAL else parts[name]
        return np.where(self.factors.visible(queries, keys), total, np.nan).astype(np.float32)

    def scored(self, head: int, queries: Positions = slice(None), keys: Positions = slice(None)) -> np.ndarray:
        """Which pairs have a score, because the row can see that token: bool [query, key]."""
        return np.isfinite(self.tile(next(iter(self.labels)), head, queries, keys))

    def overview(self, name: str, head: int, size: int, queries: Positions, keys: Positions, kind: str) -> np.ndarray:
        """One map pooled to at most `size` × `size`: float32, nan where no cell of a bin can be seen. `kind` as in `pool`."""
        return pool(self.tile(name, head, queries, keys), size, size, kind)

    def at(self, head: int, query: int, key: int) -> dict[str, float]:
        """Every map at one pair of tokens, {name: score}; nan where the token cannot be seen."""
        return {name: float(self.tile(name, head, [query], [key])[0, 0]) for name in self.labels}

    def row(self, head: int, query: int) -> dict[str, np.ndarray]:
        """Every map in the row of one reading token, {name: float32 [key]}."""
        return {name: self.tile(name, head, [query])[0] for name in self.labels}


def terms_of(labels: Iterable[str]) -> list[str]:
    """The summands among the names of score maps."""
    return [name for name in labels if name.partition("~")[0] != TOTAL]
