"""Panels of mixers that carry a state of fixed size: what it holds after a token, how it grows and fades, entries over time.

What is shown is the chosen one of the layer's states (`Scene.slot`), whose axes its mixer declares.
"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from app.figures.common import Colours, number, token_label, token_lines
from app.figures.state import rank_words, signal_raster, singular_values, state_norms, state_picture, tracked_entries
from app.panels.attention_rows import head_words
from app.panels.base import FigurePanel, NothingToShow, PicturePanel, Span, Table, scale_words
from app.panels.words import is_shared, memory_words, row_and_column, slot_words, state_axes
from app.services import Scene
from app.theme import Theme
from app.view_state import POOLINGS, clamp_span
from workbench.lab.factors import state_slots
from workbench.lab.pooling import pool

SAMPLED_TIMES = 16
STATE_FIELDS = ("run", "layer", "slot", "head", "query", "position")


def has_state(scene: Scene) -> bool:
    """Whether the chosen layer's factors give a state of fixed size."""
    layer, run = scene.layer, scene.run
    if layer is None or run is None:
        return False
    if layer.get("form") in ("gated_linear", "delta"):
        return run.has(f"layer.{layer['layer']}.value")
    return layer.get("form") == "dense" and run.has(f"layer.{layer['layer']}.states")


def check_state(panel: FigurePanel, scene: Scene) -> None:
    """NothingToShow unless the chosen layer has a state of fixed size."""
    panel.check(scene)
    if not has_state(scene):
        with_one = [str(layer["layer"]) for layer in scene.layers if state_slots(layer)]
        elsewhere = f" Layers that have one: {', '.join(with_one)}." if with_one else ""
        raise NothingToShow(
            "No state of fixed size in this layer", memory_words(scene.layer or {"form": None}) + elsewhere
        )


def axes_of(scene: Scene) -> list[str]:
    """What the axes of the shown state are, in words."""
    return state_axes(scene.slot, neurons=scene.opened().has(f"layer.{scene.view.layer}.x"))


def place_words(scene: Scene, row: int, column: int) -> list[tuple[str, str]]:
    """Where an entry of the state as it is drawn lies, by the state's own axes."""
    axes, shape = axes_of(scene), list(scene.slot.get("shape", ()))[1:]
    if len(axes) < 2:
        return [(axes[0], str(row))] if axes else []
    rows = np.unravel_index(row, shape[:-1]) if len(shape) == len(axes) else (row,)
    return [*zip(axes[:-1], map(str, rows), strict=False), (axes[-1], str(column))]


def entry_words(scene: Scene, row: int, column: int) -> str:
    """`[2, 5]`, or `[2]` in a vector."""
    return f"[{row}, {column}]" if len(axes_of(scene)) > 1 else f"[{row}]"


def slot_facts(scene: Scene) -> list[str]:
    """Facts that name the shown state where the layer carries several, or where heads share one."""
    facts = [f"shown: {slot_words(scene.slot['name'])}"] if len(scene.slots) > 1 else []
    shared = is_shared(scene.slot, scene.layer or {})
    return [*facts, "one state for the whole layer"] if shared else facts


def asked(scene: Scene) -> str:
    """The Python expression for the factors whose state is shown."""
    first = not scene.slots or scene.slot["name"] == scene.slots[0]["name"]
    return "factors" if first else f'factors.slot("{scene.slot["name"]}")'


def compared(scene: Scene) -> int | None:
    """The position to compare with, when it is another one than the shown."""
    return scene.view.compare if scene.view.compare != scene.position else None


