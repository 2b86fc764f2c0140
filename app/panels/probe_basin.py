"""Where in the prompt the chosen head reads: the profile over segments of which the basin's depth is the score."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import plotly.graph_objects as go

from app.figures.common import number
from app.figures.probes import segment_profile
from app.panels.base import NothingToShow, Table
from app.panels.probe_scores import ProbePanel, in_the_form, row_names
from app.services import Scene
from app.theme import Theme


class ProbeBasin(ProbePanel):
    """Weight per token of the chosen head on each segment."""

    probe = "basin"
    id = "probe-segments"
    title = "Where in the prompt it reads"
    words = "Mean weight per token that the last 8 tokens put on each of 8 equal segments; line: the mean of all heads."
    height = 250
    depends = ("run", "result", "score", "measured_head")

    def record(self, scene: Scene) -> dict[str, Any]:
        """What the probe found. NothingToShow, in its words, where it was not asked or has no answer."""
        self.check(scene)
        record: dict[str, Any] | None = self.results(scene).get(self.probe)
        if record is None:
            raise NothingToShow("Not asked for", "The attention basin was not among the probes that were measured.")
        if record.get("reason"):
            raise NothingToShow("No answer", in_the_form(str(record["reason"])))
        return record

    def place(self, scene: Scene) -> tuple[int, int]:
        """Row and head in the profile's own layers."""
        labels = self.record(scene)["layer_labels"]
        row, head = self.head(scene)
        label = row_names(self.result(scene), self.score(scene))[row]
        if label not in labels:
            raise NothingToShow("No profile", f"Layer {label} has no pattern whose segments could be weighed.")
        return labels.index(label), head

    def density(self, scene: Scene) -> np.ndarray:
        """Weight per token, [layer, head, segment]."""
        record = self.record(scene)
        return np.array(record["weights"], dtype=float) / np.array(record["lengths"])

    def values(self, scene: Scene) -> np.ndarray:
        row, head = self.place(scene)
        return np.asarray(self.density(scene)[row, head])

    def segments(self, scene: Scene) -> list[str]:
        """First and last token of each segment."""
        edges = accumulate(self.record(scene)["lengths"], initial=0)
        return [f"{start}–{stop - 1}" for start, stop in pairwise(edges)]

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        mean = np.array(self.record(scene)["profile"], dtype=float)
        return segment_profile(self.values(scene), mean, self.segments(scene), theme, panel=self.id)

    def table(self, scene: Scene) -> Table:
        lines = zip(self.segments(scene), self.values(scene), self.record(scene)["profile"], strict=True)
        return ["tokens", "this head", "mean of all heads"], (
            [name, float(own), float(mean)] for name, own, mean in lines
        )

    def facts(self, scene: Scene) -> list[str]:
        row, head = self.place(scene)
        record = self.record(scene)
        depth = record["basin"][row][head]
        name = f"head {record['layer_labels'][row]}.{head}"
        return [name] if depth is None else [name, f"depth of the basin {number(depth)}"]

    def snippet_body(self, scene: Scene) -> str:
        row, head = self.place(scene)
        return f"{self.again(scene, self.probe)}\nvalues = found.density[{row}, {head}]"


BASIN = ProbeBasin()
