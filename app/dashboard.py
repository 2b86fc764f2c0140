"""The dashboard: one Dash application over a run store, a job queue and a catalogue of models.

    app = build_app(RunStore(), JobQueue(), models)      # nothing is global, so a test builds as many as it likes
    serve(RunStore(), JobQueue(), models, port=8050)     # opens it for this machine only

How it fits together: the address holds the whole view. `resolve` turns it into a complete `ViewState` and sends it to the
store `view`; the page is laid out anew only when its structure changes; each panel's slice of the view is updated in the
browser, and a panel redraws when its slice changed. Controls and clicks only ever change the address.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flask
from dash import ALL, ClientsideFunction, Dash, Input, Output, State, no_update
from dash.development.base_component import Component
from flask import Flask, request
from werkzeug.exceptions import HTTPException
from werkzeug.serving import BaseWSGIServer, make_server

from app import frames, routes
from app.destinations import Destination
from app.page import Page, control_values, where_to
from app.pages import find_pages
from app.panels.base import Panel
from app.security import LOOPBACK_HOSTS, check_host_and_token, is_loopback, protect
from app.services import ModelCatalogue, Scene, Services
from app.shell import crumbs, inspector, shell
from app.theme import THEMES, theme_called
from app.view_state import RUN_ID, ViewState
from workbench.lab.jobs import JobError, JobQueue
from workbench.lab.runs import RunStore

log = logging.getLogger("workbench.dashboard")
DEFAULT_PORT = 8050
MOST_RUN_CHOICES = 200

INDEX = """<!DOCTYPE html>
<html lang="en">
  <head>
    <meta charset="utf-8">
    <meta name="viewport" content="width=device-width, initial-scale=1">
    <title>{%title%}</title>
    <link rel="icon" href="/assets/favicon.svg" type="image/svg+xml">
    <script src="/assets/scheme.js"></script>
    <style>/*COLOURS*/</style>
    {%css%}
  </head>
  <body>
    {%app_entry%}
    <footer>{%config%}{%scripts%}{%renderer%}</footer>
  </body>
</html>"""


def build_app(
    store: RunStore,
    jobs: JobQueue,
    models: ModelCatalogue,
    *,
    token: str | None = None,
    allowed_hosts: Sequence[str] = LOOPBACK_HOSTS,
) -> Dash:
    """The application; `app.server` is its WSGI callable.

    `allowed_hosts`: the values of the Host header that are answered (names, without port). With a `token`, every request must
    carry it. Raises ValueError for a malformed token.
    """
    check_host_and_token("127.0.0.1", token)
    services, pages = Services(store, jobs, models), find_pages()
    panels = _panels_by_id(pages)
    server = Flask("workbench-dashboard")
    app = Dash(
        "workbench", server=server, use_pages=False, pages_folder="", assets_folder=str(Path(__file__).parent / "assets"),
        assets_ignore="scheme\\.js", serve_locally=True, suppress_callback_exceptions=True, title="Workbench", update_title=None,
        add_log_handler=False, index_string=INDEX.replace("/*COLOURS*/", _colour_variables()), compress=False,
        on_error=_on_error, enable_mcp=False,
    )  # fmt: skip
    app.layout = lambda: _layout(pages, services)
    _register_view(app, services, {page.name: page for page in pages})
    _register_jobs(app, services, pages)
    frames.register(app, services, panels)
    for page in pages:
        if page.register is not None:
            page.register(app, services)
    routes.register(server, services, panels)
    protect(server, token=token, allowed_hosts=allowed_hosts, script_hashes=app.csp_hashes())
    server.register_error_handler(HTTPException, _plain_error)
    return app


def serve(
    store: RunStore,
    jobs: JobQueue,
    models: ModelCatalogue,
    *,
    host: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    token: str | None = None,
    allowed_hosts: Sequence[str] = (),
    ready: threading.Event | None = None,
) -> None:
    """Serve the dashboard until interrupted. `port` 0 takes a free one.

    Only this machine is served unless `host` says otherwise; then a `token` is required, and `allowed_hosts` must name what
    readers will type (the host itself is added). Raises ValueError when these do not fit, OSError when the port is taken.
    """
    check_host_and_token(host, token)
    hosts = [*LOOPBACK_HOSTS, *allowed_hosts]
    if not is_loopback(host) and host not in ("0.0.0.0", "::"):
        hosts.append(host)
    if not is_loopback(host) and len(hosts) == len(LOOPBACK_HOSTS):
        raise ValueError(f"serving {host}: name the host that readers will type (allowed_hosts=…)")
    server = make_dashboard_server(build_app(store, jobs, models, token=token, allowed_hosts=hosts), host, port)
    address = f"http://{'localhost' if is_loopback(host) else hosts[-1]}:{server.port}/"
    print(f"Dashboard: {address}{f'?token={token}' if token else ''}", flush=True)
    if ready is not None:
        ready.set()
    server.serve_forever()  # Ctrl-C ends it in peace and closes the socket
    print("Dashboard stopped.", flush=True)


def make_dashboard_server(app: Dash, host: str = "127.0.0.1", port: int = 0) -> BaseWSGIServer:
    """A threaded server that is bound but not yet serving; its `port` is the bound one. The request log is quiet."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    return make_server(host, port, app.server, threaded=True)