class StatePicture(PicturePanel):
    """The state after one token, or what changed between two."""

    id = "state"
    title = "What the memory holds"
    words = "The state after the chosen token. Click a cell to follow that entry over time; drag to zoom."
    depends = (*STATE_FIELDS, "compare", "state_rows", "state_columns", "pooling", "scale", "tracked")
    height = 440
    zoom = ("srows", "scols")

    def _state(self, scene: Scene, position: int) -> np.ndarray:
        view = scene.view
        key = ("state", view.layer, view.slot, view.head, position)
        return scene.once(*key, make=lambda: scene.state_factors().state(view.head, position))

    def _whole(self, scene: Scene) -> np.ndarray:
        check_state(self, scene)
        other = compared(scene)
        if other is None:
            return self._state(scene, scene.position)
        return scene.state_factors().state_difference(scene.view.head, other, scene.position)

    def shape(self, scene: Scene) -> tuple[int, int]:
        rows, columns = self._whole(scene).shape
        return rows, columns

    def spans(self, scene: Scene) -> tuple[Span, Span]:
        rows, columns = self.shape(scene)
        view = scene.view
        return clamp_span(view.state_rows, rows) or (0, rows), clamp_span(view.state_columns, columns) or (0, columns)

    def block(self, scene: Scene, rows: Span, columns: Span) -> np.ndarray:
        return self._whole(scene)[slice(*rows), slice(*columns)]

    def pooled(self, scene: Scene, size: int) -> np.ndarray:
        return pool(self.block(scene, *self.spans(scene)), size, size, scene.view.pooling)

    def _limit(self, scene: Scene) -> float:
        """The largest magnitude among some times and the shown one: the colours then hold still while time plays."""
        view, last = scene.view, scene.n_tokens - 1
        times = sorted({round(t) for t in np.linspace(0, last, SAMPLED_TIMES)})

        def sampled() -> float:
            found = [0.0]
            for time in times:
                try:
                    found.append(float(np.abs(scene.state_factors().state(view.head, time)).max()))
                except ValueError:
                    continue  # a dense layer stores states at some positions only
            return max(found)

        largest = scene.once("state-limit", view.layer, view.slot, view.head, make=sampled)
        return max(largest, float(np.abs(self._whole(scene)).max()))

    def colours(self, scene: Scene, theme: Theme) -> Colours:
        scale = scene.view.scale
        unit = "entry" if compared(scene) is None else "change"
        return Colours(theme.table_name(True), 1.0 if scale == "row" else self._limit(scene), scale, True, unit)

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        rows, columns = self.spans(scene)
        return state_picture(
            self.address(scene, theme), self.shape(scene), row_and_column(axes_of(scene)), rows, columns,
            self.colours(scene, theme), theme, panel=self.id, tracked=scene.view.tracked,
        )  # fmt: skip

    def place(self, scene: Scene, row: int, column: int) -> list[tuple[str, str]]:
        return [*place_words(scene, row, column), ("after", token_label(scene.tokens, scene.position))]

    def facts(self, scene: Scene) -> list[str]:
        other = compared(scene)
        shown = f"after token {token_label(scene.tokens, scene.position)}"
        if other is not None:
            shown = f"state {shown} minus state after token {token_label(scene.tokens, other)}"
        rows, columns = self.shape(scene)
        facts = [*head_words(scene), *slot_facts(scene), shown, f"{rows} × {columns}", scale_words(scene.view.scale)]
        down, across = self.binning(scene)
        if max(down, across) > 1:
            facts.append(f"one picture cell = up to {down} × {across} entries, drawn by {POOLINGS[scene.view.pooling]}")
        return facts

    def snippet_body(self, scene: Scene) -> str:
        (r0, r1), (c0, c1) = self.spans(scene)
        other, head = compared(scene), scene.view.head
        whole = f"{asked(scene)}.state({head}, {scene.position})"
        if other is not None:
            whole = f"{asked(scene)}.state_difference({head}, {other}, {scene.position})"
        return f"values = {whole}[{r0}:{r1}, {c0}:{c1}]  # {', '.join(filter(None, row_and_column(axes_of(scene))))}"


class Spectrum(FigurePanel):
    """Singular values of the state."""

    id = "spectrum"
    title = "How many directions it uses"
    words = "Singular values of the state. A steep fall means that few directions carry the memory."
    depends = (*STATE_FIELDS, "compare")
    height = 250

    def _spectrum(self, scene: Scene, position: int) -> np.ndarray:
        key = ("spectrum", scene.view.layer, scene.view.slot, scene.view.head, position)
        return scene.once(*key, make=lambda: scene.state_factors().state_spectrum(scene.view.head, position))

    def values(self, scene: Scene) -> np.ndarray:
        check_state(self, scene)
        if len(axes_of(scene)) < 2:
            raise NothingToShow(
                "A vector has one direction", "This state is a vector or a number, so it has no spectrum."
            )
        return self._spectrum(scene, scene.position)

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        values, other = self.values(scene), compared(scene)
        second = None if other is None else self._spectrum(scene, other)
        names = (f"after token {scene.position}", f"after token {other}")
        return singular_values(values, second, theme, panel=self.id, names=names)

    def table(self, scene: Scene) -> Table:
        return ["rank", "singular value"], ([str(i + 1), float(v)] for i, v in enumerate(self.values(scene)))

    def facts(self, scene: Scene) -> list[str]:
        joined = axes_of(scene)[:-1]
        return [
            *head_words(scene), *slot_facts(scene), f"after token {token_label(scene.tokens, scene.position)}",
            rank_words(self.values(scene)), *([f"rows are {' × '.join(joined)}"] if len(joined) > 1 else []),
        ]  # fmt: skip

    def snippet_body(self, scene: Scene) -> str:
        return f"values = {asked(scene)}.state_spectrum({scene.view.head}, {scene.position})"


