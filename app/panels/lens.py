"""Panels of the Lens page: what each depth would say, how the stream gets there, and who wrote a logit difference."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import plotly.graph_objects as go

from app.figures.common import Axis, Colours, number, picture, token_label, visible_text
from app.figures.lens import MARGIN, component_bars, depth_label, depth_lines, head_map, lens_grid
from app.figures.overview import next_tokens
from app.measure.common import says_here
from app.measure.lens import KIND, PLAIN, TARGETS, TARGETS_HERE, shown_lenses, why_no_lens
from app.panels.base import NothingToShow, PicturePanel, Span, Table, levels_of
from app.panels.results import OfOpenRun, ResultPanel
from app.services import Scene
from app.theme import Theme, colours_of, readable_on
from app.view_state import LENS_COLOURS, LENSES
from workbench.lab.pooling import pool
from workbench.lab.runs import Run

SCALES = {"top": "linear", "target": "linear", "rank": "log", "entropy": "linear", "divergence": "sqrt"}
UNITS = {
    "top": "probability",
    "target": "probability",
    "rank": "tokens above the target",
    "entropy": "nats",
    "divergence": "nats",
}
MEAN_OF = {"top": "divergence", "target": "loss", "rank": "rank", "entropy": "entropy", "divergence": "divergence"}
MEAN_TITLES = {
    "divergence": "KL(final ‖ lens), nats", "loss": "−log p of the target, nats", "rank": "rank of the target",
    "entropy": "entropy, nats",
}  # fmt: skip
COLUMN_NAMES = {"mixer": "mixer", "rest": "rest", "mlp": "MLP"}
"""Columns beside the heads: parts of a layer that are no head."""
MOST_BARS = 40
MOST_TEXTS = 2_600
WIDTHS = {256: 300, 512: 960}
"""Pixels that a grid has for its cells, by the largest side of a picture."""
SMALLEST_LETTER = 5


class LensPanel(OfOpenRun, ResultPanel):
    """A panel over a reading of the open run."""

    kind = KIND
    start = "Choose a lens in the form on this page and press Read."

    words_here = ""
    """The explanation for an encoder, which says what stands at a token instead of what comes behind it; "" where that is no difference."""

    def check(self, scene: Scene) -> None:
        if scene.run is not None and (why := why_no_lens(scene.run)):
            raise NothingToShow("No lens reads this model", why)
        super().check(scene)

    def here(self, scene: Scene) -> bool:
        """Whether the model says what stands at a token, not what comes behind it."""
        return scene.run is not None and says_here(scene.run)

    def explanation(self, scene: Scene) -> str:
        return self.words_here if self.words_here and self.here(scene) else self.words

    def lens(self, scene: Scene) -> str:
        """The lens that is shown: the chosen one where the result holds it, else the logit lens."""
        return scene.view.lens if scene.view.lens in shown_lenses(self.result(scene)) else PLAIN

    def depths(self, scene: Scene) -> list[str]:
        return self.results(scene)["depths"]

    def depth(self, scene: Scene) -> int:
        """The pinned depth, else the last."""
        last = len(self.depths(scene)) - 1
        return last if scene.view.depth is None else min(scene.view.depth, last)

    def name(self, scene: Scene, token: int) -> str:
        """The label of a token that the result mentions."""
        return self.results(scene)["names"].get(str(token), f"#{token}")

    def lens_facts(self, scene: Scene) -> list[str]:
        facts = [LENSES[self.lens(scene)]]
        if facts == ["logit lens"] and scene.view.lens == "tuned":
            facts.append("no tuned lens was asked for")
        if self.lens(scene) == "tuned":
            facts.append(f"lens {self.settings(scene)['lens'].rsplit('-', 1)[-1]}")
        return facts

    def target_words(self, scene: Scene) -> str:
        if self.settings(scene)["target"] == "answer":
            return f"target: ‘{visible_text(self.name(scene, self.results(scene)['answer']))}’"
        return f"target: {(TARGETS_HERE if self.here(scene) else TARGETS)['next']}"

    def opening(self, scene: Scene) -> str:
        """Python that opens the model and the tokens, and reads them through the shown lens."""
        target = 'run.manifest["results"]["answer"]' if self.settings(scene)["target"] == "answer" else "None"
        lens = 'load_lens(RunStore().open(asked["lens"]))' if self.lens(scene) == "tuned" else "None"
        return f"""
