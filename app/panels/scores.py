"""Scores before they become weights, term by term: which maps a layer has, and the pinned token's row as lines.

Which terms there are follows from the hook points that the layer declares (`workbench.lab.score_maps`); no kind of attention is named here.
"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from app.figures.common import number, token_label, token_lines
from app.panels.attention_rows import reader_words
from app.panels.base import FigurePanel, NothingToShow, Table
from app.services import Scene, reads_source
from app.theme import Theme
from workbench.lab.score_maps import TOTAL, ScoreMaps, score_labels, terms_of

ROUNDING = 1e-3
"""A difference between the scores and the sum of their terms that is larger is more than rounding."""


def labels_of(scene: Scene) -> dict[str, str]:
    """The score maps of the chosen layer, {name: label}; {} where there are none."""
    return score_labels(scene.layer or {})


def check_map(scene: Scene, name: str = "") -> None:
    """NothingToShow where the chosen layer has no scores, or none of this name, with the layers that do."""
    labels = labels_of(scene)
    if name in labels or (labels and not name):
        return
    having = [
        str(layer["layer"]) for layer in scene.layers if (name in score_labels(layer) if name else score_labels(layer))
    ]
    elsewhere = f" Layers that have: {', '.join(having)}." if having else ""
    if name:
        raise NothingToShow(f"No {name} in this layer", f"Its scores are not made of such a term.{elsewhere}")
    raise NothingToShow(
        "No scores in this layer", f"Its weights are not made of scores that this run keeps.{elsewhere}"
    )


def score_maps(scene: Scene) -> ScoreMaps:
    """The score maps of the chosen layer; FactorError says why there are none."""
    layer = scene.view.layer
    return scene.once("score-maps", layer, make=lambda: ScoreMaps.from_run(scene.opened(), layer))


def stores_scores(scene: Scene) -> bool:
    """Whether the run keeps scores of the chosen layer as they were, so that they tell its masks too."""
    return bool(((scene.layer or {}).get("scores") or {}).get("maps"))


def sum_words(scene: Scene) -> str:
    """How the terms of the chosen layer make its scores, in one sentence; "" where scores are of one piece."""
    labels = labels_of(scene)
    terms = terms_of(labels)
    if not terms:
        return ""
    named = " + ".join(labels[name] for name in terms)
    difference = (scene.layer or {}).get("scores", {}).get("difference")
    if not difference:
        return f"scores = {named}, exactly"
    if difference <= ROUNDING:
        return f"scores = {named}, up to {number(difference)}"
    return f"scores are made of {named}, but something follows the sum (a soft cap): they differ from it by up to {number(difference)}"


def cell_scores(scene: Scene, row: int, column: int) -> list[tuple[str, str]]:
    """Every score of a pair of tokens in words, for the reading under the pointer."""
    labels = labels_of(scene)
    if not labels:
        return []
    found = score_maps(scene).at(scene.view.head, row, column)
    return [(labels[name], number(value)) for name, value in found.items() if np.isfinite(value)]


class ScoreRow(FigurePanel):
    """What the scores of the pinned token's row are made of."""

    id = "score-row"
    title = "What the pinned token's scores are made of"
    words = (
        "Before they become weights: the scores that the pinned token gives to each token, and the terms that they are the sum of. "
        "Under a softmax, a difference of 1 between two tokens is a factor of e between their weights."
    )
    depends = ("run", "part", "layer", "head", "query")
    height = 270

    def values(self, scene: Scene) -> np.ndarray:
        """[map, key]."""
        self.check(scene)
        check_map(scene)
        return np.stack(list(score_maps(scene).row(scene.view.head, scene.query).values()))

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        values, labels = self.values(scene), labels_of(scene)
        figure = token_lines(
            list(zip(labels.values(), values, strict=True)), scene.read_tokens, theme, y_title="score (nats)", panel=self.id,
            role="source" if reads_source(scene.layer) else "key", click="none" if reads_source(scene.layer) else "token",
            dashes=["solid" if name.partition("~")[0] == TOTAL else "dot" for name in labels], x_title="token that is read",
        )  # fmt: skip
        figure.update_traces(mode="lines+markers", marker_size=4)  # between masks a token may stand alone
        return figure

    def table(self, scene: Scene) -> Table:
        lines = self.values(scene).T
        labels = list(labels_of(scene).values())
        return ["token", *labels], (
            [token_label(scene.read_tokens, at), *map(float, line)] for at, line in enumerate(lines)
        )

    def facts(self, scene: Scene) -> list[str]:
        facts = [
            f"layer {scene.view.layer}",
            f"head {scene.view.head}",
            reader_words(scene),
        ]
        return [*facts, *([sum_words(scene)] if sum_words(scene) else [])]

    def snippet_body(self, scene: Scene) -> str:
        return f"""
from workbench.lab.score_maps import ScoreMaps
maps = ScoreMaps.from_run(run, {scene.view.layer})
values = np.stack(list(maps.row({scene.view.head}, {scene.query}).values()))  # one line for each of maps.labels
"""

    def summary(self, scene: Scene) -> str:
        labels, values = list(labels_of(scene).values()), self.values(scene)
        if not np.isfinite(values[0]).any():
            return "The pinned token sees no token."
        top = int(np.nanargmax(values[0]))
        parts = ", ".join(
            f"{label} {number(float(value))}" for label, value in zip(labels, values[:, top], strict=True)
        )
        return f"The token with the largest score is {token_label(scene.read_tokens, top)}: {parts}."
