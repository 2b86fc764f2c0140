"""Data routes beside Dash's own: pictures, single values, downloads.

    GET /img/<panel>?<view>&scheme=…&px=…     the picture of a panel, PNG
    GET /value/<panel>?<view>&x=…&y=…         one exact value, JSON
    GET /export/<panel>.csv?<view>            all numbers of a panel
    GET /export/<panel>.png?<view>&scheme=…   its bare pixels, up to 2048 a side
    GET /export/run/<id>.zip                  a whole run

`<view>` is the query string of the page. Nothing from a request becomes a path on disk: panels come from a table, runs from the
store, which checks the id.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence

from flask import Flask, Response, abort, jsonify, request, send_file

from app.frames import PIXELS
from app.panels.base import READABLE_ERRORS, ImagePanel, Panel, TooLarge
from app.services import Scene, Services, content_tag
from app.theme import theme_called
from app.view_state import RUN_ID, ViewState
from workbench.lab.runs import RunError

EXPORT_PIXELS = 2048
VERSION = "1"
"""Part of every picture's tag; raise it when the same request draws a different picture."""


def register(server: Flask, services: Services, panels: Mapping[str, Panel]) -> None:
    """Add the routes to the server."""

    def panel_called(name: str) -> Panel:
        if name not in panels:
            abort(404, "no panel has this name")
        return panels[name]

    def scene_of_request(pixels: int = 512) -> Scene:
        return services.scene(ViewState.from_url("/", request.query_string.decode("latin-1")), pixels)

    def picture_of(panel: Panel, scene: Scene) -> bytes:
        if not isinstance(panel, ImagePanel):
            abort(404, "this panel has no picture")
        theme = theme_called(request.args.get("scheme"))
        panel.check(scene)
        address = panel.address(scene, theme)
        return services.pictures.get((scene.view.run, address), lambda: panel.picture(scene, theme, scene.pixels))

    @server.get("/img/<name>")
    def picture(name: str) -> Response:
        panel = panel_called(name)
        wanted = request.args.get("px", "512")
        scene = scene_of_request(int(wanted) if wanted in map(str, PIXELS) else 512)
        tag = content_tag(VERSION, name, request.query_string.decode("latin-1"), scene.view.run)
        # A run never changes, so its pictures do not either: a matching tag needs no drawing.
        if scene.run is not None and request.if_none_match.contains(tag):
            return Response(status=304)
        try:
            answer = Response(picture_of(panel, scene), mimetype="image/png")
        except READABLE_ERRORS as error:
            abort(404, str(error))
        answer.set_etag(tag)
        answer.headers["Cache-Control"] = "private, no-cache"
        return answer

    @server.get("/value/<name>")
    def value(name: str) -> Response:
        panel = panel_called(name)
        if not isinstance(panel, ImagePanel):
            abort(404, "this panel has no single values")
        try:
            column, row = int(request.args["x"]), int(request.args["y"])
            reading = panel.reading(scene_of_request(), row, column)
        except (KeyError, ValueError, IndexError, *READABLE_ERRORS) as error:
            abort(404, f"no value here: {error}")
        absent = not math.isfinite(reading.value)
        answer = {"value": None if absent else reading.value, "text": "not visible" if absent else f"{reading.value:.6g}",
                  "rows": reading.rows}  # fmt: skip
        return jsonify(answer)

    @server.get("/export/<name>.csv")
    def numbers(name: str) -> Response:
        panel, scene = panel_called(name), scene_of_request()
        try:
            panel.check(scene)
            headers, rows = panel.table(scene)
        except TooLarge as error:
            abort(413, str(error))
        except READABLE_ERRORS as error:
            abort(404, str(error))
        answer = Response(_csv_lines(headers, rows), mimetype="text/csv")
        answer.headers["Content-Disposition"] = f'attachment; filename="{_run_name(panel, scene)}-{panel.id}.csv"'
        return answer

    @server.get("/export/<name>.png")
    def pixels(name: str) -> Response:
        panel, scene = panel_called(name), scene_of_request(EXPORT_PIXELS)
        try:
            answer = Response(picture_of(panel, scene), mimetype="image/png")
        except READABLE_ERRORS as error:
            abort(404, str(error))
        answer.headers["Content-Disposition"] = f'attachment; filename="{_run_name(panel, scene)}-{panel.id}.png"'
        return answer

    @server.get("/export/run/<run_id>.zip")
    def whole_run(run_id: str) -> Response:
        if not RUN_ID.fullmatch(run_id):
            abort(404, "this is not a run id")
        file = tempfile.TemporaryFile()  # noqa: SIM115 -- the response closes it
        try:
            services.store.export_zip(run_id, file)
        except RunError as error:
            file.close()
            abort(404, str(error))
        file.seek(0)
        return send_file(file, mimetype="application/zip", as_attachment=True, download_name=f"{run_id}.zip")

    @server.get("/img/<path:rest>")
    @server.get("/value/<path:rest>")
    @server.get("/export/<path:rest>")
    def nothing(rest: str) -> Response:
        abort(404, "nothing has this address")  # otherwise Dash would answer with its index page


def _run_name(panel: Panel, scene: Scene) -> str:
    run = panel.source(scene)
    return run.id if run is not None else "empty"


def _csv_lines(headers: list[str], rows: Iterator[Sequence[str | float]]) -> Iterator[str]:
    """Lines of a CSV file, one at a time; nan becomes an empty cell."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    named: list[Sequence[str | float]] = [headers]
    for row in itertools.chain(named, rows):
        writer.writerow([_csv_cell(cell) for cell in row])
        yield buffer.getvalue()
        buffer.seek(0)
        buffer.truncate()


def _csv_cell(cell: str | float) -> str:
    if isinstance(cell, float):
        return "" if math.isnan(cell) else repr(cell)
    # A spreadsheet takes a text that begins like this for a formula, and a token may.
    return f"'{cell}" if cell[:1] in ("=", "+", "-", "@", "\t", "\r") else cell
