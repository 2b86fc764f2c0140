"""The contract of a panel.

A panel names the array that it draws (`values`), and everything else follows from that: the figure, the table and the CSV
file, and a few lines of Python that make the same array from the run (`snippet`; a test runs every one of them and compares).
Panels know arrays and figures but no dash component, so each can be tested as a plain function of a scene.

    Panel              values, table, Python: what all have
    ├ FigurePanel      a plotly figure
    │ └ ImagePanel     a figure around a picture that the server draws, with a reading of single cells
    │   └ PicturePanel the picture is one array, pooled to the pixels
    └ StripPanel       colours the run's own text
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go

from app.figures.common import Colours, number, token_label
from app.render import share_of_row, to_levels, to_png
from app.services import Scene
from app.theme import Theme, colours_of, readable_on
from app.view_state import SCALES
from workbench.lab.factors import FactorError
from workbench.lab.runs import Run, RunError

Span = tuple[int, int]
Table = tuple[list[str], Iterator[Sequence[str | float]]]
LARGEST_CSV = 4_000_000
TABLE_ROWS, TABLE_COLUMNS = 200, 24


class NothingToShow(Exception):
    """A panel has nothing to draw for this view. `title` says what is missing, the message says why and what to do."""

    def __init__(self, title: str, reason: str):
        super().__init__(reason)
        self.title = title


class TooLarge(Exception):
    """More cells were asked for than one answer holds; the message says what to do."""


@dataclass(frozen=True)
class Reading:
    """One exact value with its place in words: `rows` are (name, text) pairs."""

    value: float
    rows: list[tuple[str, str]]


class Panel(ABC):
    """One frame of a page. Subclasses set the class attributes and say what `values` are.

    `depends` names the `ViewState` fields that the panel reads: it is drawn anew when one of them changes, and only then.
    """

    id: str
    title: str
    words: str
    depends: tuple[str, ...] = ("run",)

    def heading(self, scene: Scene) -> str:
        """What stands above the panel."""
        return self.title

    def explanation(self, scene: Scene) -> str:
        """The sentence below the heading."""
        return self.words

    def source(self, scene: Scene) -> Run | None:
        """The run that the panel draws."""
        return scene.run

    @abstractmethod
    def values(self, scene: Scene) -> np.ndarray:
        """The array that the panel draws, exactly."""

    @abstractmethod
    def snippet_body(self, scene: Scene) -> str:
        """Python that sets `values`, given `run` (and `factors` where it is named)."""

    def facts(self, scene: Scene) -> list[str]:
        """Short facts for the panel's foot, beside the run."""
        return []

    def summary(self, scene: Scene) -> str:
        """One sentence that says what the figure shows, for readers who do not see it."""
        return self.words

    def table(self, scene: Scene) -> Table:
        """Column names and rows of the same numbers, for the table view and the CSV file."""
        values = np.atleast_1d(self.values(scene))
        if values.ndim == 1:
            names = (
                [token_label(scene.tokens, i) for i in range(len(values))] if len(values) == scene.n_tokens else None
            )
            rows = ([names[i] if names else i, float(value)] for i, value in enumerate(values))
            return ["token" if names else "index", "value"], iter(rows)
        headers = ["", *(str(column) for column in range(values.shape[1]))]
        return headers, ([str(row), *(float(v) for v in line)] for row, line in enumerate(values))

    def snippet(self, scene: Scene) -> str:
        """Python that reproduces `values` from the run store."""
        body = self.snippet_body(scene).strip()
        lines = ["from workbench.lab.runs import RunStore"]
        if "factors." in body:
            lines.insert(0, "from workbench.lab.factors import LayerFactors")
        if "RunSynapses(" in body:
            lines.insert(0, "from workbench.lab.run_synapses import RunSynapses")
        if "np." in body:
            lines = ["import numpy as np", "", *lines]
        part = ".encoder" if scene.view.part else ""
        lines += ["", f'run = RunStore().open("{scene.opened().id}"){part}']
        if "factors." in body:
            lines.append(f"factors = LayerFactors.from_run(run, {scene.view.layer})")
        return "\n".join([*lines, body, ""])

    def check(self, scene: Scene) -> None:
        """Raise NothingToShow when no run is open."""
        if scene.run is None:
            if scene.problem:
                raise NothingToShow(
                    "This run is not here", "Choose another run in the bar above, or start one on the Overview page."
                )
            raise NothingToShow(
                "No run yet", "Start one on the Overview page, or from the command line: workbench trace."
            )


class FigurePanel(Panel):
    """A panel that draws a figure, `height` pixels high."""

    height: int = 280

    @abstractmethod
    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        """The figure. Raises NothingToShow, RunError or FactorError with words for the reader."""

    def aspect(self, scene: Scene) -> float | None:
        """Width : height that the figure keeps, up to its `height`; None for a figure of fixed height."""
        return None

    def pixels_high(self, scene: Scene) -> int:
        """Height of a figure without an `aspect`."""
        return self.height