class StateNorms(FigurePanel):
    """Size of the state over time."""

    id = "state-norms"
    title = "How full the memory is"
    words = "Frobenius norm of every state of the layer after every token. Click to move to that time."
    depends = ("run", "layer", "slot", "head")
    height = 250

    def _n_states(self, scene: Scene) -> int:
        """States of the chosen kind that the layer has: one per head, or one that all share."""
        return 1 if is_shared(scene.slot, scene.layer or {}) else scene.heads_per_layer[scene.view.layer]

    def _stored(self, scene: Scene) -> str:
        """The array of the run that holds the norms; "" where they are evaluated."""
        name = f"state_norm.{scene.view.layer}"
        return name if asked(scene) == "factors" and scene.opened().has(name) else ""

    def values(self, scene: Scene) -> np.ndarray:
        check_state(self, scene)
        count, stored, factors = self._n_states(scene), self._stored(scene), scene.state_factors()
        if stored:
            return np.asarray(scene.opened().array(stored))[:count]
        key = ("norms", scene.view.layer, scene.view.slot)
        return scene.once(*key, make=lambda: np.stack([factors.state_norms(state) for state in range(count)]))

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        values = self.values(scene)
        return state_norms(values, scene.tokens, min(scene.view.head, len(values) - 1), theme, panel=self.id)

    def facts(self, scene: Scene) -> list[str]:
        return [*head_words(scene), *slot_facts(scene)]

    def snippet_body(self, scene: Scene) -> str:
        count, stored = self._n_states(scene), self._stored(scene)
        if stored:
            return f'values = run.array("{stored}")[:{count}]  # head, pos'
        return f"values = np.stack([{asked(scene)}.state_norms(head) for head in range({count})])"

    def summary(self, scene: Scene) -> str:
        values = self.values(scene)
        norms = values[min(scene.view.head, len(values) - 1)]
        top = int(np.nanargmax(norms))
        return f"The norm is largest, {number(norms[top])}, after token {token_label(scene.tokens, top)}."


class Decay(PicturePanel):
    """How much of the state each token keeps."""

    id = "decay"
    title = "What is kept, what is forgotten"
    words = "Share of the state that survives each token, per head: 1 keeps everything, 0 forgets everything."
    depends = ("run", "layer")
    height = 210

    def _kept(self, scene: Scene) -> np.ndarray:
        self.check(scene)
        run, name = scene.opened(), f"layer.{scene.view.layer}.log_decay"
        if not run.has(name):
            if (scene.layer or {}).get("form") in ("gated_linear", "delta"):
                raise NothingToShow(
                    "Nothing is forgotten", "This layer has no decay: what was written stays at full strength."
                )
            raise NothingToShow(
                "No single decay per token",
                "What this layer forgets is no one factor per head and token; its gates and norms show it.",
            )
        kept = np.exp(run.array(name))
        return kept if kept.ndim == 2 else kept.mean(-1)  # one per row of the state: their mean

    def shape(self, scene: Scene) -> tuple[int, int]:
        rows, columns = self._kept(scene).shape
        return rows, columns

    def block(self, scene: Scene, rows: Span, columns: Span) -> np.ndarray:
        return self._kept(scene)[slice(*rows), slice(*columns)]

    def pooled(self, scene: Scene, size: int) -> np.ndarray:
        # What matters is the most that is lost; pooling 1 − kept by its largest keeps a single reset visible.
        return 1 - pool(1 - self._kept(scene), 4 * size, size, "max")

    def colours(self, scene: Scene, theme: Theme) -> Colours:
        return Colours(theme.table_name(False), 1.0, "linear", False, "kept per token")

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        heads, tokens = self.shape(scene)
        return signal_raster(self.address(scene, theme), scene.tokens, heads, (0, tokens), self.colours(scene, theme), theme,
                             panel=self.id)  # fmt: skip

    def place(self, scene: Scene, row: int, column: int) -> list[tuple[str, str]]:
        return [("head", str(row)), ("at", token_label(scene.tokens, column))]

    def facts(self, scene: Scene) -> list[str]:
        kept = self._kept(scene)
        facts = [head_words(scene)[0], f"from {number(float(kept.min()))} to {number(float(kept.max()))}"]
        if scene.opened().array(f"layer.{scene.view.layer}.log_decay").ndim == 3:
            facts.append("mean over the rows of the state, which fade at rates of their own")
        if np.ptp(kept, axis=1).max() < 1e-6:
            facts.append("constant: this layer forgets at a fixed rate per head")
        return facts

    def snippet_body(self, scene: Scene) -> str:
        each = ".mean(-1)" if scene.opened().array(f"layer.{scene.view.layer}.log_decay").ndim == 3 else ""
        return f'values = np.exp(run.array("layer.{scene.view.layer}.log_decay")){each}  # head, pos'


