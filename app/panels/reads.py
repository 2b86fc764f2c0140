"""Panels of the Reads page: from a logit to layer, head and past token, and from one score to the neurons that match."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from app.figures.common import Colours, number, token_label, visible_text
from app.figures.reads import matching_neurons, read_map, top_reads
from app.measure.reads import KIND
from app.panels.base import FigurePanel, NothingToShow, Span, StripPanel, Table, scale_words
from app.panels.results import HeadsOverTokens, OfOpenRun
from app.panels.synapses import reader
from app.services import Scene
from app.theme import Theme

SHOWN_READS, SHOWN_PAIRS = 20, 16
Read = tuple[int, int, int]
"""(layer, head, past token)."""


class ReadPanel(OfOpenRun):
    """A panel over what one token of the open run reads."""

    kind = KIND
    start = "Pin a token that has read something, and press Read in the form on this page."

    def contributions(self, scene: Scene) -> np.ndarray:
        """What reading each past token adds to the logit: [layer, head, pos] for the positions before the token."""
        return np.asarray(self.array(scene, "contributions"), np.float64)

    def best(self, scene: Scene, most: int = SHOWN_READS) -> list[Read]:
        """Readings by the size of what they add, largest first; those that add nothing are left out."""
        values = self.contributions(scene)
        order = np.argsort(-np.abs(values), axis=None, kind="stable")[:most]
        places = np.stack(np.unravel_index(order, values.shape), 1).tolist()
        return [(layer, head, past) for layer, head, past in places if values[layer, head, past] != 0]

    def chosen(self, scene: Scene) -> Read:
        """The reading that the view names, else the largest. NothingToShow where nothing was read."""
        layers, heads, past = self.contributions(scene).shape
        view = scene.view
        if view.key is not None and view.layer < layers and view.head < heads and view.key < past:
            return view.layer, view.head, view.key
        found = self.best(scene)
        if not found:
            raise NothingToShow("Nothing was read", "No reading of this token changes this logit.")
        return found[0]

    def asked(self, scene: Scene) -> str:
        """Which logit after which token."""
        settings, results = self.settings(scene), self.results(scene)
        rank = results["rank"]
        place = "the likeliest" if rank == 0 else f"{rank} are likelier"
        return (
            f"logit of ‘{visible_text(results['symbol'])}’ after token {token_label(scene.tokens, settings['at'])}: "
            f"{number(results['logit'])}, {place}"
        )

    def again(self, scene: Scene) -> str:
        """Python that reads again."""
        return f"""
from probes.bdh import read_circuit

