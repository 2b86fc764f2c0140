"""Results of the search for concept synapses: plain records that print, show in notebooks, and go to JSON and CSV."""

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from probes.bdh.capture import Synapse
from probes.bdh.concepts_statistics import Interval
from workbench.instrument.html import table

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """One synapse: effect on the discovery sentences (partial correlation), all else on the validation sentences.

    auc, u, rank_biserial, p are of the length-adjusted statistic, auc_unadjusted of the statistic itself. q: over all candidates.
    """

    synapse: Synapse
    effect: float
    u: float
    auc: float
    rank_biserial: float
    p: float
    q: float
    auc_unadjusted: float

    def row(self) -> dict[str, Any]:
        """Flat, for tables."""
        synapse = self.synapse
        place = {
            "synapse": str(synapse),
            "source_layer": synapse.source_layer,
            "source_head": synapse.source[0],
            "source_neuron": synapse.source[1],
            "target_layer": synapse.target_layer,
            "target_head": synapse.target[0],
            "target_neuron": synapse.target[1],
        }
        return place | {
            name: getattr(self, name) for name in ("effect", "u", "auc", "rank_biserial", "p", "q", "auc_unadjusted")
        }


@dataclass(frozen=True)
class Scored:
    """A single number per sentence, chosen from `searched` ones on the discovery sentences and scored on the others.

    ahead: its AUC minus that of the best synapse. interval, ahead_interval: 95 % bootstrap over sentences, or over whole groups.
    """

    name: str
    chosen: str
    searched: int
    auc: float
    rank_biserial: float
    p: float
    interval: Interval
    ahead: float
    ahead_interval: Interval


@dataclass(frozen=True)
class Shuffles:
    """What the whole search finds when labels mean nothing.

    first: validation r of the discovery's first choice, best: the largest r of all candidates, significant: candidates with q ≤ 0.05;
    each [shuffle], with the observed value and p = (1 + shuffles at least as good) / (1 + shuffles). Trust p_first: it is one
    synapse named beforehand. p is nan without shuffles.
    """

    observed_first: float
    observed_best: float
    observed_significant: int
    first: Array
    best: Array
    significant: NDArray[np.int64]

    @classmethod
    def of(cls, observed: tuple[float, float, int], null: Sequence[tuple[float, float, int]]) -> "Shuffles":
        first, best, significant = (np.array([row[i] for row in null]) for i in range(3))
        return cls(*observed, first.astype(float), best.astype(float), significant.astype(np.int64))

    @property
    def p_first(self) -> float:
        return _share_as_good(self.first, self.observed_first)

    @property
    def p_best(self) -> float:
        return _share_as_good(self.best, self.observed_best)

    @property
    def p_significant(self) -> float:
        return _share_as_good(self.significant, self.observed_significant)


def _share_as_good(null: NDArray[Any], observed: float) -> float:
    return float((1 + (null >= observed).sum()) / (1 + len(null))) if len(null) else float("nan")


@dataclass(frozen=True)
class ConceptSynapses:
    """What `find_concept_synapses` found.

    Args:
        candidates: best on the discovery sentences first. scores: the best synapse and its rivals.
        shuffles: the control. searched: number of synapses. statistic, alternative, settings: as asked for.
        labels, discovery [sentence], groups: positive sentences first. values [sentence, candidate]: the adjusted statistic.
        notes: what to know before believing the numbers.
    """

    candidates: tuple[Candidate, ...]
    scores: tuple[Scored, ...]
    shuffles: Shuffles
    searched: int
    statistic: str
    alternative: str
    labels: NDArray[np.bool_]
    discovery: NDArray[np.bool_]
    groups: tuple[str, ...] | None
    values: Array
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def synapses(self) -> tuple[Synapse, ...]:
        """The candidates' synapses."""
        return tuple(candidate.synapse for candidate in self.candidates)

    def significant(self, q: float = 0.05) -> tuple[Candidate, ...]:
        """Candidates with at most this q."""
        return tuple(candidate for candidate in self.candidates if candidate.q <= q)

    def __len__(self) -> int:
        return len(self.candidates)

    def __repr__(self) -> str:
        lines = [
            f"ConceptSynapses({self.searched:,} synapses searched by {self.statistic}, {len(self)} candidates, "
            f"{len(self.significant())} with q ≤ 0.05 on {int((~self.discovery).sum())} held-out sentences)"
        ]
        for scored in self.scores:
            lines.append(f"  {scored.name}: {scored.chosen}, AUC {scored.auc:.3f} {scored.interval}, p {scored.p:.2g}")
        null = self.shuffles
        if len(null.first):
            lines.append(
                f"  {len(null.first)} shuffles: first choice r {null.observed_first:.2f} against {null.first.mean():.2f} "
                f"± {null.first.std():.2f}, p {null.p_first:.2g}"
            )
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        rivals = [
            (s.name, s.chosen, f"{s.auc:.3f} {s.interval}", f"{s.ahead:+.3f} {s.ahead_interval}", f"{s.p:.2g}")
            for s in self.scores
        ]
        best = [
            (c.synapse, f"{c.effect:.3f}", f"{c.auc:.3f}", f"{c.rank_biserial:.3f}", f"{c.p:.2g}", f"{c.q:.2g}")
            for c in self.candidates
        ]
        return (
            f"<p>{escape(repr(self).splitlines()[0])}</p>"
            + table("On the held-out sentences", ("what", "chosen", "AUC", "ahead of the synapse", "p"), rivals)
            + table("Candidates", ("synapse", "discovery effect", "AUC", "r", "p", "q"), best[:50])
            + "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        )

    def rows(self) -> list[dict[str, Any]]:
        """One flat record per candidate."""
        return [candidate.row() for candidate in self.candidates]

    def to_json(self) -> dict[str, Any]:
        """Everything but `values`, as plain data that `json.dumps` takes."""
        null = self.shuffles
        return {
            "candidates": self.rows(),
            "scores": [asdict(scored) for scored in self.scores],
            "shuffles": {
                "observed": [null.observed_first, null.observed_best, null.observed_significant],
                "first": null.first.tolist(),
                "best": null.best.tolist(),
                "significant": null.significant.tolist(),
                "p": [_or_none(p) for p in (null.p_first, null.p_best, null.p_significant)],
            },
            "searched": self.searched,
            "statistic": self.statistic,
            "alternative": self.alternative,
            "labels": self.labels.tolist(),
            "discovery": self.discovery.tolist(),
            "groups": None if self.groups is None else list(self.groups),
            "notes": list(self.notes),
            "settings": self.settings,
        }

    def save(self, path: str | Path) -> Path:
        """Write the candidates as .csv, or everything as .json; complete or not at all. Raises ValueError for another suffix."""
        path = Path(path)
        if path.suffix == ".json":
            return _written(path, lambda file: json.dump(self.to_json(), file, indent=1))
        if path.suffix == ".csv":
            return _written(path, lambda file: _write_rows(file, self.rows()))
        raise ValueError(f"{path.name!r} has suffix {path.suffix!r}; expected .csv or .json.")


def _or_none(number: float) -> float | None:
    return None if np.isnan(number) else number


def _write_rows(file: Any, rows: list[dict[str, Any]]) -> None:
    blank = Candidate(Synapse((0, 0), (0, 0), 1), *[0.0] * 7)
    writer = csv.DictWriter(file, list(blank.row()))
    writer.writeheader()
    writer.writerows(rows)


def _written(path: Path, write: Any) -> Path:
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8", newline="") as file:
            write(file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path
