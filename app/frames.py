"""The frame around a panel: title, words, tools, figure, foot; and the callbacks that all frames share.

One callback serves all figures, one all coloured texts. Each is called when a part of the view that its panel depends on has
changed (see `distribute` in assets/wb-1-view.js), so moving the query token does not redraw the head mosaic.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import dash_mantine_components as dmc
from dash import ALL, MATCH, ClientsideFunction, Dash, Input, Output, State, callback_context, dcc, html, no_update
from dash.development.base_component import Component

from app.figures.common import number
from app.panels.base import (
    READABLE_ERRORS,
    TABLE_COLUMNS,
    TABLE_ROWS,
    FigurePanel,
    ImagePanel,
    NothingToShow,
    Panel,
    StripPanel,
    TooLarge,
)  # fmt: skip
from app.panels.overview import Diagram
from app.services import Scene, Services
from app.theme import colour_table, theme_called
from app.view_state import ViewState
from workbench.lab.runs import Run

log = logging.getLogger("workbench.dashboard")
PIXELS = (256, 512, 1024)
_failures = itertools.count(1)
_GRAPH_CONFIG = {
    "displayModeBar": False,
    "doubleClick": False,
    "scrollZoom": False,
    "showTips": False,
    "responsive": True,
}


def icon(name: str) -> html.Span:
    """A small local picture in the colour of the text."""
    return html.Span(className=f"icon icon-{name}", **{"aria-hidden": "true"})


def frame(panel: Panel, scene: Scene, place: str = "span-12", above: Sequence[Component] = ()) -> html.Section:
    """The frame of a panel. `place` are classes of the page grid; `above` stands between the words and the figure."""
    identity = {"panel": panel.id}
    if isinstance(panel, FigurePanel):
        kind, legend = "figure", []
        body: Component = dcc.Graph(
            id={"type": "graph", **identity}, className="graph", figure={"layout": {"autosize": True}},
            config=_GRAPH_CONFIG, responsive=True, style=_graph_style(panel, scene),
        )  # fmt: skip
    else:
        kind, legend = "strip", [html.Div(id={"type": "legend", **identity})]
        body = html.Div(id={"type": "strip", **identity}, className="strip strip-coloured", **{"data-strip": "{}"})
    part = view_slice(kind, panel.id, panel.depends)
    return html.Section(
        [
            html.Div([
                html.H2(panel.heading(scene), className="panel-title", id=f"title-{panel.id}"),
                html.Div(_tools(panel, panel.heading(scene)), className="panel-tools"),
            ], className="panel-head"),
            html.P(panel.explanation(scene), className="panel-words"),
            *above,
            html.Div([*legend, body], id={"type": "body", **identity},
                     className="panel-body is-padded" if kind == "strip" else "panel-body"),
            html.Div(id={"type": "message", **identity}, role="status"),
            html.P(id={"type": "summary", **identity}, className="sr-only"),
            html.Div(id={"type": "foot", **identity}, className="panel-foot"),
            part,
        ],
        className=f"panel {place}", id=f"panel-{panel.id}", **{"aria-labelledby": f"title-{panel.id}"},
    )  # fmt: skip


def view_slice(kind: str, name: str, depends: Sequence[str]) -> dcc.Store:
    """The part of the view that something depends on; its `data["view"]` changes only when that part does."""
    return dcc.Store(id={"type": "slice", "kind": kind, "panel": name}, data={"depends": list(depends), "view": None})


def slice_input(kind: str, name: str) -> Input:
    """The input of a callback that depends on `view_slice(kind, name, …)`."""
    return Input({"type": "slice", "kind": kind, "panel": name}, "data")


def content_frame(
    name: str, title: str, words: str, children: Any, place: str = "span-12", padded: bool = True
) -> html.Section:
    """A frame around something that is not a figure, such as a form or a list."""
    return html.Section(
        [
            html.Div(html.H2(title, className="panel-title", id=f"title-{name}"), className="panel-head"),
            html.P(words, className="panel-words") if words else None,
            html.Div(children, className="panel-body is-padded" if padded else "panel-body"),
        ],
        className=f"panel {place}", id=f"panel-{name}", **{"aria-labelledby": f"title-{name}"},
    )  # fmt: skip


def _tools(panel: Panel, title: str) -> list[Component]:
    def item(kind: str, text: str) -> dmc.MenuItem:
        return dmc.MenuItem(text, id={"type": kind, "panel": panel.id}, n_clicks=0)

    drawn = (item("export-png", "Figure as PNG"), item("export-svg", "Figure as SVG"))
    figure = drawn if isinstance(panel, FigurePanel) else ()
    pixels = [item("export-pixels", "Bare pixels as PNG")] if isinstance(panel, ImagePanel) else []
    export = html.Button(
        [icon("export"), html.Span("Export", className="tool-label")], className="tool-button", type="button",
        **{"aria-label": f"Export: {title}"},
    )  # fmt: skip
    return [
        html.Button([icon("table"), html.Span("Table", className="tool-label")], id={"type": "open-table", "panel": panel.id},
                    className="tool-button", type="button", n_clicks=0, **{"aria-label": f"Show as table: {title}"}),
        dmc.Menu([
            dmc.MenuTarget(export),
            dmc.MenuDropdown([*figure, *pixels, item("export-csv", "Numbers as CSV"), item("open-code", "Python that makes it")]),
        ], position="bottom-end", shadow="md", width=210),
    ]  # fmt: skip


def _graph_style(panel: FigurePanel, scene: Scene) -> dict[str, str]:
    aspect, high = None, panel.height
    if scene.run is not None:
        try:
            aspect, high = panel.aspect(scene), panel.pixels_high(scene)
        except READABLE_ERRORS:
            aspect = None  # there is nothing to draw; the panel says so when it tries
    style = {"height": f"{high}px"}
    if aspect is not None:
        style = {
            "aspectRatio": f"{aspect:.3f}",
            "maxHeight": f"min({panel.height}px, 82vh)",
            "minHeight": "150px",
            "width": "100%",
        }
    if isinstance(panel, Diagram) and scene.layers:
        style["minWidth"] = f"{panel.width(scene)}px"
    return style


# ---- what the callbacks answer ---------------------------------------------------------------------------------------


def scene_of_slice(services: Services, part: Mapping[str, Any]) -> Scene:
    """The scene that a panel's slice of the view describes."""
    pixels = part.get("pixels")
    return services.scene(ViewState.from_dict(dict(part)), pixels if pixels in PIXELS else 512)


