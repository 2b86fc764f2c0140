"""Panels of the Intervene page: what a basket changes, before and after, token by token, and against matched random baskets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import plotly.graph_objects as go

from app.figures.common import number, token_label, token_lines, visible_text
from app.figures.concepts import null_points
from app.figures.interventions import before_after, changes
from app.figures.synapses import ranked_bars
from app.measure.interventions import KIND
from app.panels.base import NothingToShow, Table
from app.panels.results import ResultPanel
from app.services import Scene
from app.theme import Theme

MOST_BARS = 16
LEAST = 1e-3
"""Probability below which a token is not drawn, however much its logarithm changed."""
MEASURES = {"target": "target’s logit", "top": "expected token’s logit, all tokens", "loss": "loss, all tokens"}


class InterventionPanel(ResultPanel):
    """A panel over a run basket."""

    kind = KIND
    start = "Put something into the basket on this page and press Run."

    def model_lines(self, scene: Scene) -> str:
        """Python that runs the basket again."""
        named = any("name" in each for each in self.result(scene).manifest["interventions"])
        opening = "from probes.interventions.dictionaries import open_dictionary\n" if named else ""
        given = ", dictionaries=lambda name: open_dictionary(RunStore().root / name)" if named else ""
        return f"""
{opening}from probes.interventions import intervene

model, asked = models.load("{self.result(scene).model["name"]}"), run.manifest["settings"]
effects = intervene(model, asked["prompts"], asked["basket"], target=asked["target"], wrong=asked["against"],
                    at=asked["at"], controls=asked["draws"], seed=asked["seed"]{given})
