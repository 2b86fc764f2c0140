"""Panels of the Compare page: heads, surprisal, predictions and lenses of two runs beside each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from app.figures.common import number, token_lines, visible_text
from app.figures.compare import paired_bars, score_scatter
from app.figures.lens import depth_lines, head_map
from app.measure.compare import KIND
from app.panels.base import NothingToShow, Table
from app.panels.overview import token_names
from app.panels.pairs import MATCHED_PARTS, SIDES, Head, Pair
from app.panels.results import ResultPanel
from app.panels.shared_maps import MAPS, PairPanel
from app.services import Scene
from app.theme import Theme
from app.view_state import HEAD_SCORES
from workbench.lab.runs import Run

MOST_BARS = 12


class HeadScatter(PairPanel):
    """A score of every head of A beside that of its counterpart in B."""

    id = "compare-heads"
    title = "Heads of A and B"
    words = "One point per head of A, beside its counterpart in B; on the dotted line both score the same. The ring is the chosen head."
    depends = ("run", "run_b", "layer", "head", "head_b", "head_score")
    height = 360

    def how(self, scene: Scene) -> str:
        """Heads are matched by number, or by pattern if the chosen one is."""
        return "pattern" if scene.view.head_b == "pattern" else "index"

    def heads(self, scene: Scene) -> list[tuple[Head, Head]]:
        pair = self.pair(scene)
        if not pair.heads(0):
            raise NothingToShow("Run A has no token-to-token maps", "None of its layers stores a pattern.")
        return [(head, pair.matched(head, self.how(scene))) for head in pair.heads(0)]

    def scores(self, scene: Scene, side: int) -> dict[Head, float]:
        score, pair = scene.view.head_score, self.pair(scene)
        if score in HEAD_SCORES:
            return pair.scores(side, score)
        run = pair.runs[side]
        found = stored_scores(scene, run).get(score)
        if found is None:
            raise NothingToShow(
                f"{SIDES[side]} has no stored score {score}",
                f"Measure {run.model.get('name')} on the Probes page, or choose another score.",
            )
        values = found.array(score)
        return {
            (layer, head): float(values[layer, head])
            for layer in range(values.shape[0])
            for head in range(values.shape[1])
        }

    def values(self, scene: Scene) -> np.ndarray:
        """Scores [head of A, 2]."""
        first, second = (self.scores(scene, side) for side in (0, 1))
        return np.array([[first.get(a, np.nan), second.get(b, np.nan)] for a, b in self.heads(scene)])

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        heads = self.heads(scene)
        names = [f"A {a[0]}.{a[1]} and B {b[0]}.{b[1]}" for a, b in heads]
        mine = (scene.view.layer, scene.view.head)
        chosen = next((i for i, (a, _) in enumerate(heads) if a == mine), None)
        words = HEAD_SCORES.get(scene.view.head_score, scene.view.head_score)
        titles = tuple(f"{name}, {words}" for name in self.names(scene))
        return score_scatter(
            names,
            self.values(scene),
            [a[0] for a, _ in heads],
            chosen,
            theme,
            panel=self.id,
            titles=(titles[0], titles[1]),
        )

    def table(self, scene: Scene) -> Table:
        values = self.values(scene).tolist()
        rows: Iterator[list[str | float]] = (
            [f"{a[0]}.{a[1]}", f"{b[0]}.{b[1]}", *line] for (a, b), line in zip(self.heads(scene), values, strict=True)
        )
        return ["head of A", "head of B", "A", "B"], rows

    def facts(self, scene: Scene) -> list[str]:
        score = scene.view.head_score
        found = [f"heads matched by {'their patterns' if self.how(scene) == 'pattern' else 'number'}"]
        if score in HEAD_SCORES:
            return [*found, f"{HEAD_SCORES[score]}: mean over rows of |α| / Σ|α|, from the runs"]
        ids = [stored_scores(scene, run)[score].id.rsplit("-", 1)[-1] for run in self.pair(scene).runs]
        return [*found, f"{score}, from the stored measurements {ids[0]} and {ids[1]}"]

    def snippet_body(self, scene: Scene) -> str:
        score = scene.view.head_score
        if score in HEAD_SCORES:
            scores = f'first, second = (pair.scores(side, "{score}") for side in (0, 1))'
        else:
            ids = [stored_scores(scene, run)[score].id for run in self.pair(scene).runs]
            scores = f"""
