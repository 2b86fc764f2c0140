"""Panels of single heads and rows: the pinned token's row over the text, who is read, how each token reads, how far back."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from app.figures.attention import head_profiles, offset_profile
from app.figures.common import number, token_label
from app.panels.base import FigurePanel, NothingToShow, StripPanel, Table, TooLarge, scale_words
from app.panels.words import cell_word, is_signed, kind_words
from app.services import Scene, reads_source
from app.theme import Theme
from workbench.lab.factors import LayerFactors

ROW_SUM_TOKENS = 8192


def head_words(scene: Scene) -> list[str]:
    """Facts that name the drawn head."""
    layer = scene.layer or {}
    part = f"{scene.view.part} " if scene.view.part else ""
    return [f"{part}layer {scene.view.layer} ({kind_words(str(layer.get('kind')))})", f"head {scene.view.head}"]


def reader_words(scene: Scene) -> str:
    """Which token's row is drawn."""
    which = "pinned: token" if scene.view.query is not None else "none pinned: the last token,"
    return f"{which} {token_label(scene.tokens, scene.query)}"


def check_pattern(scene: Scene) -> LayerFactors:
    """The factors of the chosen layer; NothingToShow when the layer has no pattern."""
    if scene.layer is not None and scene.layer.get("form") is None:
        kind = kind_words(scene.layer["kind"])
        why = " ".join(scene.layer.get("not_stored") or ()) or (
            f"A {kind} layer is not linear in its values, so no matrix of weights describes it. The State page shows what it remembers."
        )
        raise NothingToShow("This layer has no token-to-token map", why)
    return scene.factors()


class QueryRow(StripPanel):
    """The row of the pinned token, written over the text."""

    id = "query-row"
    title = "What the pinned token reads from"
    words = "The text, each token coloured by the weight that the pinned token gives it. Click a token to pin it."
    depends = ("run", "part", "layer", "head", "query", "scale")

    def explanation(self, scene: Scene) -> str:
        if not reads_source(scene.layer):
            return self.words
        return "The source, each token coloured by the weight that the pinned token of the text gives it."

    def values(self, scene: Scene) -> np.ndarray:
        self.check(scene)
        factors = check_pattern(scene)
        row = factors.row(scene.view.head, scene.query)
        return np.where(factors.visible([scene.query])[0], row, np.float32(np.nan))

    def signed(self, scene: Scene) -> bool:
        return is_signed(scene.layer or {})

    def scale(self, scene: Scene) -> str:
        return "linear" if scene.view.scale == "row" else scene.view.scale

    def colours(self, scene: Scene, theme: Theme) -> dict[str, list]:
        colours = super().colours(scene, theme)
        return {**colours, "tokens": scene.source_tokens} if reads_source(scene.layer) else colours

    def table(self, scene: Scene) -> Table:
        read = scene.read_tokens
        return ["token", "value"], ([token_label(read, i), float(v)] for i, v in enumerate(self.values(scene)))

    def facts(self, scene: Scene) -> list[str]:
        return [
            *head_words(scene),
            *(["drawn over the source"] if reads_source(scene.layer) else []),
            reader_words(scene),
            *([] if np.nan_to_num(self.values(scene)).any() else ["it reads nothing: every weight of this row is 0"]),
            scale_words(self.scale(scene)),
        ]

    def snippet_body(self, scene: Scene) -> str:
        head, query = scene.view.head, scene.query
        return f"""
row = factors.row({head}, {query})  # key
values = np.where(factors.visible([{query}])[0], row, np.float32(np.nan))
"""