class Signals(FigurePanel):
    """Other per-token signals of the chosen head: write strength, step size, gates."""

    id = "signals"
    title = "Gates and other signals"
    words = "What else the layer decides or measures at each token, for the chosen head."
    depends = ("run", "layer", "head")
    height = 250

    def _named(self, scene: Scene) -> list[tuple[str, str]]:
        """(label, array) of every per-token signal of the layer."""
        run, index = scene.opened(), scene.view.layer
        found = [("write strength", f"layer.{index}.write")] if run.has(f"layer.{index}.write") else []
        for signal in (scene.layer or {}).get("signals") or []:
            shape = run.arrays()[signal["array"]]["shape"]
            if len(shape) == 2 and shape[0] == (scene.layer or {})["n_heads"]:
                unit = f" ({signal['unit']})" if signal.get("unit") else ""
                found.append((f"{signal.get('label') or signal.get('name')}{unit}", signal["array"]))
        return found

    def values(self, scene: Scene) -> np.ndarray:
        self.check(scene)
        named = self._named(scene)
        if not named:
            raise NothingToShow(
                "No other signals", "This layer writes every token with the same strength and has no gates."
            )
        return np.stack([scene.opened().array(name)[scene.view.head] for _, name in named])

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        values = self.values(scene)
        series = list(zip([label for label, _ in self._named(scene)], values, strict=True))
        return token_lines(series, scene.tokens, theme, y_title="value", panel=self.id, role="position", click="position",
                           dashes=["solid", "dash", "dot", "dashdot"] * 8)  # fmt: skip

    def facts(self, scene: Scene) -> list[str]:
        return [*head_words(scene), *[label for label, _ in self._named(scene)]]

    def snippet_body(self, scene: Scene) -> str:
        names = [name for _, name in self._named(scene)]
        return f"values = np.stack([run.array(name)[{scene.view.head}] for name in {names}])  # signal, pos"


class TrackedEntries(FigurePanel):
    """The followed entries over time."""

    id = "tracked"
    title = "Followed entries over time"
    words = "Single entries of the state after every token, exactly. Each line has the colour of its mark above."
    depends = ("run", "layer", "slot", "head", "tracked")
    height = 250

    def entries(self, scene: Scene) -> list[tuple[int, int]]:
        """The followed entries that exist in this layer."""
        check_state(self, scene)
        shape = self._shape(scene)
        return [(row, column) for row, column in scene.view.tracked if row < shape[0] and column < shape[1]]

    def _shape(self, scene: Scene) -> tuple[int, int]:
        def last() -> tuple[int, int]:
            rows, columns = scene.state_factors().state(0, scene.n_tokens - 1).shape
            return rows, columns

        return scene.once("state-shape", scene.view.layer, scene.view.slot, make=last)

    def values(self, scene: Scene) -> np.ndarray:
        entries = self.entries(scene)
        if not entries:
            click = "Click a cell in the picture of the state, or " if len(axes_of(scene)) > 1 else "Click "
            raise NothingToShow("No entry is followed yet", f"{click}Follow in the list of its largest entries.")
        return np.stack([scene.state_factors().state_entry(scene.view.head, row, column) for row, column in entries])

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        names = [entry_words(scene, *entry) for entry in self.entries(scene)]
        return tracked_entries(names, self.values(scene), scene.tokens, theme, panel=self.id)

    def table(self, scene: Scene) -> Table:
        values = self.values(scene)
        headers = ["token", *(entry_words(scene, *entry) for entry in self.entries(scene))]
        return headers, ([token_label(scene.tokens, t), *map(float, values[:, t])] for t in range(values.shape[1]))

    def facts(self, scene: Scene) -> list[str]:
        return [*head_words(scene), *slot_facts(scene), *[entry_words(scene, *entry) for entry in self.entries(scene)]]

    def snippet_body(self, scene: Scene) -> str:
        head = scene.view.head
        return f"""
entries = {self.entries(scene)}  # (row, column)
values = np.stack([{asked(scene)}.state_entry({head}, row, column) for row, column in entries])
"""


PANELS = (StatePicture(), Spectrum(), StateNorms(), Decay(), Signals(), TrackedEntries())