tables = [RunStore().open(each).array("{score}") for each in {ids}]
first, second = ({{(l, h): v for (l, h), v in np.ndenumerate(table)}} for table in tables)
""".strip()
        return f"""
{self.opening(scene)}
{scores}
heads = [(head, pair.matched(head, "{self.how(scene)}")) for head in pair.heads(0)]
values = np.array([[first.get(a, np.nan), second.get(b, np.nan)] for a, b in heads])
"""


def stored_scores(scene: Scene, run: Run) -> dict[str, Run]:
    """Tables [layer, head] of scores in the newest probe runs of a run's model: `{"probe.score": where}`."""
    if scene.store is None:
        return {}
    shape = (len(run.layers), max((layer["n_heads"] for layer in run.layers), default=0))
    found: dict[str, Run] = {}
    for entry in scene.store.list(kind="probe", model=run.model.get("name")):
        measured = scene.cache.get(("run", entry.id), lambda entry=entry: scene.store.open(entry.id))  # type: ignore[misc, union-attr]
        if measured.model.get("weights_sha256") != run.model.get("weights_sha256"):
            continue
        for name, about in measured.arrays().items():
            if about["axes"] == ["layer", "head"] and name.count(".") == 1 and tuple(about["shape"]) == shape:
                found.setdefault(name, measured)
    return found