class Received(FigurePanel):
    """How much weight each token gets."""

    id = "received"
    title = "Who is read"
    words = "Mean weight (magnitude) that each token gets from the tokens that can see it. A tall spike is a sink."
    depends = ("run", "part", "layer", "head")
    height = 270

    def values(self, scene: Scene) -> np.ndarray:
        self.check(scene)
        name = f"received.{scene.view.layer}"
        if not scene.opened().has(name):
            raise NothingToShow("Not recorded", "This run does not store how much weight each token gets.")
        return np.asarray(scene.opened().array(name))

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        role = "source" if reads_source(scene.layer) else "key"
        return head_profiles(self.values(scene), scene.read_tokens, scene.view.head, theme,
                             y_title=f"mean {cell_word(scene.layer or {})}", panel=self.id, role=role)  # fmt: skip

    def snippet_body(self, scene: Scene) -> str:
        return f'values = run.array("received.{scene.view.layer}")  # head, pos'

    def facts(self, scene: Scene) -> list[str]:
        return [*head_words(scene), "the layer's other heads are faint"]


class RowProfile(FigurePanel):
    """How spread out each row is, or what it sums to."""

    id = "row-profile"
    title = "How each token reads"
    words = ("Where rows are probabilities: their entropy in nats (0 = one token, high = spread out). "
             "Where they are not: what each row sums to.")  # fmt: skip
    depends = ("run", "part", "layer", "head")
    height = 230

    def _has_entropy(self, scene: Scene) -> bool:
        return scene.opened().has(f"entropy.{scene.view.layer}")

    def values(self, scene: Scene) -> np.ndarray:
        self.check(scene)
        if self._has_entropy(scene):
            return np.asarray(scene.opened().array(f"entropy.{scene.view.layer}"))
        factors, head = check_pattern(scene), scene.view.head
        if factors.length > ROW_SUM_TOKENS:
            raise TooLarge(f"Row sums of {factors.length} tokens take too long to draw while you wait.")
        key = ("row-sums", scene.view.layer, head)
        return scene.once(*key, make=lambda: factors.overview(head, (factors.length, 1), kind="sum").T)

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        values, entropy = self.values(scene), self._has_entropy(scene)
        head = scene.view.head if entropy else 0
        title = "entropy (nats)" if entropy else "sum of the row"
        figure = head_profiles(values, scene.tokens, head, theme, y_title=title, panel=self.id, role="query")
        if not entropy:
            figure.update_traces(name=f"head {scene.view.head}")
        return figure

    def snippet_body(self, scene: Scene) -> str:
        if self._has_entropy(scene):
            return f'values = run.array("entropy.{scene.view.layer}")  # head, pos; nats'
        return f'values = factors.overview({scene.view.head}, (factors.length, 1), kind="sum").T  # sum of each row'

    def facts(self, scene: Scene) -> list[str]:
        return [*head_words(scene), "entropy in nats" if self._has_entropy(scene) else "signed sum of each row"]


class OffsetProfile(FigurePanel):
    """Mean weight by distance."""

    id = "offsets"
    title = "How far back it reads"
    words = "Mean weight by distance from the reading token. A bar at 1 is a previous-token head."
    depends = ("run", "part", "layer", "head")
    height = 230

    def _count(self, scene: Scene) -> int:
        return min(64, scene.n_tokens)

    def values(self, scene: Scene) -> np.ndarray:
        self.check(scene)
        factors, head = check_pattern(scene), scene.view.head
        if reads_source(scene.layer):
            raise NothingToShow(
                "No distances here",
                "This layer reads another text, the source: its tokens are not before or behind the run's.",
            )
        key = ("offsets", scene.view.layer, head)
        return scene.once(*key, make=lambda: factors.offset_profile(head, self._count(scene)))

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        return offset_profile(self.values(scene), theme, panel=self.id, y_title=f"mean {cell_word(scene.layer or {})}")

    def table(self, scene: Scene) -> Table:
        return ["distance", f"mean {cell_word(scene.layer or {})}"], (
            [str(d), float(v)] for d, v in enumerate(self.values(scene))
        )

    def snippet_body(self, scene: Scene) -> str:
        return f"values = factors.offset_profile({scene.view.head}, {self._count(scene)})  # distance 0, 1, 2, …"

    def facts(self, scene: Scene) -> list[str]:
        return head_words(scene)

    def summary(self, scene: Scene) -> str:
        values = self.values(scene)
        top = int(np.nanargmax(np.abs(values)))
        return (
            f"The largest mean {cell_word(scene.layer or {})} is {number(values[top])}, at a distance of {top} tokens."
        )