import torch
from app.measure.lens import load_lens, parts_of, reading_of, stream_shape

model, asked = models.load("{self.result(scene).model["name"]}"), run.manifest["settings"]
tokens = torch.tensor([RunStore().open(asked["run"]).manifest["tokens"]["ids"]])
reading = reading_of(model, tokens, {lens}, target={target})
""".strip()


class LensGrid(LensPanel, PicturePanel):
    """What every depth would say after every token."""

    id = "lens-grid"
    title = "What it would say if it stopped here"
    words = "Row = after which layer. Column = after which token. Text = the most likely next token there. Click pins, dragging zooms."
    words_here = "Row = after which layer. Column = at which token. Text = what would most likely stand there. Click pins, dragging zooms."
    depends = ("run", "result", "lens", "lens_colour", "columns")

    def pixels_high(self, scene: Scene) -> int:
        return 110 + max(14, min(30, 640 // len(self.depths(scene)))) * len(self.depths(scene))

    def shape(self, scene: Scene) -> tuple[int, int]:
        return len(self.depths(scene)), scene.n_tokens

    def spans(self, scene: Scene) -> tuple[Span, Span]:
        rows, columns = self.shape(scene)
        return (0, rows), scene.view.columns or (0, columns)

    def measure(self, scene: Scene) -> np.ndarray:
        """What the colour shows: [depth, pos], nan where there is no target."""
        lens, colour = self.lens(scene), scene.view.lens_colour
        if colour == "top":
            return np.exp(self.array(scene, f"{lens}.top_log_probs")[..., 0])
        if colour == "target":
            return np.exp(-self.array(scene, f"{lens}.loss"))
        return self.array(scene, f"{lens}.{colour}")

    def block(self, scene: Scene, rows: Span, columns: Span) -> np.ndarray:
        return self.measure(scene)[slice(*rows), slice(*columns)]

    def pooled(self, scene: Scene, size: int) -> np.ndarray:
        rows, columns = self.spans(scene)
        return pool(self.block(scene, rows, columns), size, size, "max")

    def colours(self, scene: Scene, theme: Theme) -> Colours:
        colour = scene.view.lens_colour
        values = self.measure(scene)
        limit = 1.0 if colour in ("top", "target") else float(np.nanmax(values, initial=0.0)) or 1.0
        return Colours(theme.table_name(False), limit, SCALES[colour], False, f"{LENS_COLOURS[colour]}, {UNITS[colour]}"
                       if colour in ("rank", "entropy", "divergence") else LENS_COLOURS[colour])  # fmt: skip

    def tops(self, scene: Scene) -> np.ndarray:
        """Ids of the most likely tokens: [depth, pos, rank]."""
        return self.array(scene, f"{self.lens(scene)}.top_ids")

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        rows, columns = self.spans(scene)
        colours, width = self.colours(scene, theme), columns[1] - columns[0]
        wide = WIDTHS.get(scene.pixels, WIDTHS[512]) / width
        words = inks = None
        if wide >= SMALLEST_LETTER and width * rows[1] <= MOST_TEXTS:
            best = self.tops(scene)[:, slice(*columns), 0].tolist()
            words = [[self.name(scene, token) for token in line] for line in best]
            levels = levels_of(self.block(scene, rows, columns), colours)
            inks = [[readable_on(c) if c else theme.text for c in colours_of(line, colours.table)] for line in levels]
        return lens_grid(
            self.address(scene, theme), scene.tokens, self.depths(scene), columns, words, inks, int(wide), colours, theme,
            panel=self.id,
        )  # fmt: skip

    def place(self, scene: Scene, row: int, column: int) -> list[tuple[str, str]]:
        lens = self.lens(scene)
        chances = np.exp(self.array(scene, f"{lens}.top_log_probs")[row, column, :3])
        best = self.tops(scene)[row, column, :3].tolist()
        said = ", ".join(f"‘{visible_text(self.name(scene, i))}’ {p:.0%}" for i, p in zip(best, chances, strict=True))
        return [("after", self.depths(scene)[row]), ("at", token_label(scene.tokens, column)), ("says", said)]

    def table(self, scene: Scene) -> Table:
        (_, rows), columns = self.spans(scene)
        values, best, depths = self.values(scene), self.tops(scene)[:, slice(*columns), 0], self.depths(scene)
        headers = ["after", *(token_label(scene.tokens, t) for t in range(*columns))]
        cells = [[f"{visible_text(self.name(scene, i))} {number(v)}" for i, v in zip(ids, line, strict=True)]
                 for ids, line in zip(best.tolist(), values.astype(float).tolist(), strict=True)]  # fmt: skip
        return headers, ([depths[row], *cells[row]] for row in range(rows))

    def facts(self, scene: Scene) -> list[str]:
        facts = [*self.lens_facts(scene), "the last row is the model itself"]
        if scene.view.lens_colour in ("target", "rank"):
            facts.append(self.target_words(scene))
        _, (start, stop) = self.spans(scene)
        if (stop - start) * SMALLEST_LETTER > WIDTHS.get(scene.pixels, WIDTHS[512]):
            facts.append("zoom in to read the texts")
        return facts

    def summary(self, scene: Scene) -> str:
        lens = self.lens(scene)
        agreement = self.results(scene)["means"][lens]["agreement"]
        half = next(
            (d for d, share in zip(self.depths(scene), agreement, strict=True) if share is not None and share >= 0.5),
            None,
        )
        return f"By the {LENSES[lens]}, half of the final predictions stand after {half}."

    def snippet_body(self, scene: Scene) -> str:
        _, (first, last) = self.spans(scene)
        measured = {
            "top": "np.exp(reading.top_log_probs[:, 0, :, 0].numpy())",
            "target": "np.exp(-reading.loss[:, 0].numpy())",
        }.get(scene.view.lens_colour, f"reading.{scene.view.lens_colour}[:, 0].numpy()")
        return f"{self.opening(scene)}\nvalues = np.asarray({measured})[:, {first}:{last}]  # depth, pos"


class LensCell(LensPanel):
    """The most likely tokens at one depth and token."""

    id = "lens-cell"
    title = "The pinned cell"
    words = "The most likely next tokens there. Click a cell of the grid to choose it; the one that really came next is green (✓)."
    words_here = "What would most likely stand there. Click a cell of the grid to choose it; the token that really does is green (✓)."
    depends = ("run", "result", "lens", "query", "depth")
    height = 310

    def values(self, scene: Scene) -> np.ndarray:
        return self.array(scene, f"{self.lens(scene)}.top_log_probs")[self.depth(scene), scene.query]

    def ids(self, scene: Scene) -> list[int]:
        return self.array(scene, f"{self.lens(scene)}.top_ids")[self.depth(scene), scene.query].tolist()

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        ids, target = self.ids(scene), scene.query if self.here(scene) else scene.query + 1
        token = int(scene.opened().array("tokens")[target]) if target < scene.n_tokens else -1
        labels = [self.name(scene, each) for each in ids]
        return next_tokens(
            labels, self.values(scene), theme, panel=self.id, actual=ids.index(token) if token in ids else None
        )

    def table(self, scene: Scene) -> Table:
        rows = zip(self.ids(scene), self.values(scene).tolist(), strict=True)
        return ["token", "id", "log probability", "probability"], (
            [self.name(scene, i), str(i), v, math.exp(v)] for i, v in rows
        )

    def facts(self, scene: Scene) -> list[str]:
        place = f"after {self.depths(scene)[self.depth(scene)]}, at {token_label(scene.tokens, scene.query)}"
        return [place, *self.lens_facts(scene)]

    def snippet_body(self, scene: Scene) -> str:
        return f"{self.opening(scene)}\nvalues = reading.top_log_probs[{self.depth(scene)}, 0, {scene.query}].numpy()"


class LensDepths(LensPanel):
    """How far the prediction is at each depth, on average."""

    id = "lens-depths"
    title = "When the answer appears"
    words = "Mean over the text at each depth, of every lens that was read. Dashed and dotted: the lens's own held-out text."
    depends = ("run", "result", "lens_colour")
    height = 320

    def measure(self, scene: Scene) -> str:
        return MEAN_OF[scene.view.lens_colour]

    def values(self, scene: Scene) -> np.ndarray:
        """Means [lens, depth]."""
        arrays = [self.array(scene, f"{lens}.{self.measure(scene)}") for lens in shown_lenses(self.result(scene))]
        means = []
        for each in arrays:
            counted = np.isfinite(each)
            total = np.where(counted, each, 0).sum(1, dtype=np.float64)
            means.append(np.where(counted.any(1), total / np.maximum(counted.sum(1), 1), np.nan))
        return np.stack(means)

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        depths = self.depths(scene)
        series = [
            (LENSES[lens], depths, line)
            for lens, line in zip(shown_lenses(self.result(scene)), self.values(scene), strict=True)
        ]
        training = self.results(scene)["training"]
        if training and self.measure(scene) == "divergence":
            series += [("logit lens, held-out", training["depths"], training["logit_lens"]),
                       ("tuned lens, held-out", training["depths"], training["held_out"])]  # fmt: skip
        return depth_lines(series, theme, panel=self.id, title=MEAN_TITLES[self.measure(scene)], whole=depths)

    def table(self, scene: Scene) -> Table:
        lenses, values = shown_lenses(self.result(scene)), self.values(scene)
        rows: Iterator[list[str | float]] = (
            [depth, *values[:, d].tolist()] for d, depth in enumerate(self.depths(scene))
        )
        return ["after", *(LENSES[lens] for lens in lenses)], rows

    def facts(self, scene: Scene) -> list[str]:
        facts = [self.target_words(scene)] if self.measure(scene) in ("loss", "rank") else []
        training = self.results(scene)["training"]
        return [*facts, f"tuned lens: {training['steps']} steps"] if training else facts

    def snippet_body(self, scene: Scene) -> str:
        measure = self.measure(scene)
        target = 'run.manifest["results"]["answer"]' if self.settings(scene)["target"] == "answer" else "None"
        lenses = ["None", 'load_lens(RunStore().open(asked["lens"]))'][: len(shown_lenses(self.result(scene)))]
        opening = self.opening(scene).rsplit("\n", 1)[0]
        return f"""
{opening}
readings = [reading_of(model, tokens, lens, target={target}) for lens in [{", ".join(lenses)}]]
values = np.stack([reading.mean("{measure}").numpy() for reading in readings])
"""


class AttributionPanel(LensPanel):
    """A panel over the attribution of logit A − logit B."""

    depends = ("run", "result")

    def record(self, scene: Scene) -> dict:
        """The attribution. NothingToShow, in the probe's words, for a model that has none."""
        record = self.results(scene)["attribution"]
        if not record["components"]:
            raise NothingToShow("This model has no direct attribution", record["refused"])
        return record

    def difference(self, scene: Scene) -> str:
        """`logit ‘a’ − logit ‘b’`."""
        results = self.results(scene)
        names = [
            None if i is None else f"logit ‘{visible_text(self.name(scene, i))}’"
            for i in (results["answer"], results["wrong"])
        ]
        return " − ".join(name for name in names if name)

    def facts(self, scene: Scene) -> list[str]:
        record = self.record(scene)
        parts, where = float(self.array(scene, "contributions").sum()), "at" if self.here(scene) else "after"
        facts = [
            f"{self.difference(scene)} {where} token {token_label(scene.tokens, self.settings(scene)['at'])}",
            f"components {number(parts)} + constant {number(record['constant'])} = {number(parts + record['constant'])}",
            f"the model's own: {number(record['total'])}",
        ]
        return [*facts, f"mixers whole: {record['heads_refused']}"] if record["heads_refused"] else facts


