"""Panels of the Segments page: losses with the true, no and another text's state, and what each part of the state is worth."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import plotly.graph_objects as go

from app.figures.common import number, token_label, token_lines
from app.figures.segments import DASHES, boundary_map, numbered_lines
from app.measure.segments import KIND
from app.panels.base import NothingToShow, Table
from app.panels.results import ResultPanel, measured
from app.services import Scene
from app.theme import Theme

AGAIN = """
from probes.segments import segment_memory

asked = run.manifest["settings"]
found = segment_memory(models.load(asked["model"]), asked["text"], asked["length"], other=asked["other"], parts=asked["parts"])
"""
STATES = {"state": "true state", "none": "no state", "other": "another text's state"}
EARLY = 8
MEASURES = ("numbers", "bytes", "norm", "change", "cosine")
MEASURE_WORDS = ("numbers", "bytes", "norm", "relative change", "cosine with the last")


def chosen_boundary(scene: Scene) -> tuple[int, int] | None:
    """(index of the layer, segment) that the view names, if the measurement has it; else where cutting loses most, else the first."""
    found = measured(scene, KIND)
    if found is None:
        return None
    results = found.manifest["results"]
    layers, segments = len(results["layers"]), len(results["starts"])
    if scene.view.measured_head:
        layer, segment = (int(part) for part in scene.view.measured_head.split("."))
        if layer < layers and 0 < segment < segments:
            return layer, segment
    cut = results["lost_by_layer"].get("cut")
    if cut is None:
        return 0, 1
    layer, segment = divmod(int(np.nanargmax(np.array(cut, float))), segments)
    return layer, segment


class SegmentPanel(ResultPanel):
    """A panel over a text that was read in segments."""

    kind = KIND
    start = "Choose a model, a text and the length of its segments on this page, and press Start."

    def by_name(self, scene: Scene, name: str) -> dict[str, np.ndarray]:
        """A part of the results, by reading; nan where there is none."""
        return {reading: np.array(values, float) for reading, values in self.results(scene)[name].items()}

    def worth(self, scene: Scene) -> list[str]:
        """What the state is worth, in words."""
        found, said = (
            self.results(scene)["worth"],
            {"none": "the state saves", "other": "against another text’s it saves"},
        )
        return [
            f"{said[name]} {number(each['nats'])} nats per token [{number(each['low'])}, {number(each['high'])}]"
            for name, each in found.items()
        ]


class SegmentLosses(SegmentPanel):
    """Loss of every segment, read from three states."""

    id = "segments-loss"
    title = "Loss of every segment"
    words = "Nats per token, read on from the true state, from none (the segment by itself), and from the state of another text."
    height = 300

    def values(self, scene: Scene) -> np.ndarray:
        return np.stack(list(self.by_name(scene, "loss").values()))

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        series = {STATES[name]: values for name, values in self.by_name(scene, "loss").items()}
        return numbered_lines(series, theme, panel=self.id, x_title="segment", y_title="nats per token")

    def table(self, scene: Scene) -> Table:
        found = self.by_name(scene, "loss")
        starts = self.results(scene)["starts"]
        return ["segment", "first token", *(STATES[name] for name in found)], (
            [str(segment), str(start), *(float(values[segment]) for values in found.values())]
            for segment, start in enumerate(starts)
        )

    def summary(self, scene: Scene) -> str:
        return "; ".join(self.worth(scene))

    def facts(self, scene: Scene) -> list[str]:
        results, settings = self.results(scene), self.settings(scene)
        again = results["repeated"]
        return [
            f"{settings['model']}, {len(results['starts'])} segments of {results['length']} tokens", *self.worth(scene),
            *([f"the other text is shorter and was begun {again} times"] if again > 1 else []),
        ]  # fmt: skip

    def snippet_body(self, scene: Scene) -> str:
        return f"{AGAIN}values = np.stack([found.mean_loss(name) for name in found.loss])  # reading, segment"


class LostByPlace(SegmentPanel):
    """How far into a segment the state matters."""

    id = "segments-place"
    title = "How far into a segment it matters"
    words = "Nats lost without the true state, by place in the segment, mean over segments. The first token is predicted before."
    height = 260

    def values(self, scene: Scene) -> np.ndarray:
        return np.stack(list(self.by_name(scene, "lost_by_place").values()))

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        series = {STATES[name]: values for name, values in self.by_name(scene, "lost_by_place").items()}
        return numbered_lines(
            series, theme, panel=self.id, x_title="place in the segment", y_title="nats lost", lost=True
        )

    def table(self, scene: Scene) -> Table:
        found = self.by_name(scene, "lost_by_place")
        return ["place", *(STATES[name] for name in found)], (
            [str(place), *(float(values[place]) for values in found.values())]
            for place in range(1, self.results(scene)["length"])
        )

    def facts(self, scene: Scene) -> list[str]:
        return [f"without a state: {early_and_late(self.values(scene)[0])}"]

    def snippet_body(self, scene: Scene) -> str:
        return f'{AGAIN}values = np.stack([found.by_place(name) for name in found.loss if name != "state"])  # reading, place'


def early_and_late(lost: np.ndarray) -> str:
    """Nats lost at the first places of a segment and at all later ones, in words; `lost` [place], nan at 0."""
    first = min(EARLY, len(lost) // 2)
    early, late = (part[np.isfinite(part)] for part in (lost[: first + 1], lost[first + 1 :]))
    words = f"{number(float(early.mean()))} nats on each of the first {len(early)} tokens that count"
    return f"{words}, {number(float(late.mean()))} on each later one" if len(late) else words


class LostByToken(SegmentPanel):
    """Which tokens need the state."""

    id = "segments-tokens"
    title = "Which tokens need it"
    words = "Nats lost on every token without the true state. Gaps: the first segment, and the first token of every segment."
    height = 280

    def lost(self, scene: Scene) -> dict[str, np.ndarray]:
        """Nats lost by reading, [pos]."""
        count = len(self.results(scene)["strings"])
        true = self.array(scene, "loss.state")
        return {
            name: (self.array(scene, f"loss.{name}") - true).ravel()[:count] for name in self.results(scene)["worth"]
        }

    def values(self, scene: Scene) -> np.ndarray:
        return np.stack(list(self.lost(scene).values()))

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        series = [(STATES[name], values) for name, values in self.lost(scene).items()]
        return token_lines(
            series, self.results(scene)["strings"], theme, y_title="nats lost", panel=self.id, role="", click="",
            dashes=DASHES[1:], colours=theme.categorical[1:3],
        )  # fmt: skip

    def table(self, scene: Scene) -> Table:
        found, strings = self.lost(scene), self.results(scene)["strings"]
        true = self.array(scene, "loss.state").ravel()
        return ["token", "nats with the true state", *(f"lost with {STATES[name]}" for name in found)], (
            [token_label(strings, place), float(true[place]), *(float(values[place]) for values in found.values())]
            for place in range(len(strings))
        )

    def facts(self, scene: Scene) -> list[str]:
        lost, strings = self.lost(scene)["none"], self.results(scene)["strings"]
        place = int(np.nanargmax(lost))
        return [f"most at {token_label(strings, place)}: {number(float(lost[place]))} nats"]

    def snippet_body(self, scene: Scene) -> str:
        return f'{AGAIN}values = np.stack([found.along_text(name) for name in found.loss if name != "state"])  # reading, pos'


class BoundaryMap(SegmentPanel):
    """A map of parts of the state by boundary."""

    depends = ("run", "result", "measured_head")
    unit, signed, row_title, first = "nats per token", True, "layer", 1

    @abstractmethod
    def rows(self, scene: Scene) -> tuple[list[str], list[int]]:
        """Name and index of the layer of every row."""

    def pixels_high(self, scene: Scene) -> int:
        try:
            count = len(self.rows(scene)[0])
        except NothingToShow:
            return self.height
        return 90 + max(14, min(30, 560 // count)) * count

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        names, layers = self.rows(scene)
        return boundary_map(
            names, layers, self.values(scene), theme, panel=self.id, row_title=self.row_title, unit=self.unit, signed=self.signed,
            chosen=chosen_boundary(scene), numbered=scene.pixels >= 512, first=self.first,
        )  # fmt: skip

    def table(self, scene: Scene) -> Table:
        values, (names, _) = self.values(scene), self.rows(scene)
        segments = range(1, values.shape[1])
        return [self.row_title, *(f"segment {segment}" for segment in segments)], (
            [name, *map(float, line[1:])] for name, line in zip(names, values, strict=True)
        )

    def facts(self, scene: Scene) -> list[str]:
        values, (names, _) = self.values(scene), self.rows(scene)
        if not np.isfinite(values).any():
            return []
        row, segment = np.unravel_index(int(np.nanargmax(values)), values.shape)
        return [
            f"most: {self.row_title} {names[row]} at segment {segment}, {number(float(values[row, segment]))} {self.unit}"
        ]


class LayerMap(BoundaryMap):
    """Nats lost when one layer's part of the state is exchanged."""

    def __init__(self, reading: str, title: str, words: str) -> None:
        self.reading, self.id, self.title, self.words = reading, f"segments-layer-{reading}", title, words

    def values(self, scene: Scene) -> np.ndarray:
        return exchanged(self, scene, "lost_by_layer", self.reading)

    def rows(self, scene: Scene) -> tuple[list[str], list[int]]:
        names = self.results(scene)["layers"]
        return names, list(range(len(names)))

    def snippet_body(self, scene: Scene) -> str:
        return f'{AGAIN}values = found.by_layer("{self.reading}")  # layer, segment'


