"""Figures of special quantities: one picture each, columns are tokens."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from app.figures.common import Axis, Colours, picture
from app.theme import Theme

LINKED = {"query": "query", "key": "key"}


def quantity_picture(
    source: str,
    tokens: Sequence[str],
    rows: tuple[str, int],
    columns: int,
    is_map: bool,
    colours: Colours,
    theme: Theme,
    *,
    panel: str,
    row_labels: Sequence[str] = (),
) -> go.Figure:
    """A quantity as it is stored. rows: what they are, and how many; row_labels: what each is called (none: its number).

    is_map: rows are reading tokens, columns are tokens read.

    Axes are linked with the text where a cell stands for one token: a pooled map, and columns that are no tokens of the text, are not.
    """
    named = columns == len(tokens)
    across = Axis("token that is read" if is_map else "token", columns, "key" if is_map else "token", tokens) if named else (
        Axis("token that is read, pooled" if is_map else "token, pooled", columns)
    )  # fmt: skip
    down = Axis(rows[0], rows[1])
    if is_map:
        down = Axis("token that reads", rows[1], "query", tokens) if rows[1] == len(tokens) else Axis("token that reads, pooled", rows[1])
    click = {"click": "pattern" if is_map else "token"} if named else {}
    figure = picture(
        source, across, down, (0, columns), (0, rows[1]), colours, theme, panel=panel, meta=click, columns_on_top=False
    )
    if not is_map and rows[1] <= 16:
        called = list(row_labels) or [str(row) for row in range(rows[1])]
        figure.update_yaxes(tickvals=[row + 0.5 for row in range(rows[1])], ticktext=called)
    return figure