class Contributions(AttributionPanel):
    """One bar per component."""

    id = "lens-parts"
    title = "Who wrote it: logit A − logit B by component"
    words = (
        "Direct attribution: the bars sum to the model's own difference. What a head feeds to later ones is not in it."
    )

    def pixels_high(self, scene: Scene) -> int:
        return 90 + 19 * len(self.bars(scene)[0])

    def values(self, scene: Scene) -> np.ndarray:
        """Contributions [component], the constant last."""
        return np.append(self.array(scene, "contributions"), self.record(scene)["constant"])

    def bars(self, scene: Scene) -> tuple[list[str], np.ndarray]:
        """Names and values in the order of the forward pass; the small ones of many as one bar."""
        values = self.values(scene)
        names = [*(c["name"] for c in self.record(scene)["components"]), "constant"]
        if len(values) <= MOST_BARS:
            return names, values
        kept = np.sort(np.argsort(-np.abs(values), kind="stable")[: MOST_BARS - 1])
        rest = np.setdiff1d(np.arange(len(values)), kept)
        return [*(names[i] for i in kept.tolist()), f"{len(rest)} smaller ones"], np.append(
            values[kept], values[rest].sum()
        )

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        names, values = self.bars(scene)
        return component_bars(names, values, theme, panel=self.id, title="logits")

    def table(self, scene: Scene) -> Table:
        names = [*(c["name"] for c in self.record(scene)["components"]), "constant"]
        rows = [[name, float(value)] for name, value in zip(names, self.values(scene), strict=True)]
        return ["component", "logits"], iter([*rows, ["sum", float(self.values(scene).sum())]])

    def summary(self, scene: Scene) -> str:
        names, values = self.bars(scene)
        top = int(np.argmax(np.abs(values)))
        return f"The largest contribution to {self.difference(scene)} is {number(float(values[top]))}, of {names[top]}."

    def snippet_body(self, scene: Scene) -> str:
        return f"""
{self.opening(scene)}
record, parts = parts_of(model, tokens, run.manifest["results"]["answer"], run.manifest["results"]["wrong"], asked["at"])
values = np.append(parts, record["constant"])
"""