class SlotMap(BoundaryMap):
    """Nats lost when one tensor of the state is exchanged."""

    id = "segments-slots"
    title = "What each part of a layer’s state is worth"
    words = "Nats per token lost when this tensor alone comes from the other text. Click a cell to choose its layer and boundary."
    row_title = "layer.slot"

    def values(self, scene: Scene) -> np.ndarray:
        return exchanged(self, scene, "lost_by_slot", "other")

    def rows(self, scene: Scene) -> tuple[list[str], list[int]]:
        return slot_rows(self.results(scene))

    def snippet_body(self, scene: Scene) -> str:
        return f"{AGAIN}values = found.by_slot()  # slot, segment"


class StateChange(BoundaryMap):
    """How much the state changes from boundary to boundary."""

    id = "segments-change"
    title = "How much the state changes"
    words = "‖now − then‖ / ‖then‖ against the boundary before; of a cache that grew, the part that was there. Sizes are in the table."
    unit, signed, row_title, first = "relative change", False, "layer.slot", 2

    def values(self, scene: Scene) -> np.ndarray:
        if len(self.results(scene)["starts"]) < 3:
            raise NothingToShow("One boundary", "A change needs two: choose shorter segments or a longer text.")
        return self.array(scene, "change")

    def rows(self, scene: Scene) -> tuple[list[str], list[int]]:
        return slot_rows(self.results(scene))

    def table(self, scene: Scene) -> Table:
        found = [self.array(scene, name) for name in MEASURES]
        names, _ = self.rows(scene)
        return ["layer.slot", "segment", *MEASURE_WORDS], (
            [name, str(segment), *(float(each[row, segment]) for each in found)]
            for row, name in enumerate(names)
            for segment in range(1, found[0].shape[1])
        )

    def facts(self, scene: Scene) -> list[str]:
        sizes = self.array(scene, "numbers").sum(0)[1:]
        first, last = (f"{int(size):,}" for size in sizes[[0, -1]])
        said = (
            f"{first} numbers at every boundary"
            if first == last
            else f"{first} numbers at the first boundary, {last} at the last"
        )
        still = not np.nan_to_num(self.values(scene)).any()
        return [said, *(["what is there never changes, it only grows"] if still else super().facts(scene))]

    def snippet_body(self, scene: Scene) -> str:
        return f"{AGAIN}values = found.change  # slot, segment"


