"""A button that any page can show: take the chosen head away, and see in place what that does, beside other heads of its layer.

    ablate.button(scene)                 in a page's layout; the head is the one that the address names when it is pressed
    ablate.HEADS["probes"] = chosen      for a page that names its head otherwise; it shows `controls()`

The job is the one of the Intervene page, so its result is a stored run and the link under it opens the whole of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dash import Dash, Input, Output, State, dcc, html, no_update
from dash.development.base_component import Component

from app.figures.common import number, visible_text
from app.measure.basket import offers_of
from app.measure.common import FormError, try_to_start
from app.measure.interventions import start_intervening
from app.services import Scene, Services
from app.view_state import ViewState
from workbench.lab.jobs import JobError

DRAWS = 20
EVERY = 400  # milliseconds between looks at the job


HEADS: dict[str, Callable[[Services, Scene], ViewState]] = {}
"""By page: the view of a run, layer and head that its chosen head stands for. FormError says why there is none."""


def button(scene: Scene) -> Component:
    """The button with the place of its result; nothing for a run without layers."""
    return controls() if scene.layers else html.Div(className="is-hidden")


def controls() -> Component:
    """The button with the place of its result."""
    return html.Div(
        [
            html.Button("Ablate head and see Δlogit", id="ablate-head", className="tool-button is-framed", type="button", n_clicks=0),
            html.Button("Stop", id="ablate-stop", className="tool-button is-framed is-hidden", type="button", n_clicks=0),
            html.Div(id="ablate-result", className="ablate-result", role="status"),
            dcc.Interval(id="ablate-tick", interval=EVERY, disabled=True),
            dcc.Store(id="ablate-job"),
        ],
        className="ablate",
    )  # fmt: skip


def start(services: Services, view: ViewState) -> tuple[str | None, str]:
    """(job id or None, what to tell the reader) for the head that a view names."""
    try:
        scene = services.scene(_of_page(services, view))
    except FormError as error:
        return None, str(error)
    offer = offers_of(services, scene).get("zero")
    if offer is None or "head" not in offer.places:
        return None, "The layers of this model have no outputs by head, so no single head can be taken away."
    line = f"zero head {scene.view.layer}.{scene.view.head}"
    return try_to_start(lambda: start_intervening(services, scene, line, DRAWS, 0, prompts=""))


def _of_page(services: Services, view: ViewState) -> ViewState:
    """The view with the head that is meant on its page."""
    return HEADS[view.page](services, services.scene(view)) if view.page in HEADS else view


def said(services: Services, view: ViewState, run_id: str) -> Component:
    """What an ablation found, in a line or two, with a link to all of it."""
    run = services.open_run(run_id)
    results, settings = run.manifest["results"], run.manifest["settings"]
    target, top = results["changes"]["target"], results["changes"]["top"]
    token, drawn = visible_text(str(results["targets"][0])), target["controls"]
    others = (
        f"; other heads of the layer {_range(drawn)}"
        if drawn
        else f"; no control: {results['no_control'] or 'none was drawn'}"
    )
    low, high = top["interval"] or (float("nan"), float("nan"))
    link = html.A(
        "full result",
        href=view.change(page="intervene", result=run.id, basket="", prompts="").to_url(),
        className="in-app",
    )
    p = "" if top["p"] is None else f", p {number(top['p'])}"
    return html.Div([
        html.Div([html.Strong(f"Δlogit of ‘{token}’ {_signed(target['value'])}"),
                  f" after token {results['at'][0]}{others}."]),
        html.Div([f"Expected token, mean of all tokens: {_signed(top['value'])} [{number(low)}, {number(high)}]"
                  f"{'; other heads ' + _range(top['controls']) if drawn else ''}{p}. {settings['basket']} · ", link]),
    ])  # fmt: skip


def _signed(value: float) -> str:
    return f"+{number(value)}" if value > 0 else number(value)


def _range(values: list[float]) -> str:
    return _signed(values[0]) if len(values) == 1 else f"{_signed(min(values))} to {_signed(max(values))}"


def register(app: Dash, services: Services) -> None:
    """Connect the button, once for all pages."""

    @app.callback(
        Output("ablate-job", "data"), Output("ablate-result", "children"), Output("ablate-tick", "disabled"),
        Output("ablate-stop", "className"), Input("ablate-head", "n_clicks"), State("view", "data"), prevent_initial_call=True,
    )  # fmt: skip
    def press(clicks: int, view: dict[str, Any]) -> tuple[Any, ...]:
        if not clicks:
            return (no_update,) * 4
        job, words = start(services, ViewState.from_dict(view))
        stop = "tool-button is-framed" + ("" if job else " is-hidden")
        return job, html.Span("starting …" if job else words), job is None, stop

    @app.callback(
        Output("ablate-result", "children", allow_duplicate=True), Output("ablate-tick", "disabled", allow_duplicate=True),
        Output("ablate-stop", "className", allow_duplicate=True), Input("ablate-tick", "n_intervals"), State("ablate-job", "data"),
        State("view", "data"), prevent_initial_call=True,
    )  # fmt: skip
    def look(count: int, job_id: str | None, view: dict[str, Any]) -> tuple[Any, ...]:
        return progress(services, job_id, ViewState.from_dict(view))

    @app.callback(
        Output("ablate-stop", "n_clicks"),
        Input("ablate-stop", "n_clicks"),
        State("ablate-job", "data"),
        prevent_initial_call=True,
    )
    def stop(clicks: int, job_id: str | None) -> Any:
        if clicks and job_id:
            try:
                services.jobs.cancel(job_id)
            except JobError:  # it ended between the click and now
                return 0
        return 0 if clicks else no_update


def progress(services: Services, job_id: str | None, view: ViewState) -> tuple[Any, bool, str]:
    """(what to say of the job, whether to stop looking, class of the stop button)."""
    hidden = "tool-button is-framed is-hidden"
    try:
        job = services.jobs.job(job_id or "")
    except JobError as error:
        return html.Span(str(error)), True, hidden
    if not job.finished:
        return (
            html.Span(f"{job.fraction:.0%} · {job.message or 'waiting for its turn'}"),
            False,
            "tool-button is-framed",
        )
    if job.state == "done":
        return said(services, _of_page(services, view), str(job.result)), True, hidden
    return html.Span(job.error or "stopped, nothing was kept"), True, hidden
