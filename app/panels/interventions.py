"""Panels of the Intervene page: change of loss per token, of the next token, and of the mean loss, against matched random edits."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from app.figures.common import number, token_label, token_lines
from app.figures.concepts import null_points
from app.figures.synapses import ranked_bars
from app.measure.interventions import KIND
from app.panels.base import NothingToShow, Table
from app.panels.results import ResultPanel
from app.services import Scene
from app.theme import Theme

MOST_BARS = 16


class InterventionPanel(ResultPanel):
    """A panel over a run basket."""

    kind = KIND

    def model_lines(self, scene: Scene) -> str:
        """Python that reads the basket and the model again."""
        return f"""
from app.measure.basket import parse_basket
from app.measure.interventions import effect_of, twins_of

model, text, asked = models.load("{self.result(scene).model["name"]}"), run.manifest["text"], run.manifest["settings"]
edits = parse_basket(asked["basket"], model.to_tokens(text).shape[1])
""".strip()


class LossChange(InterventionPanel):
    """What the edits do to the loss of every token."""

    id = "intervene-loss"
    title = "Change of the loss, token by token"
    words = "Above 0: the token became more surprising. Beside it the mean of matched random edits, and two standard deviations above it."
    height = 290

    def values(self, scene: Scene) -> np.ndarray:
        return self.array(scene, "loss")

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        values, controls = self.values(scene), self.array(scene, "controls")
        if len(values) != scene.n_tokens:
            raise NothingToShow(
                "This result is of another text", "Open the run that it was made from, in the bar above."
            )
        spread = controls.std(0, ddof=1) if len(controls) > 1 else np.zeros(len(values))
        series = [
            ("edited", values),
            ("random edits, mean", controls.mean(0)),
            ("mean + 2 s.d.", controls.mean(0) + 2 * spread),
        ]
        return token_lines(
            series, scene.tokens, theme, y_title="nats", panel=self.id, selected=0, dashes=["solid", "dash", "dot"]
        )

    def table(self, scene: Scene) -> Table:
        values, controls = self.values(scene), self.array(scene, "controls")
        names = (
            [token_label(scene.tokens, t) for t in range(len(values))]
            if len(values) == scene.n_tokens
            else list(map(str, range(len(values))))
        )
        headers = ["token", "edited", *(f"random {draw + 1}" for draw in range(len(controls)))]
        return headers, ([names[t], float(values[t]), *map(float, controls[:, t])] for t in range(len(values)))

    def facts(self, scene: Scene) -> list[str]:
        return [
            f"mean {number(float(np.nanmean(self.values(scene))))} nats",
            *self.settings(scene)["basket"].splitlines()[:3],
        ]

    def snippet_body(self, scene: Scene) -> str:
        return f"{self.model_lines(scene)}\nvalues = effect_of(model, text, edits)[0]"


class NextChange(InterventionPanel):
    """What the edits do to the prediction at the pinned token."""

    id = "intervene-next"
    title = "Change of the next token's log p"
    words = "The tokens whose log-probability after the pinned token changed most."
    height = 320

    def values(self, scene: Scene) -> np.ndarray:
        return self.array(scene, "log_probs")

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        values, names = self.values(scene), self.results(scene)["vocab"]
        order = np.argsort(-np.abs(values), kind="stable")[:MOST_BARS]
        labels = [f"‘{names[i]}’" if names else str(i) for i in order.tolist()]
        return ranked_bars(labels, values[order], theme, panel=self.id, title="nats")

    def facts(self, scene: Scene) -> list[str]:
        return [f"after token {self.settings(scene)['at']}"]

    def snippet_body(self, scene: Scene) -> str:
        return f'{self.model_lines(scene)}\nvalues = effect_of(model, text, edits)[1][asked["at"]]'


class AgainstRandom(InterventionPanel):
    """The mean change beside that of matched random edits."""

    id = "intervene-random"
    title = "More than random edits do?"
    words = "Mean change of the loss: of the edits (line), and of each matched random basket (points)."
    height = 240

    def values(self, scene: Scene) -> np.ndarray:
        return np.nanmean(self.array(scene, "controls"), axis=1)

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        edited = float(np.nanmean(self.array(scene, "loss")))
        return null_points(
            self.values(scene),
            edited,
            theme,
            panel=self.id,
            title="mean Δloss, nats",
            name="draw",
            x_title="random basket",
        )

    def facts(self, scene: Scene) -> list[str]:
        edited, null = float(np.nanmean(self.array(scene, "loss"))), self.values(scene)
        share = (1 + int((np.abs(null) >= abs(edited)).sum())) / (1 + len(null))
        kinds = "random: synapses as strong and as read, neurons as active, other tokens, or the source text shuffled"
        return [f"p {number(share)} by size, {len(null)} draws", kinds]

    def snippet_body(self, scene: Scene) -> str:
        return f"""
{self.model_lines(scene)}
twins = twins_of(model, text, edits, asked["draws"], asked["seed"])
values = np.nanmean([effect_of(model, text, each)[0] for each in twins], axis=1)
"""


PANELS = (LossChange(), NextChange(), AgainstRandom())