def foot(run: Run | None, facts: Sequence[str]) -> list[Component]:
    """The line under a panel: which run it draws, then its facts."""
    if run is None:
        return []
    # The last part of an id is its random one; the whole id is in the title and on every exported figure.
    short = html.Span(run.id.rsplit("-", 1)[-1], className="mono")
    name = html.Span(["run ", short], className="fact fact-run", title=run.id, **{"data-run": run.id})
    return [name, *[html.Span(fact, className="fact") for fact in facts]]


def message(title: str, reason: str, error: bool = False) -> html.Div:
    """A calm box in place of a figure."""
    return html.Div([html.Strong(title), html.Span(reason)], className=f"panel-message{' is-error' if error else ''}")


def explain(panel_id: str, failure: Exception) -> html.Div:
    """What the reader sees instead of a figure that could not be drawn. The traceback goes to the log, under a number."""
    if isinstance(failure, NothingToShow):
        return message(failure.title, str(failure))
    if isinstance(failure, TooLarge):
        return message("Too much for one view", str(failure))
    if isinstance(failure, READABLE_ERRORS):
        return message("This cannot be shown", str(failure))
    ticket = next(_failures)
    log.error("panel %s failed (error %d)", panel_id, ticket, exc_info=failure)
    return message(
        "This panel failed", f"The others still work. The server's log has the details under error {ticket}.", True
    )


def draw_figure(services: Services, panel: FigurePanel, part: Mapping[str, Any]) -> tuple[Any, ...]:
    """Figure, graph style, body class, message, summary, foot of one panel for its slice of the view."""
    scene = scene_of_slice(services, part)
    try:
        panel.check(scene)
        figure = panel.figure(scene, theme_called(part.get("scheme")))
        return (
            figure,
            _graph_style(panel, scene),
            "panel-body",
            None,
            panel.summary(scene),
            foot(panel.source(scene), panel.facts(scene)),
        )
    except Exception as failure:  # whatever it was, the page stays usable and says so in words
        return (
            no_update,
            no_update,
            "panel-body is-hidden",
            explain(panel.id, failure),
            "",
            foot(panel.source(scene), []),
        )


def draw_strip(services: Services, panel: StripPanel, part: Mapping[str, Any]) -> tuple[Any, ...]:
    """Strip data, legend, body class, message, summary, foot of one coloured text."""
    scene = scene_of_slice(services, part)
    theme = theme_called(part.get("scheme"))
    try:
        panel.check(scene)
        values = panel.values(scene)
        limit, signed = panel.limit(scene, values), panel.signed(scene)
        data = json.dumps(panel.colours(scene, theme))
        legend = _legend(theme.wash_name(signed), limit, signed, panel.unit)
        foot_line = foot(panel.source(scene), panel.facts(scene))
        return data, legend, "panel-body is-padded", None, panel.summary(scene), foot_line
    except Exception as failure:  # as above
        return "{}", None, "panel-body is-hidden", explain(panel.id, failure), "", foot(panel.source(scene), [])


def _legend(table: str, limit: float, signed: bool, unit: str) -> html.Div:
    colours = ["rgb({},{},{})".format(*colour_table(table)[at].tolist()) for at in range(0, 255, 14)]
    bar = html.Div(className="legend-bar", style={"background": f"linear-gradient(90deg, {', '.join(colours)})"})
    low = number(-limit) if signed else "0"
    return html.Div([html.Span(low), bar, html.Span(f"{number(limit)} {unit}".strip())], className="legend-row",
                    role="img", **{"aria-label": f"colour scale from {low} to {number(limit)} {unit}"})  # fmt: skip