class ImagePanel(FigurePanel):
    """A figure around a picture that the server draws; exact values are asked for one by one."""

    zoom: tuple[str, str] | None = None

    @abstractmethod
    def shape(self, scene: Scene) -> tuple[int, int]:
        """Rows and columns of what is drawn."""

    @abstractmethod
    def picture(self, scene: Scene, theme: Theme, size: int) -> bytes:
        """The PNG of the part in view, at most about `size` pixels wide and high."""

    @abstractmethod
    def reading(self, scene: Scene, row: int, column: int) -> Reading:
        """One exact value. IndexError outside the array."""

    def address(self, scene: Scene, theme: Theme) -> str:
        """Where the page finds the picture: everything that it depends on is in the address."""
        part = ViewPart(scene, self.depends).query()
        return f"/img/{self.id}?{part}&scheme={theme.name}&px={scene.pixels}"


class PicturePanel(ImagePanel):
    """A picture of one array, which may be large."""

    @abstractmethod
    def block(self, scene: Scene, rows: Span, columns: Span) -> np.ndarray:
        """Exact values of a part: float [row, column], nan where a cell is masked."""

    @abstractmethod
    def pooled(self, scene: Scene, size: int) -> np.ndarray:
        """The part in view, pooled to at most `size` × `size`: float, nan where every cell of a bin is masked."""

    @abstractmethod
    def colours(self, scene: Scene, theme: Theme) -> Colours:
        """How values become colours."""

    def spans(self, scene: Scene) -> tuple[Span, Span]:
        """The rows and columns in view."""
        rows, columns = self.shape(scene)
        return (0, rows), (0, columns)

    def extents(self, scene: Scene) -> tuple[Span, Span]:
        """The rows and columns that the picture covers: those in view, or a little more."""
        return self.spans(scene)

    def reading(self, scene: Scene, row: int, column: int) -> Reading:
        rows, columns = self.shape(scene)
        if not (0 <= row < rows and 0 <= column < columns):
            raise IndexError(f"cell [{row}, {column}] is outside {rows} × {columns}")
        value = float(self.block(scene, (row, row + 1), (column, column + 1))[0, 0])
        return Reading(value, self.place(scene, row, column))

    def place(self, scene: Scene, row: int, column: int) -> list[tuple[str, str]]:
        """Where a cell is, in words."""
        return [("row", str(row)), ("column", str(column))]

    def values(self, scene: Scene) -> np.ndarray:
        rows, columns = self.spans(scene)
        if (rows[1] - rows[0]) * (columns[1] - columns[0]) > LARGEST_CSV:
            raise TooLarge(
                f"{rows[1] - rows[0]} × {columns[1] - columns[0]} values are too many for one file: zoom in first."
            )
        return self.block(scene, rows, columns)

    def picture(self, scene: Scene, theme: Theme, size: int) -> bytes:
        colours = self.colours(scene, theme)
        values = self.pooled(scene, size)
        return to_png(levels_of(values, colours), colours.table)

    def binning(self, scene: Scene, size: int | None = None) -> tuple[int, int]:
        """How many rows and columns of the array the largest picture cell stands for."""
        rows, columns = self.spans(scene)
        size = size or scene.pixels
        return -(-(rows[1] - rows[0]) // size), -(-(columns[1] - columns[0]) // size)

    def table(self, scene: Scene) -> Table:
        rows, columns = self.spans(scene)
        values = self.values(scene)
        headers = ["", *(str(column) for column in range(*columns))]
        return headers, ([str(rows[0] + i), *(float(v) for v in line)] for i, line in enumerate(values))


@dataclass(frozen=True)
class ViewPart:
    """The part of a scene's view that a panel depends on."""

    scene: Scene
    depends: Sequence[str]

    def query(self) -> str:
        """Its canonical query string; two views that differ elsewhere have the same."""
        view = self.scene.view
        chosen = type(view)(**{name: getattr(view, name) for name in ("run", *self.depends)})
        return chosen.to_query()


def levels_of(values: np.ndarray, colours: Colours) -> np.ndarray:
    """Colour levels of values, also for the "share of the row's largest" scale."""
    if colours.scale == "row":
        return to_levels(share_of_row(values), 1.0, "linear", colours.signed)
    return to_levels(values, colours.limit, colours.scale, colours.signed)


class StripPanel(Panel):
    """A panel that colours the run's own text: one value per token, nan where a token has none."""

    unit = ""

    def signed(self, scene: Scene) -> bool:
        return False

    def limit(self, scene: Scene, values: np.ndarray) -> float:
        """The largest magnitude on the colour scale."""
        return float(np.nanmax(np.abs(values), initial=0.0)) if np.isfinite(values).any() else 1.0

    def scale(self, scene: Scene) -> str:
        return "linear"

    def colours(self, scene: Scene, theme: Theme) -> dict[str, list]:
        """`{colours: [[background, ink] per token], values: [text per token]}` for the token strip."""
        values = self.values(scene)
        signed = self.signed(scene)
        levels = to_levels(values, self.limit(scene, values), self.scale(scene), signed)
        backgrounds = colours_of(levels, theme.wash_name(signed))
        return {
            "colours": [[colour, readable_on(colour) if colour else ""] for colour in backgrounds],
            "values": [
                f"{number(value)} {self.unit}".strip() if np.isfinite(value) else "" for value in values.tolist()
            ],
        }


def scale_words(scale: str) -> str:
    """The colour scale in words, for a panel's foot."""
    return f"{SCALES[scale]} colour scale" if scale != "row" else "each row coloured by its own largest"


READABLE_ERRORS = (NothingToShow, TooLarge, RunError, FactorError)
"""Errors whose message is written for the reader."""