def exchanged(panel: SegmentPanel, scene: Scene, name: str, reading: str) -> np.ndarray:
    """What exchanging parts of the state lost. NothingToShow says what was not asked for."""
    found = panel.results(scene)[name].get(reading)
    if found is None:
        missing = "“layer by layer and slot by slot”" if not panel.settings(scene)["parts"] else "another text"
        raise NothingToShow(
            "Not asked for", f"This result was made without {missing}: give it in the form and start again."
        )
    return np.array(found, float)


def slot_rows(results: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Name and index of the layer of every tensor of the state."""
    names, layers = results["slots"], results["layers"]
    return names, [layers.index(name.rpartition(".")[0]) for name in names]


CUT = LayerMap(
    "cut", "What each layer’s memory is worth",
    "Nats per token lost when this layer alone is handed nothing and reads the segment by itself. Click a cell to choose it.",
)  # fmt: skip
FOREIGN = LayerMap(
    "other", "With another text’s memory in one layer",
    "Nats per token lost when this layer alone is handed the state of the other text. Click a cell to choose it.",
)  # fmt: skip
LOSSES, PLACE, TOKENS, SLOTS, CHANGE = (
    SegmentLosses(),
    LostByPlace(),
    LostByToken(),
    SlotMap(),
    StateChange(),
)
PANELS = (LOSSES, PLACE, TOKENS, CUT, FOREIGN, SLOTS, CHANGE)