def value_table(panel: Panel, scene: Scene) -> Component:
    """The numbers of a panel as a table, cut to a size that can be read."""
    try:
        panel.check(scene)
        headers, rows = panel.table(scene)
        shown = list(itertools.islice(rows, TABLE_ROWS + 1))
    except Exception as failure:  # as above
        return explain(panel.id, failure)
    cut_rows, cut_columns = len(shown) > TABLE_ROWS, len(headers) > TABLE_COLUMNS
    note = []
    if cut_rows or cut_columns:
        note = [html.P(f"Only the first {TABLE_ROWS} rows and {TABLE_COLUMNS} columns are shown here; the CSV file has all.",
                       className="panel-words")]  # fmt: skip
    cells = [
        [value if isinstance(value, str) else number(value) for value in row[:TABLE_COLUMNS]]
        for row in shown[:TABLE_ROWS]
    ]
    data = json.dumps({"headers": headers[:TABLE_COLUMNS], "rows": cells})
    return html.Div(
        [*note, html.Div(className="value-scroll", tabIndex=0, **{"data-table": data, "aria-label": "Values"})]
    )


def code_view(panel: Panel, scene: Scene) -> Component:
    """The Python that reproduces a panel's array."""
    try:
        panel.check(scene)
        code = panel.snippet(scene)
    except Exception as failure:  # as above
        return explain(panel.id, failure)
    words = ["Run it in the folder that the dashboard was started in, or with the same WORKBENCH_RUNS. ",
             html.Code("values"), " is then the array of this panel."]  # fmt: skip
    return html.Div(
        [html.P(words, className="panel-words"), dmc.CodeHighlight(code=code, language="python", id="code")]
    )


def register(app: Dash, services: Services, panels: Mapping[str, Panel]) -> None:
    """Connect all frames."""

    @app.callback(
        Output({"type": "graph", "panel": MATCH}, "figure"),
        Output({"type": "graph", "panel": MATCH}, "style"),
        Output({"type": "body", "panel": MATCH}, "className"),
        Output({"type": "message", "panel": MATCH}, "children"),
        Output({"type": "summary", "panel": MATCH}, "children"),
        Output({"type": "foot", "panel": MATCH}, "children"),
        Input({"type": "slice", "kind": "figure", "panel": MATCH}, "data"),
        State({"type": "slice", "kind": "figure", "panel": MATCH}, "id"),
    )
    def draw(data: dict[str, Any] | None, identity: dict[str, str]) -> tuple[Any, ...]:
        panel = panels[identity["panel"]]
        if not data or not data.get("view") or not isinstance(panel, FigurePanel):
            return (no_update,) * 6
        return draw_figure(services, panel, data["view"])

    @app.callback(
        Output({"type": "strip", "panel": MATCH}, "data-strip"),
        Output({"type": "legend", "panel": MATCH}, "children"),
        Output({"type": "body", "panel": MATCH}, "className", allow_duplicate=True),
        Output({"type": "message", "panel": MATCH}, "children", allow_duplicate=True),
        Output({"type": "summary", "panel": MATCH}, "children", allow_duplicate=True),
        Output({"type": "foot", "panel": MATCH}, "children", allow_duplicate=True),
        Input({"type": "slice", "kind": "strip", "panel": MATCH}, "data"),
        State({"type": "slice", "kind": "strip", "panel": MATCH}, "id"),
        prevent_initial_call="initial_duplicate",
    )
    def colour(data: dict[str, Any] | None, identity: dict[str, str]) -> tuple[Any, ...]:
        panel = panels[identity["panel"]]
        if not data or not data.get("view") or not isinstance(panel, StripPanel):
            return (no_update,) * 6
        return draw_strip(services, panel, data["view"])

    for kind in ("export-png", "export-svg", "export-csv", "export-pixels"):
        app.clientside_callback(
            ClientsideFunction("workbench", kind.replace("-", "_")),
            Output({"type": kind, "panel": MATCH}, "id"),
            Input({"type": kind, "panel": MATCH}, "n_clicks"),
            prevent_initial_call=True,
        )

    for kind, title, content in (("open-table", "Table", value_table), ("open-code", "Python", code_view)):
        _register_sheet(app, services, panels, kind, title, content)


def _register_sheet(
    app: Dash, services: Services, panels: Mapping[str, Panel], kind: str, title: str, content: Any
) -> None:
    @app.callback(
        Output("sheet", "opened", allow_duplicate=True),
        Output("sheet", "title", allow_duplicate=True),
        Output("sheet-content", "children", allow_duplicate=True),
        Input({"type": kind, "panel": ALL}, "n_clicks"),
        State("view", "data"),
        prevent_initial_call=True,
    )
    def open_sheet(clicks: list[int], view: dict[str, Any]) -> tuple[Any, ...]:
        asked = callback_context.triggered_id
        if not asked or not any(clicks or ()) or not callback_context.triggered[0]["value"]:
            return no_update, no_update, no_update
        panel = panels[asked["panel"]]
        scene = services.scene(ViewState.from_dict(view))
        return True, f"{title}: {panel.heading(scene)}", content(panel, scene)
