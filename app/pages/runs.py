"""Runs: find, open, export and delete what has been recorded."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import dash_ag_grid as dag
import dash_mantine_components as dmc
from dash import ClientsideFunction, Dash, Input, Output, State, ctx, html, no_update
from dash.development.base_component import Component

from app.frames import content_frame
from app.page import Page, where_to
from app.pages import find_pages
from app.services import Scene, Services
from app.shell import PROVENANCE
from app.view_state import RUN_ID
from workbench.lab.runs import RunError

NUMBER = {"filter": "agNumberColumnFilter", "type": "rightAligned", "suppressHeaderFilterButton": True}
COLUMNS = [
    {"field": "title", "headerName": "Title", "minWidth": 200, "flex": 3, "cellClass": "cell-link"},
    {"field": "text", "headerName": "Text", "minWidth": 200, "flex": 4},
    {"field": "model", "headerName": "Model", "minWidth": 150, "flex": 2},
    {"field": "weights", "headerName": "Weights", "width": 150},
    {"field": "tokens", "headerName": "Tokens", "width": 92, **NUMBER},
    {"field": "layers", "headerName": "Layers", "width": 92, **NUMBER},
    {"field": "size", "headerName": "MB", "width": 84, **NUMBER},
    {"field": "created", "headerName": "Made (UTC)", "width": 172},
    {"field": "kind", "headerName": "Kind", "width": 96},
    {"field": "id", "headerName": "Id", "minWidth": 250, "cellClass": "cell-mono"},
]
MOST_LISTED = 20
HINT = "Click a title to open the run."


def rows(services: Services) -> list[dict[str, Any]]:
    """One row per run, newest first."""
    return [
        {
            "id": entry.id, "title": entry.title, "model": entry.model or "–", "kind": entry.kind, "tokens": entry.tokens,
            "weights": PROVENANCE.get(entry.provenance or "", ("–", ""))[0], "layers": entry.layers,
            "size": round(entry.bytes / 1e6, 2), "created": entry.created[:16].replace("T", " "),
            "text": " ".join(entry.text.split()),
        }
        for entry in services.store.list()
    ]  # fmt: skip


def structure(scene: Scene) -> Hashable:
    return "runs"  # the list does not depend on the open run


def layout(services: Services, scene: Scene) -> Sequence[Component]:
    grid = dag.AgGrid(
        id="runs-grid", rowData=rows(services), columnDefs=COLUMNS, className="runs-grid", getRowId="params.data.id",
        defaultColDef={"filter": "agTextColumnFilter", "sortable": True, "resizable": True, "tooltipField": "text"},
        dashGridOptions={
            "rowSelection": {"mode": "multiRow", "enableClickSelection": False}, "rowHeight": 40, "headerHeight": 38,
            "suppressNoRowsOverlay": True, "animateRows": False, "pagination": True,
            "paginationPageSize": 50, "paginationPageSizeSelector": False,
        },
    )  # fmt: skip
    tools = html.Div(
        [
            dmc.TextInput(id="runs-filter", placeholder="Filter by any word", size="xs", w=240, **{"aria-label": "Filter runs"}),
            html.Span(HINT, id="runs-hint", className="form-hint", style={"flex": 1}),
            dmc.Button("Open", id="runs-open", size="xs", variant="light", disabled=True, n_clicks=0),
            dmc.Button("Export zip", id="runs-export", size="xs", variant="light", disabled=True, n_clicks=0),
            dmc.Button("Delete…", id="runs-delete", size="xs", variant="light", color="red", disabled=True, n_clicks=0),
        ],
        className="form-row runs-tools",
    )
    confirm = dmc.Modal(
        [
            html.Div(id="delete-words", className="prose"),
            html.Div([
                dmc.Button("Keep", id="delete-no", variant="default", n_clicks=0),
                dmc.Button("Delete for good", id="delete-yes", color="red", n_clicks=0),
            ], className="form-row", style={"justifyContent": "flex-end"}),
        ],
        id="delete-dialog", title="Delete runs?", opened=False,
    )  # fmt: skip
    return [
        html.Div(
            [
                content_frame("runs", "All runs", f"Kept in {services.store.root.name}/, newest first.",
                              [tools, html.Div(id="runs-message", className="form-message", role="alert"), grid, confirm]),
                html.Div(problems(services), id="runs-problems", className="span-12"),
            ],
            className="grid",
        )
    ]  # fmt: skip


def problems(services: Services) -> Component | None:
    """Folders that are not readable runs, and why; nothing when there are none."""
    found = services.store.problems()
    if not found:
        return None
    lines = [html.Div([html.Span(each.folder, className="mono"), html.Span(each.reason)], className="problem") for each in found]
    return content_frame("problems", "Folders that are not readable runs",
                         "They are left alone. A damaged run can still be deleted by its id from the command line.", lines)  # fmt: skip


def delete(services: Services, run_ids: Sequence[str]) -> str:
    """Delete runs; what could not be deleted, in words."""
    failed = []
    for run_id in run_ids:
        try:
            services.store.delete(run_id)
            services.forget_run(run_id)
        except (RunError, OSError) as error:
            failed.append(f"{run_id}: {error}")
    return " ".join(failed)


def _chosen(selected: list[dict[str, Any]] | None) -> list[str]:
    return [row["id"] for row in selected or [] if isinstance(row.get("id"), str) and RUN_ID.fullmatch(row["id"])]


def register(app: Dash, services: Services) -> None:
    @app.callback(
        Output("runs-open", "disabled"),
        Output("runs-export", "disabled"),
        Output("runs-delete", "disabled"),
        Output("runs-hint", "children"),
        Input("runs-grid", "selectedRows"),
        Input("runs-grid", "rowData"),
    )
    def enable(selected: list[dict[str, Any]] | None, listed: list[dict[str, Any]] | None) -> tuple[Any, ...]:
        count = len(_chosen(selected))
        if count:
            words = f"{count} run{'s' if count > 1 else ''} selected."
        else:
            words = HINT if listed else "No runs yet: start one on the Overview page."
        return count != 1, count != 1, count == 0, words

    @app.callback(Output("runs-grid", "dashGridOptions"), Input("runs-filter", "value"), State("runs-grid", "dashGridOptions"))
    def quick_filter(text: str | None, options: dict[str, Any]) -> dict[str, Any]:
        return {**options, "quickFilterText": text or ""}

    @app.callback(
        Output("go", "data", allow_duplicate=True),
        Input("runs-open", "n_clicks"),
        Input("runs-grid", "cellClicked"),
        State("runs-grid", "selectedRows"),
        prevent_initial_call=True,
    )
    def open_run(clicks: int, cell: dict[str, Any] | None, selected: list[dict[str, Any]] | None) -> Any:
        if ctx.triggered_id == "runs-open":
            chosen = _chosen(selected)
            return where_to(services, find_pages(), chosen[0]) if clicks and chosen else no_update
        clicked = str((cell or {}).get("rowId") or "")
        wanted = cell and cell.get("colId") == "title" and RUN_ID.fullmatch(clicked)
        return where_to(services, find_pages(), clicked) if wanted else no_update

    @app.callback(
        Output("delete-dialog", "opened"),
        Output("delete-words", "children"),
        Output("runs-message", "children"),
        Output("runs-grid", "rowData"),
        Output("runs-grid", "selectedRows"),
        Output("runs-problems", "children"),
        Output("runs-changed", "data", allow_duplicate=True),
        Input("runs-delete", "n_clicks"),
        Input("delete-yes", "n_clicks"),
        Input("delete-no", "n_clicks"),
        State("runs-grid", "selectedRows"),
        State("runs-changed", "data"),
        prevent_initial_call=True,
    )
    def delete_runs(ask: int, yes: int, no: int, selected: list[dict[str, Any]] | None, changes: int) -> tuple[Any, ...]:
        chosen = _chosen(selected)
        if ctx.triggered_id == "delete-yes" and yes:
            failed = delete(services, chosen)
            return False, no_update, failed, rows(services), [], problems(services), (changes or 0) + 1
        if ctx.triggered_id == "runs-delete" and ask and chosen:
            more = len(chosen) - MOST_LISTED
            names = [html.Li(run_id, className="mono") for run_id in chosen[:MOST_LISTED]]
            names += [html.Li(f"and {more} more")] if more > 0 else []
            words = [html.P("This removes the recorded arrays from the disk. It cannot be undone."), html.Ul(names)]
            return True, words, *[no_update] * 5
        return False, *[no_update] * 6

    app.clientside_callback(
        ClientsideFunction("workbench", "export_run"),
        Output("runs-export", "id"),
        Input("runs-export", "n_clicks"),
        State("runs-grid", "selectedRows"),
        prevent_initial_call=True,
    )


PAGE = Page(
    name="runs",
    title="Runs",
    icon="runs",
    order=1,
    group="Results",
    words="Everything that has been recorded. A run never changes, so an address always shows the same thing.",
    layout=layout,
    structure=structure,
    register=register,
    needs_run=False,
)