class Alikeness(PairPanel):
    """Cosine between the patterns of all heads of both."""

    id = "compare-alike"
    title = "Which heads look alike"
    words = "Cosine between the patterns of a head of A (row) and one of B (column). Click a cell to put the two side by side."
    depends = ("run", "run_b")

    def values(self, scene: Scene) -> np.ndarray:
        pair = self.pair(scene)
        if not (pair.heads(0) and pair.heads(1)):
            raise NothingToShow("No two maps to compare", "A run without token-to-token maps has no heads to match.")
        return pair.likeness()

    def pixels_high(self, scene: Scene) -> int:
        return 90 + max(10, min(22, 700 // len(self.pair(scene).heads(0)))) * len(self.pair(scene).heads(0))

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        pair, values = self.pair(scene), self.values(scene)
        choices: dict[str, list[dict[str, Any]]] = {
            "y": [{"layer": layer or None, "head": head or None} for layer, head in pair.heads(0)],
            "x": [{"hb": f"{layer}.{head}"} for layer, head in pair.heads(1)],
        }
        rows, columns = ([f"{layer}.{head}" for layer, head in pair.heads(side)] for side in (0, 1))
        return head_map(values, rows, columns, theme, panel=self.id, unit="cosine", choices=choices, texts=False,
                        x_title="head of B", y_title="head of A")  # fmt: skip

    def table(self, scene: Scene) -> Table:
        rows, columns = ([f"{layer}.{head}" for layer, head in self.pair(scene).heads(side)] for side in (0, 1))
        lines: Iterator[list[str | float]] = (
            [name, *line] for name, line in zip(rows, self.values(scene).tolist(), strict=True)
        )
        return ["head of A", *columns], lines

    def facts(self, scene: Scene) -> list[str]:
        aligned = int(self.pair(scene).alignment.aligned.sum())
        return [f"over the first {min(aligned, MATCHED_PARTS)} aligned parts, each row by its Σ|α|"]

    def snippet_body(self, scene: Scene) -> str:
        return f"{self.opening(scene)}\nvalues = pair.likeness()  # head of A, head of B"


class SurprisalBoth(PairPanel):
    """Surprisal of the same letters."""

    id = "compare-surprisal"
    title = "Surprisal of A and B"
    words = (
        "Nats for every part of the text; where tokenizers differ, tokens that stand for the same letters are added up."
    )
    height = 260

    def values(self, scene: Scene) -> np.ndarray:
        """Nats [2, part]; nan where a text has no token, and at the first."""
        pair, lines = self.pair(scene), []
        for side, run in enumerate(pair.runs):
            if not run.has("loss"):
                raise NothingToShow(f"Run {SIDES[side]} has no surprisal", "It was made without predictions.")
            lines.append(summed(run.array("loss"), pair.alignment.tokens(side)))
        return np.stack(lines)

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        series = list(zip(self.names(scene), self.values(scene), strict=True))
        labels = self.pair(scene).labels()
        figure = token_lines(series, labels, theme, y_title="nats", panel=self.id, from_zero=True, x_title="part of the text",
                             dashes=["solid", "dash"])  # fmt: skip
        return figure.update_layout(meta={"panel": self.id, "x": self.axis_meta(scene, "token", -0.5)})

    def table(self, scene: Scene) -> Table:
        labels, values = self.pair(scene).labels(), self.values(scene)
        rows: Iterator[list[str | float]] = (
            [f"{p} ‘{visible_text(label)}’", *values[:, p].tolist()] for p, label in enumerate(labels)
        )
        return ["part", "A", "B"], rows

    def facts(self, scene: Scene) -> list[str]:
        values = self.values(scene)
        both = np.isfinite(values).all(axis=0)
        if not both.any():
            return ["no part has a surprisal in both"]
        a, b = (float(line[both].sum(dtype=np.float64)) for line in values)
        return [f"over the {int(both.sum())} parts that both have: A {number(a)} nats, B {number(b)}"]

    def snippet_body(self, scene: Scene) -> str:
        return f"""
{self.opening(scene)}
from app.panels.compare import summed
values = np.stack([summed(each.array("loss"), pair.alignment.tokens(side)) for side, each in enumerate(pair.runs)])
"""


def summed(values: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """Sums over ranges [part, 2]; nan for an empty one, or one with a nan."""
    return np.array(
        [values[start:stop].sum(dtype=np.float64) if stop > start else np.nan for start, stop in ranges.tolist()]
    )


class NextBoth(PairPanel):
    """What both expect after the pinned token."""

    id = "compare-next"
    title = "What both expect next"
    words = "The likeliest next tokens after the pinned token of A and after its counterpart in B. No bar: not among that run's ten."
    depends = ("run", "run_b", "query")
    height = 360

    def places(self, scene: Scene) -> tuple[int, int]:
        """The last tokens of the pinned part on both sides."""
        pair = self.pair(scene)
        part = pair.part_of(scene.query)
        if not pair.alignment.aligned[part]:
            raise NothingToShow("The pinned token is not in B", "Pin another one: click a token that both texts have.")
        _, a, _, b = pair.alignment.parts[part].tolist()
        return a - 1, b - 1

    def expected(self, scene: Scene) -> tuple[list[str], np.ndarray]:
        """Labels of the tokens, and their probabilities [token, 2]."""
        for side, run in enumerate(self.pair(scene).runs):
            if not run.has("next.ids"):
                raise NothingToShow(
                    f"Run {SIDES[side]} has no predictions", "It was made without next-token probabilities."
                )
        return both_expect(self.pair(scene).runs, self.places(scene))

    def values(self, scene: Scene) -> np.ndarray:
        return self.expected(scene)[1]

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        labels, values = self.expected(scene)
        return paired_bars(labels, values, self.names(scene), theme, panel=self.id)

    def table(self, scene: Scene) -> Table:
        labels, values = self.expected(scene)
        rows: Iterator[list[str | float]] = (
            [label, *line] for label, line in zip(labels, values.tolist(), strict=True)
        )
        return ["token", "A", "B"], rows

    def facts(self, scene: Scene) -> list[str]:
        a, b = self.places(scene)
        return [f"after token {a} of A and token {b} of B"]

    def snippet_body(self, scene: Scene) -> str:
        return f"""
{self.opening(scene)}
from app.panels.compare import both_expect
values = both_expect(pair.runs, {self.places(scene)})[1]
"""


def both_expect(runs: Sequence[Run], places: Sequence[int]) -> tuple[list[str], np.ndarray]:
    """The likeliest next tokens of two runs after a position of each: labels, and probabilities [token, 2], nan where not kept."""
    found: dict[str, list[float]] = {}
    for side, (run, at) in enumerate(zip(runs, places, strict=True)):
        name = token_names(run)
        for token, chance in zip(
            run.array("next.ids")[at].tolist(), np.exp(run.array("next.log_probs")[at]).tolist(), strict=True
        ):
            found.setdefault(name(token), [np.nan, np.nan])[side] = chance
    order = sorted(found, key=lambda label: -float(np.nanmax(found[label])))[:MOST_BARS]
    return order, np.array([found[label] for label in order])


class ComparisonPanel(ResultPanel):
    """A panel over a measured comparison of the two runs."""

    kind = KIND
    depends = ("run", "run_b", "result")
    start = "Press Measure: both models read their texts again."

    def check(self, scene: Scene) -> None:
        super().check(scene)
        settings = (scene.result.manifest.get("settings") or {}) if scene.result is not None else {}
        if (settings.get("run"), settings.get("run_b")) != (scene.view.run, scene.view.run_b):
            raise NothingToShow("This comparison is of other runs", "Press Measure to compare the two that are open.")

    def opening(self, scene: Scene) -> str:
        return """
import torch
from app.measure.compare import divergences, predictions
from probes.lenses import logit_lens
from workbench.lab.alignment import TokenText, align

runs = [RunStore().open(run.manifest["settings"][which]) for which in ("run", "run_b")]
loaded = [models.load(each.model["name"]) for each in runs]
""".strip()


class PredictionsApart(ComparisonPanel):
    """How far the predictions are apart."""

    id = "compare-kl"
    title = "How far apart the predictions are"
    words = "Divergence between the next-token predictions of A and B after every part of the text that both have."
    height = 260
    NAMES = ("KL(A ‖ B)", "KL(B ‖ A)", "Jensen–Shannon")

    def values(self, scene: Scene) -> np.ndarray:
        """Nats [measure, part]."""
        refused = self.results(scene)["refused"]
        if refused:
            raise NothingToShow("Different vocabularies", refused)
        return self.array(scene, "divergence")

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        labels = Pair.of(scene).labels()
        series = list(zip(self.NAMES, self.values(scene), strict=True))
        figure = token_lines(series, labels, theme, y_title="nats", panel=self.id, from_zero=True, x_title="part of the text",
                             dashes=["solid", "dash", "dot"])  # fmt: skip
        return figure.update_layout(meta={"panel": self.id, "x": MAPS[0].axis_meta(scene, "token", -0.5)})

    def table(self, scene: Scene) -> Table:
        values = self.values(scene)
        rows: Iterator[list[str | float]] = (
            [f"{p} ‘{visible_text(label)}’", *values[:, p].tolist()] for p, label in enumerate(Pair.of(scene).labels())
        )
        return ["after part", *self.NAMES], rows

    def facts(self, scene: Scene) -> list[str]:
        values, same = self.values(scene), self.array(scene, "agreement")
        counted = np.isfinite(same)
        means = [
            f"mean {name} {number(float(line[counted].mean()))} nats"
            for name, line in zip(self.NAMES, values, strict=True)
        ]
        return [*means, f"same most likely token after {same[counted].mean():.0%} of {int(counted.sum())} parts"]

    def snippet_body(self, scene: Scene) -> str:
        return f"""
{self.opening(scene)}
alignment = align(*(TokenText.of(each.manifest) for each in runs))
values = divergences(alignment, *(predictions(model, each) for model, each in zip(loaded, runs)))
"""


class LensesBoth(ComparisonPanel):
    """When either settles on its answer."""

    id = "compare-lens"
    title = "When either settles on its answer"
    words = "Logit lens: at each depth, the share of tokens whose most likely next token is already the final one."
    height = 260

    def lines(self, scene: Scene) -> list[np.ndarray]:
        return [self.array(scene, f"lens.{letter}.agreement") for letter in "ab"]

    def values(self, scene: Scene) -> np.ndarray:
        """Share of tokens [2, depth], nan beyond a model's last depth."""
        return stacked(self.lines(scene))

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        names = [f"{letter}: {run.model.get('name')}" for letter, run in zip(SIDES, Pair.of(scene).runs, strict=True)]
        series = list(zip(names, self.results(scene)["depths"], self.lines(scene), strict=True))
        return depth_lines(series, theme, panel=self.id, title="agrees with the final")

    def table(self, scene: Scene) -> Table:
        values, depths = self.values(scene), max(self.results(scene)["depths"], key=len)
        rows: Iterator[list[str | float]] = ([name, *values[:, d].tolist()] for d, name in enumerate(depths))
        return ["after", "A", "B"], rows

    def facts(self, scene: Scene) -> list[str]:
        means = [self.array(scene, f"lens.{letter}.divergence") for letter in "ab"]
        return [
            f"{side}: mean KL(final ‖ lens) {number(float(each[0]))} nats after the embedding"
            for side, each in zip(SIDES, means, strict=True)
        ]

    def snippet_body(self, scene: Scene) -> str:
        return f"""
{self.opening(scene)}
from app.panels.compare import stacked
tokens = [torch.tensor([each.manifest["tokens"]["ids"]]) for each in runs]
values = stacked([logit_lens(m, t, top=1).mean("agreement").numpy() for m, t in zip(loaded, tokens)])
"""


def stacked(lines: Sequence[np.ndarray]) -> np.ndarray:
    """Lines of any lengths as rows, filled up with nan."""
    longest = max(map(len, lines))
    return np.stack(
        [np.pad(np.asarray(line, dtype=np.float64), (0, longest - len(line)), constant_values=np.nan) for line in lines]
    )


PANELS = (HeadScatter(), Alikeness(), SurprisalBoth(), NextBoth(), PredictionsApart(), LensesBoth())