""".strip()

    def change(self, scene: Scene, measure: str) -> dict:
        """The stored change of a measure: value, interval, controls, p."""
        return self.results(scene)["changes"][measure]

    def basket_facts(self, scene: Scene) -> list[str]:
        """The first lines of what was done."""
        return str(self.settings(scene)["basket"]).splitlines()[:3]


class Effects(InterventionPanel):
    """All measures with intervals beside the controls."""

    id = "intervene-effects"
    title = "What it changes"
    words = "Mean changes with 95 % intervals over prompts (of one prompt: over its tokens), and every matched random basket."
    height = 260

    def values(self, scene: Scene) -> np.ndarray:
        rows = []
        for measure in MEASURES:
            found = self.change(scene, measure)
            rows.append([found["value"], *(found["interval"] or (np.nan, np.nan))])
        return np.array(rows, dtype=float)

    def labels(self, scene: Scene) -> list[str]:
        results = self.results(scene)
        target = ", ".join(dict.fromkeys(f"‘{visible_text(str(each))}’" for each in results["targets"][:3]))
        against = "" if results["against"] is None else f" − ‘{visible_text(str(results['against'][0]))}’"
        return [f"logit of {target}{against}", "expected token’s logit", "loss"]

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        drawn = [np.array(self.change(scene, measure)["controls"], dtype=float) for measure in MEASURES]
        return changes(self.labels(scene), self.values(scene), drawn, theme, panel=self.id)

    def table(self, scene: Scene) -> Table:
        rows: list[Sequence[str | float]] = []
        for name, measure, values in zip(self.labels(scene), MEASURES, self.values(scene), strict=True):
            found = self.change(scene, measure)
            mean = float(np.mean(found["controls"])) if found["controls"] else np.nan
            rows.append([name, *map(float, values), mean, np.nan if found["p"] is None else found["p"]])
        return ["change of", "value", "low", "high", "random, mean", "p"], iter(rows)

    def facts(self, scene: Scene) -> list[str]:
        found = [
            f"{name}: p {number(self.change(scene, name)['p'])}"
            for name in MEASURES
            if self.change(scene, name)["p"] is not None
        ]
        return [*found, *self.basket_facts(scene)]

    def snippet_body(self, scene: Scene) -> str:
        return f"""
{self.model_lines(scene)}
found = [effects.change(measure) for measure in ("target", "top", "loss")]
ends = [(each.interval.low, each.interval.high) if each.interval else (np.nan, np.nan) for each in found]
values = np.array([[each.value, *end] for each, end in zip(found, ends)])
"""


class BeforeAfter(InterventionPanel):
    """The prediction before and after."""

    id = "intervene-before"
    title = "The prediction, before and after"
    words = "The likeliest next tokens of either run, of the first prompt."
    height = 300

    def values(self, scene: Scene) -> np.ndarray:
        return np.array([[row["before"], row["after"]] for row in self.results(scene)["before_after"][0]])

    def names(self, scene: Scene) -> list[str]:
        return [f"‘{visible_text(str(row['token']))}’" for row in self.results(scene)["before_after"][0]]

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        return before_after(self.names(scene), self.values(scene), theme, panel=self.id)

    def table(self, scene: Scene) -> Table:
        rows: Iterator[Sequence[str | float]] = (
            [name, *map(float, row)] for name, row in zip(self.names(scene), self.values(scene), strict=True)
        )
        return ["next token", "before", "after"], rows

    def facts(self, scene: Scene) -> list[str]:
        return [f"after token {self.results(scene)['at'][0]}"]

    def snippet_body(self, scene: Scene) -> str:
        return f"{self.model_lines(scene)}\nvalues = np.array([each[1:] for each in effects.top(0)])"


class LossChange(InterventionPanel):
    """What the operations do to the loss of every token."""

    id = "intervene-loss"
    title = "Change of the loss, token by token"
    words = "Above 0: the token became more surprising. Beside it the mean of matched random baskets, and two standard deviations above it."
    height = 290

    def values(self, scene: Scene) -> np.ndarray:
        return self.array(scene, "loss")

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        values, controls = self.values(scene), self.array(scene, "controls")
        series, dashes = [("edited", values)], ["solid"]
        if len(controls):
            spread = controls.std(0, ddof=1) if len(controls) > 1 else np.zeros(len(values))
            mean = controls.mean(0)
            series += [("matched random, mean", mean), ("mean + 2 s.d.", mean + 2 * spread)]
            dashes += ["dash", "dot"]
        tokens = self.results(scene)["tokens"]
        linked = tokens == scene.tokens
        return token_lines(
            series, tokens, theme, y_title="nats", panel=self.id, selected=0, dashes=dashes, role="token" if linked else "",
            click="token" if linked else "",
        )  # fmt: skip

    def table(self, scene: Scene) -> Table:
        values, controls, tokens = self.values(scene), self.array(scene, "controls"), self.results(scene)["tokens"]
        headers = ["token", "edited", *(f"random {draw + 1}" for draw in range(len(controls)))]
        rows: Iterator[Sequence[str | float]] = (
            [token_label(tokens, t), float(values[t]), *map(float, controls[:, t])] for t in range(len(values))
        )
        return headers, rows

    def facts(self, scene: Scene) -> list[str]:
        prompts = len(self.settings(scene)["prompts"])
        shown = [f"{prompts} prompts in a row"] if prompts > 1 else []
        return [f"mean {number(self.change(scene, 'loss')['value'])} nats", *shown, *self.basket_facts(scene)]

    def snippet_body(self, scene: Scene) -> str:
        return f'{self.model_lines(scene)}\nvalues = effects.values("loss")'


class NextChange(InterventionPanel):
    """What the operations do to the prediction at the watched token."""

    id = "intervene-next"
    title = "Change of the next token's log p"
    words = "The tokens whose log-probability changed most after the watched token, of those at 0.1 % or more before or after."
    height = 320

    def values(self, scene: Scene) -> np.ndarray:
        return self.array(scene, "log_probs")

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        values, names = self.values(scene), self.results(scene)["vocab"]
        before = self.array(scene, "log_probs.before")
        likely = np.maximum(before, before + values) >= np.log(LEAST)
        order = np.argsort(-np.abs(values) * likely, kind="stable")[: min(MOST_BARS, int(likely.sum()))]
        labels = [f"‘{visible_text(names[i])}’" if names else str(i) for i in order.tolist()]
        return ranked_bars(labels, values[order], theme, panel=self.id, title="nats")

    def facts(self, scene: Scene) -> list[str]:
        return [f"after token {self.results(scene)['at'][0]}"]

    def snippet_body(self, scene: Scene) -> str:
        return f"{self.model_lines(scene)}\nvalues = effects.edited.log_probs[0] - effects.plain.log_probs[0]"


class AgainstRandom(InterventionPanel):
    """The mean change of the loss beside that of matched random baskets."""

    id = "intervene-random"
    title = "More than random edits do?"
    words = "Mean change of the loss: of the basket (line), and of each matched random basket (points)."
    height = 240

    def values(self, scene: Scene) -> np.ndarray:
        drawn = np.array(self.change(scene, "loss")["controls"], dtype=float)
        if not len(drawn):
            raise NothingToShow("No matched random basket", self.results(scene)["no_control"] or "None was asked for.")
        return drawn

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        observed = float(self.change(scene, "loss")["value"])
        return null_points(
            self.values(scene), observed, theme, panel=self.id, title="mean Δloss, nats", name="draw", x_title="random basket"
        )  # fmt: skip

    def table(self, scene: Scene) -> Table:
        values = self.values(scene)
        lines = self.results(scene)["controls"]
        return ["random basket", "mean Δloss"], (["; ".join(lines[i]), float(value)] for i, value in enumerate(values))

    def facts(self, scene: Scene) -> list[str]:
        asked, drawn = self.settings(scene)["draws"], len(self.values(scene))
        fewer = [f"there are no more than {drawn} different ones"] if drawn < asked else []
        kinds = "random: the same kind and layer, other heads, neurons, tokens, or directions of the same length"
        return [f"p {number(self.change(scene, 'loss')['p'])} by size, {drawn} draws", *fewer, kinds]

    def snippet_body(self, scene: Scene) -> str:
        return f'{self.model_lines(scene)}\nvalues = effects.change("loss").controls'


PANELS = (Effects(), BeforeAfter(), LossChange(), NextChange(), AgainstRandom())