class HeadContributions(AttributionPanel):
    """The same by layer and head, with MLPs and whole mixers in columns of their own."""

    id = "lens-heads"
    title = "Who wrote it: by layer and head"
    words = "The same contributions, one row per layer. Click a cell to choose the layer and head."

    def axes(self, scene: Scene) -> tuple[list, list[str]]:
        """Depths (a layer, or [layer, step]) and the names of the columns."""
        parts = [c for c in self.record(scene)["components"] if c["layer"] is not None]
        depths: list = []
        for part in parts:
            if part["layer"] not in depths:
                depths.append(part["layer"])
        heads = max((part["head"] for part in parts if part["head"] is not None), default=-1) + 1
        kinds = {part["kind"] for part in parts}
        return depths, [*map(str, range(heads)), *(words for kind, words in COLUMN_NAMES.items() if kind in kinds)]

    def values(self, scene: Scene) -> np.ndarray:
        depths, columns = self.axes(scene)
        found = np.full((len(depths), len(columns)), np.nan)
        for part, value in zip(self.record(scene)["components"], self.array(scene, "contributions"), strict=True):
            if part["layer"] is not None:
                name = str(part["head"]) if part["head"] is not None else COLUMN_NAMES[part["kind"]]
                found[depths.index(part["layer"]), columns.index(name)] = value
        return found

    def pixels_high(self, scene: Scene) -> int:
        return 90 + max(16, min(34, 560 // len(self.axes(scene)[0]))) * len(self.axes(scene)[0])

    def rows(self, scene: Scene) -> list[str]:
        return [str(d) if isinstance(d, int) else f"{d[0]}·{d[1]}" for d in self.axes(scene)[0]]

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        depths, columns = self.axes(scene)
        layers = [d if isinstance(d, int) else d[0] for d in depths]
        choices = {"y": [{"layer": layer or None} for layer in layers],
                   "x": [{"head": int(name) or None} if name.isdigit() else {} for name in columns]}  # fmt: skip
        return head_map(
            self.values(scene), self.rows(scene), columns, theme, panel=self.id, unit="logits", choices=choices
        )

    def table(self, scene: Scene) -> Table:
        lines = zip(self.rows(scene), self.values(scene).tolist(), strict=True)
        rows: Iterator[list[str | float]] = ([name, *line] for name, line in lines)
        return ["layer", *self.axes(scene)[1]], rows

    def snippet_body(self, scene: Scene) -> str:
        depths, columns = self.axes(scene)
        return f"""
{self.opening(scene)}
record, parts = parts_of(model, tokens, run.manifest["results"]["answer"], run.manifest["results"]["wrong"], asked["at"])
depths, columns = {[tuple(d) if isinstance(d, list) else d for d in depths]}, {columns}
values = np.full((len(depths), len(columns)), np.nan)
for part, value in zip(record["components"], parts):
    if part["layer"] is not None:
        name = str(part["head"]) if part["head"] is not None else {COLUMN_NAMES}[part["kind"]]
        values[depths.index(part["layer"]), columns.index(name)] = value
"""


class StreamCosine(LensPanel, PicturePanel):
    """How far the stream has turned to where it ends."""

    id = "lens-cosine"
    title = "Direction of the residual stream"
    words = "Cosine of the stream after each layer with the final stream, at each token."
    depends = ("run", "result")
    height = 220

    def shape(self, scene: Scene) -> tuple[int, int]:
        rows, columns = self.array(scene, "resid_cosine").shape
        return rows, columns

    def block(self, scene: Scene, rows: Span, columns: Span) -> np.ndarray:
        return self.array(scene, "resid_cosine")[slice(*rows), slice(*columns)]

    def pooled(self, scene: Scene, size: int) -> np.ndarray:
        return pool(np.asarray(self.array(scene, "resid_cosine")), size, size, "max")

    def colours(self, scene: Scene, theme: Theme) -> Colours:
        return Colours(theme.table_name(True), 1.0, "linear", True, "cosine")

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        rows, columns = self.shape(scene)
        figure = picture(
            self.address(scene, theme), Axis("token", columns, "query", scene.tokens), Axis("after layer", rows, "depth"), (0, columns),
            (0, rows), self.colours(scene, theme), theme, panel=self.id, meta={"click": "depth"},
        )  # fmt: skip
        names, places = self.depths(scene), list(range(0, rows, max(1, rows // 12)))
        figure.update_yaxes(tickvals=[p + 0.5 for p in places], ticktext=[depth_label(names[p]) for p in places])
        figure.update_layout(margin_l=MARGIN - 16)
        return figure

    def place(self, scene: Scene, row: int, column: int) -> list[tuple[str, str]]:
        return [("after", self.depths(scene)[row]), ("at", token_label(scene.tokens, column))]

    def snippet_body(self, scene: Scene) -> str:
        return f"{self.opening(scene)}\nvalues = stream_shape(model, tokens)[1]  # depth, pos"


def target_of(run: Run) -> tuple[str, str]:
    """What the form held for tokens A and B."""
    asked = run.manifest["settings"]
    return asked["answer"] or "", asked["wrong"] or ""


PANELS = (LensGrid(), LensCell(), LensDepths(), Contributions(), HeadContributions(), StreamCosine())
