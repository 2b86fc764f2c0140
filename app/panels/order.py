"""Panels of the Order page: what each document gets at each place, and how likely the answer is in each order."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from app.figures.common import Axis, Colours, number, picture
from app.figures.synapses import ranked_bars
from app.measure.order import KIND
from app.panels.base import NothingToShow, PicturePanel, Span, Table
from app.panels.results import OfResult, ResultPanel
from app.services import Scene
from app.theme import Theme
from workbench.lab.pooling import pool

AGAIN = """
from probes.document_order import plan_order

asked = run.manifest["settings"]
found = plan_order(models.load(asked["model"]), asked["documents"], asked["question"],
                   answer=asked["answer"], rounds=asked["rounds"], bases=asked["bases"])
"""
START = "Give documents and a question on this page and press Start."


class Mass(OfResult, PicturePanel):
    """Attention on every document at every place."""

    id = "order-mass"
    title = "What each document gets at each place"
    words = (
        "Weight of the last token on a document, mean over layers and heads. Every document visits every place once."
    )
    kind, start = KIND, START

    def pixels_high(self, scene: Scene) -> int:
        return 120 + min(28 * self.shape(scene)[0], 420)

    def shape(self, scene: Scene) -> tuple[int, int]:
        rows, columns = self.array(scene, "mass").shape
        return rows, columns

    def block(self, scene: Scene, rows: Span, columns: Span) -> np.ndarray:
        return self.array(scene, "mass")[slice(*rows), slice(*columns)]

    def pooled(self, scene: Scene, size: int) -> np.ndarray:
        return pool(self.array(scene, "mass"), size, size, "max")

    def colours(self, scene: Scene, theme: Theme) -> Colours:
        return Colours(theme.table_name(False), float(self.array(scene, "mass").max()), "linear", False, "weight")

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        rows, columns = self.shape(scene)
        figure = picture(
            self.address(scene, theme), Axis("place in the prompt", columns), Axis("document", rows), (0, columns), (0, rows),
            self.colours(scene, theme), theme, panel=self.id,
        )  # fmt: skip
        for update, count in ((figure.update_xaxes, columns), (figure.update_yaxes, rows)):
            update(tickvals=[at + 0.5 for at in range(count)], ticktext=[str(at) for at in range(count)])
        return figure

    def place(self, scene: Scene, row: int, column: int) -> list[tuple[str, str]]:
        return [("document", f"{row}: {self.results(scene)['documents'][row].strip()[:40]}"), ("at place", str(column))]

    def facts(self, scene: Scene) -> list[str]:
        mass = self.array(scene, "mass")
        return [
            f"most read document: {int(mass.mean(1).argmax())}", f"most read place: {int(mass.mean(0).argmax())}",
            f"model {self.settings(scene)['model']}",
        ]  # fmt: skip

    def snippet_body(self, scene: Scene) -> str:
        return f"{AGAIN}values = found.mass  # document, place"


class Answers(ResultPanel):
    """How likely the answer is in each order."""

    id = "order-answers"
    title = "The answer in each order"
    words = "Log-probability of the answer's first token after the prompt, in nats; nearer to 0 is likelier."
    kind, start = KIND, START
    height = 260

    def _answers(self, scene: Scene) -> dict[str, float]:
        found = self.results(scene)["answers"]
        if not found:
            raise NothingToShow("No answer was asked for", "Type the answer's first token into the form.")
        return dict(found)

    def values(self, scene: Scene) -> np.ndarray:
        return np.array(list(self._answers(scene).values()))

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        found = self._answers(scene)
        figure = ranked_bars(
            list(found), np.array(list(found.values())), theme, panel=self.id, title="log-probability (nats)"
        )
        return figure.update_layout(margin={"l": 170, "r": 20, "t": 8, "b": 46})

    def table(self, scene: Scene) -> Table:
        return ["order", "log-probability (nats)"], ([name, value] for name, value in self._answers(scene).items())

    def summary(self, scene: Scene) -> str:
        found = self._answers(scene)
        best = max(found, key=lambda name: found[name])
        return f"The answer is likeliest in the order {best}, with {number(found[best])} nats."

    def snippet_body(self, scene: Scene) -> str:
        return f"{AGAIN}values = np.array(list(found.answers.values()))  # order"


PANELS = (Mass(), Answers())