def _panels_by_id(pages: Sequence[Page]) -> dict[str, Panel]:
    panels: dict[str, Panel] = {}
    for page in pages:
        for panel in page.panels:
            if panels.setdefault(panel.id, panel) is not panel:
                raise ValueError(f"two panels are called {panel.id!r}")
    return panels


def _layout(pages: Sequence[Page], services: Services) -> Component:
    scheme = request.cookies.get("workbench_scheme") if flask.has_request_context() else None
    return shell(pages, theme_called(scheme), any(not job.finished for job in services.jobs.jobs()))


def _colour_variables() -> str:
    """The colours of both schemes as CSS variables, so that styles and figures cannot drift apart."""
    names = ("page", "surface", "sunken", "border", "grid", "text", "dim", "accent", "good", "warning", "bad")
    lines = []
    for theme in THEMES.values():
        selector = ":root" if theme.name == "light" else ':root[data-mantine-color-scheme="dark"]'
        lines.append(f"{selector} {{ {' '.join(f'--wb-{name}: {getattr(theme, name)};' for name in names)} }}")
    return "\n".join(lines)


# ---- view ------------------------------------------------------------------------------------------------------------


def resolve(
    services: Services, pages: Mapping[str, Page], path: str | None, query: str | None
) -> tuple[dict[str, Any], Scene]:
    """The complete view of an address, as the browser gets it, and its scene."""
    asked = ViewState.from_url(path, query)
    if asked.page not in pages:
        asked = asked.change(page="overview")
    scene = services.scene(asked if pages[asked.page].parts else asked.own_text())
    structure = pages[asked.page].structure(scene)
    run = scene.run.id if scene.run else (scene.problem or "")
    per_run = "" if structure == "runs" else run
    data = {
        **scene.view.as_dict(),
        "asked": f"{path or '/'}{query or ''}",
        "url": scene.view.to_url(),
        "controls": control_values(scene.view, scene.n_tokens),
        "structure": json.dumps([asked.page, per_run, structure], default=str),
    }
    return data, scene


def _facts(scene: Scene) -> dict[str, Any]:
    return {"run": scene.run.id if scene.run else "", "part": scene.view.part, "tokens": scene.tokens, "heads": scene.heads_per_layer}


def _register_view(app: Dash, services: Services, pages: Mapping[str, Page]) -> None:
    slices = {"type": "slice", "kind": ALL, "panel": ALL}
    controls = {"type": "control", "key": ALL, "default": ALL}
    links = {"type": "nav", "page": ALL, "path": ALL}

    @app.callback(
        Output("view", "data"),
        Output("facts", "data"),
        Input("url", "pathname"),
        Input("url", "search"),
        Input("runs-changed", "data"),
        State("facts", "data"),
    )
    def resolve_view(
        path: str | None, query: str | None, changes: int, known: dict[str, Any] | None
    ) -> tuple[Any, Any]:
        data, scene = resolve(services, pages, path, query)
        shown = (scene.run.id if scene.run else "", scene.view.part)
        same = known is not None and (known["run"], known.get("part", "")) == shown
        return data, no_update if same else _facts(scene)

    @app.callback(
        Output("page", "children"), Output("structure", "data"), Input("view", "data"), State("structure", "data")
    )
    def lay_out(view: dict[str, Any] | None, known: str | None) -> tuple[Any, Any]:
        if not view or view["structure"] == known:
            return no_update, no_update
        page = pages[view["page"]]
        return page.build(services, services.scene(ViewState.from_dict(view))), view["structure"]

    @app.callback(
        Output("crumbs", "children"), Input("facts", "data"), Input("runs-changed", "data"), State("view", "data")
    )
    def show_crumbs(facts: dict[str, Any] | None, changes: int, view: dict[str, Any] | None) -> Any:
        scene = services.scene(ViewState(run=(view or {}).get("run", "")))
        entries = services.trace_entries()[:MOST_RUN_CHOICES]
        data = [{"value": e.id, "label": f"{e.title} · {e.tokens} tokens · {e.id[:15]}"} for e in entries]
        if scene.run is not None and all(e.id != scene.run.id for e in entries):
            data.insert(0, {"value": scene.run.id, "label": scene.run.title})
        return crumbs(scene, data)

    @app.callback(Output("inspector", "children"), Input("inspector-slice", "data"))
    def show_inspector(data: dict[str, Any] | None) -> Any:
        if not data or not data.get("view"):
            return no_update
        return inspector(frames.scene_of_slice(services, data["view"]))

    client = app.clientside_callback
    client(ClientsideFunction("workbench", "distribute"), Output(slices, "data"), Input("view", "data"), Input("scheme", "data"),
           State(slices, "data"))  # fmt: skip
    client(ClientsideFunction("workbench", "inspector"), Output("inspector-slice", "data"), Input("view", "data"),
           State("inspector-slice", "data"))  # fmt: skip
    client(ClientsideFunction("workbench", "facts"), Output("facts-taken", "children"), Input("facts", "data"))
    client(
        ClientsideFunction("workbench", "control"),
        Output("facts-taken", "title"),
        Input(controls, "value"),
        State(controls, "id"),
    )
    client(ClientsideFunction("workbench", "follow"), Output(controls, "value"), Input("view", "data"), State(controls, "id"),
           State(controls, "value"))  # fmt: skip
    client(
        ClientsideFunction("workbench", "navigation"), Output(links, "href"), Input("view", "data"), State(links, "id")
    )
    client(
        ClientsideFunction("workbench", "current"),
        Output(links, "aria-current"),
        Input("view", "data"),
        State(links, "id"),
    )
    client(ClientsideFunction("workbench", "go"), Output("facts-taken", "lang"), Input("go", "data"))
    client(
        ClientsideFunction("workbench", "burger"),
        Output("frame", "navbar"),
        Input("burger", "opened"),
        State("frame", "navbar"),
    )
    client(
        ClientsideFunction("workbench", "aside"),
        Output("frame", "aside"),
        Input("view", "data"),
        State("frame", "aside"),
    )
    client(ClientsideFunction("workbench", "close_burger"), Output("burger", "opened"), Input("url", "pathname"))