model, asked = models.load("{self.result(scene).model["name"]}"), run.manifest["settings"]
found = read_circuit(model, run.manifest["text"], logit=asked["logit"], at=asked["at"])
""".strip()


class ReadMap(ReadPanel, HeadsOverTokens):
    """All readings at a glance."""

    id = "read-map"
    title = "What reading each token adds to the logit"
    words = "Row = layer and head that reads, column = token that is read. Click a cell to see which neurons match, drag to zoom."
    depends = ("run", "result", "scale", "columns")

    def by_head(self, scene: Scene) -> np.ndarray:
        return self.contributions(scene)

    def spans(self, scene: Scene) -> tuple[Span, Span]:
        rows, past = self.shape(scene)
        start, stop = scene.view.columns or (0, past)
        return (0, rows), (start, min(stop, past)) if start < past else (0, past)

    def colours(self, scene: Scene, theme: Theme) -> Colours:
        return Colours(theme.table_name(True), self.limit(scene), scene.view.scale, True, "logits")

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        _, columns = self.spans(scene)
        tokens = scene.tokens[: self.shape(scene)[1]]
        return read_map(
            self.address(scene, theme), tokens, self.heads(scene), columns, self.colours(scene, theme), theme, panel=self.id
        )  # fmt: skip

    def place(self, scene: Scene, row: int, column: int) -> list[tuple[str, str]]:
        layer, head = self.heads(scene)[row]
        score = float(self.array(scene, "scores")[layer, head, column])
        return [("head", f"{layer}·{head}"), ("reads", token_label(scene.tokens, column)), ("with S =", number(score))]

    def table(self, scene: Scene) -> Table:
        _, (start, stop) = self.spans(scene)
        headers = ["layer·head", *(token_label(scene.tokens, place) for place in range(start, stop))]
        names = [f"{layer}·{head}" for layer, head in self.heads(scene)]
        return headers, ([name, *map(float, line)] for name, line in zip(names, self.values(scene), strict=True))

    def facts(self, scene: Scene) -> list[str]:
        sums = self.contributions(scene).sum((1, 2))
        return [
            self.asked(scene),
            f"the last layer adds {number(float(sums[-1]))}, exact with the norms’ scales as they were; "
            f"lower ones {number(float(sums[:-1].sum()))}, to first order",
            scale_words(scene.view.scale),
        ]

    def snippet_body(self, scene: Scene) -> str:
        _, (start, stop) = self.spans(scene)
        return f"{self.again(scene)}\nvalues = found.contributions[0].flatten(0, 1).numpy()[:, {start}:{stop}]  # head, past token"


class ReadStrip(ReadPanel, StripPanel):
    """The text, coloured by what it adds."""

    id = "read-strip"
    title = "What it reads, in the text"
    words = "What each past token adds to the logit, over all layers and heads. Click a token to pin it, and Read to ask about that one."
    depends = ("run", "result")
    unit = "logits"

    def signed(self, scene: Scene) -> bool:
        return True

    def scale(self, scene: Scene) -> str:
        return "sqrt"

    def values(self, scene: Scene) -> np.ndarray:
        read = self.contributions(scene).sum((0, 1))
        return np.concatenate([read, np.full(scene.n_tokens - len(read), np.nan)])

    def facts(self, scene: Scene) -> list[str]:
        return [self.asked(scene), f"in all {number(float(np.nansum(self.values(scene))))}"]

    def snippet_body(self, scene: Scene) -> str:
        return f"""
{self.again(scene)}
values = np.full({scene.n_tokens}, np.nan)
values[: asked["at"]] = found.contributions[0].double().sum((0, 1)).numpy()
"""


class TopReads(ReadPanel, FigurePanel):
    """The readings that matter most."""

    id = "top-reads"
    title = "The readings that matter most"
    words = "Which head of which layer reads which token. Click a bar to see the neurons behind it."
    depends = ("run", "result", "layer", "head", "key")
    height = 400

    def values(self, scene: Scene) -> np.ndarray:
        values = self.contributions(scene)
        self.chosen(scene)  # says so when nothing was read
        return np.array([values[each] for each in self.best(scene)])

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        found, chosen = self.best(scene), self.chosen(scene)
        labels = [f"{layer}·{head} reads {token_label(scene.tokens, past)}" for layer, head, past in found]
        changes = [{"layer": layer or None, "head": head or None, "k": past} for layer, head, past in found]
        selected = found.index(chosen) if chosen in found else None
        return top_reads(labels, self.values(scene), changes, theme, panel=self.id, selected=selected)

    def table(self, scene: Scene) -> Table:
        scores = self.array(scene, "scores")
        return ["layer", "head", "token", "text", "score S", "added to the logit"], (
            [str(layer), str(head), str(past), visible_text(scene.tokens[past]), float(scores[layer, head, past]), float(value)]
            for (layer, head, past), value in zip(self.best(scene), self.values(scene), strict=True)
        )  # fmt: skip

    def facts(self, scene: Scene) -> list[str]:
        values = self.values(scene)
        rest = float(self.contributions(scene).sum()) - float(values.sum())
        return [self.asked(scene), f"these add {number(float(values.sum()))}, all others {number(rest)}"]

    def snippet_body(self, scene: Scene) -> str:
        return f"{self.again(scene)}\nvalues = np.array([value for *_, value in found.top({len(self.values(scene))})])"


class ReadPairs(ReadPanel, FigurePanel):
    """Which neurons make the chosen score."""

    id = "read-pairs"
    title = "Which neurons match"
    words = (
        "The chosen reading’s score S by pair of neurons that rotate together. Alike: one neuron fired at both tokens."
    )
    depends = ("run", "result", "layer", "head", "key")
    height = 400

    def pairs(self, scene: Scene) -> dict[str, np.ndarray]:
        """All pairs of the chosen reading: `score`, `same` and `cross`, each [pair]."""
        layer, head, past = self.chosen(scene)
        return reader(scene).matching_pairs(layer, head, self.settings(scene)["at"], past)

    def order(self, scene: Scene, most: int = SHOWN_PAIRS) -> np.ndarray:
        """The pairs that match, largest first."""
        score = self.pairs(scene)["score"]
        return np.argsort(-np.abs(score), kind="stable")[: min(most, int((score != 0).sum()))]

    def values(self, scene: Scene) -> np.ndarray:
        found, order = self.pairs(scene), self.order(scene)
        if not len(order):
            raise NothingToShow("No neurons match", "No pair of neurons fired at both tokens: this score is 0.")
        return np.stack([found[part][order] for part in ("score", "same", "cross")])

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        _, same, cross = self.values(scene)
        labels = [f"{2 * pair}, {2 * pair + 1}" for pair in self.order(scene).tolist()]
        return matching_neurons(labels, same, cross, theme, panel=self.id)

    def excited_by(self, scene: Scene, pair: int) -> str:
        """Tokens that excite the neurons of a pair directly; empty where it was not put into words."""
        _, head, _ = self.chosen(scene)
        says = self.results(scene)["says"]
        found = [says.get(f"{head}.{2 * pair + side}") for side in (0, 1)]
        return " / ".join(" ".join(visible_text(word) for word, _ in each["excited by"]) for each in found if each)

    def table(self, scene: Scene) -> Table:
        pairs = self.order(scene).tolist()
        return ["neurons", "score", "fired alike", "by rotation", "excited by"], (
            [f"{2 * pair}, {2 * pair + 1}", *map(float, values), self.excited_by(scene, pair)]
            for pair, values in zip(pairs, self.values(scene).T, strict=True)
        )

    def facts(self, scene: Scene) -> list[str]:
        layer, head, past = self.chosen(scene)
        found, shown = self.pairs(scene), self.values(scene)
        added = float(self.contributions(scene)[layer, head, past])
        return [
            f"layer {layer}, head {head} reads token {token_label(scene.tokens, past)}",
            f"S = {number(float(found['score'].sum()))}, of it by rotation {number(float(found['cross'].sum()))}; adds {number(added)} to "
            "the logit",
            f"{shown.shape[1]} of {int((found['score'] != 0).sum())} pairs that match, together {number(float(shown[0].sum()))}",
            "x as stored, in half precision",
        ]

    def snippet_body(self, scene: Scene) -> str:
        layer, head, past = self.chosen(scene)
        return f"""
from workbench.lab.run_synapses import RunSynapses

asked = run.manifest["settings"]
found = RunSynapses(RunStore().open(asked["run"])).matching_pairs({layer}, {head}, asked["at"], {past})
order = np.argsort(-np.abs(found["score"]), kind="stable")[:{self.values(scene).shape[1]}]
values = np.stack([found[part][order] for part in ("score", "same", "cross")])
"""


MAP, STRIP, TOP, PAIRS = PANELS = (ReadMap(), ReadStrip(), TopReads(), ReadPairs())