# ---- jobs ------------------------------------------------------------------------------------------------------------


def job_line(services: Services, job_id: str | None) -> dict[str, Any]:
    """What the job bar shows: `{shown, title, message, percent, ended, run, target}`; `run` is the id of the run that was made, `target`
    where it leads if that is not the page of its kind."""
    known = {job.id: job for job in services.jobs.jobs()}
    active = [job for job in known.values() if not job.finished]
    job = known.get(job_id or "") or (active[-1] if active else None)
    if job is None:
        return {"shown": False, "title": "", "message": "", "percent": 0, "ended": True, "run": None, "target": None}
    line = job.summary()
    left = line["seconds_left"]
    words = {
        "queued": "waiting for its turn",
        "failed": line["error"] or "failed",
        "cancelled": "cancelled",
        "done": "done",
    }.get(line["state"], line["message"] or "running")
    if line["state"] == "running" and left is not None and left >= 3:
        words += f", about {round(left)} s left"
    if line["cancelling"] and not job.finished:
        words = "stopping at the next step"
    result = job.result.run if isinstance(job.result, Destination) else job.result
    made = result if line["state"] == "done" and isinstance(result, str) and RUN_ID.fullmatch(result) else None
    return {
        "shown": line["state"] not in ("done", "cancelled"), "title": line["title"], "message": words,
        "percent": round(100 * line["fraction"]), "ended": job.finished, "run": made, "failed": line["state"] == "failed",
        "target": job.result.target() if made is not None and isinstance(job.result, Destination) else None,
    }  # fmt: skip


def _register_jobs(app: Dash, services: Services, pages: Sequence[Page]) -> None:
    @app.callback(
        Output("job-bar", "className"),
        Output("job-title", "children"),
        Output("job-message", "children"),
        Output("job-progress", "value"),
        Output("job-percent", "children"),
        Output("job-cancel", "children"),
        Output("job-tick", "disabled"),
        Output("go", "data"),
        Output("runs-changed", "data"),
        Output("job", "data"),
        Input("job-tick", "n_intervals"),
        Input("job", "data"),
        State("runs-changed", "data"),
    )
    def tick(count: int | None, job_id: str | None, changes: int) -> tuple[Any, ...]:
        line = job_line(services, job_id)
        done = line["ended"] and line["run"] is not None
        look = "job-bar" + ("" if line["shown"] else " is-hidden") + (" is-failed" if line.get("failed") else "")
        return (
            look, line["title"], line["message"], line["percent"], f"{line['percent']} %", "Close" if line["ended"] else "Cancel",
            line["ended"], (line["target"] or where_to(services, pages, line["run"])) if done else no_update,
            (changes or 0) + 1 if done else no_update,
            None if done else no_update,
        )  # fmt: skip

    @app.callback(
        Output("job", "data", allow_duplicate=True),
        Output("job-bar", "className", allow_duplicate=True),
        Input("job-cancel", "n_clicks"),
        State("job", "data"),
        prevent_initial_call=True,
    )
    def cancel(clicks: int, job_id: str | None) -> tuple[Any, Any]:
        active = [job.id for job in services.jobs.jobs() if not job.finished]
        wanted = job_id if job_id in active else (active[-1] if active else None)
        if not clicks or wanted is None:
            return None, "job-bar is-hidden"
        try:
            services.jobs.cancel(wanted)
        except JobError as error:  # it ended between the click and now
            log.info("nothing to cancel: %s", error)
        return no_update, no_update


# ---- errors ----------------------------------------------------------------------------------------------------------


def _on_error(error: Exception) -> Any:
    log.error("a callback failed", exc_info=error)
    return no_update


def _plain_error(error: HTTPException) -> tuple[str, int, dict[str, str]]:
    """Errors as one line of text: this is read by people who typed an address, and by the page's own requests."""
    return (
        f"{error.code} {error.description or error.name}\n",
        error.code or 500,
        {"Content-Type": "text/plain; charset=utf-8"},
    )
