"""Parts of the forms that start a measurement, and what surrounds its result."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dash_mantine_components as dmc
from dash import Dash, Input, Output, State, html, no_update
from dash.development.base_component import Component

from app.frames import content_frame
from app.measure.common import bdh_models, try_to_start
from app.panels.results import measured
from app.services import Scene, Services
from app.view_state import ViewState
from workbench.lab.jobs import Job
from workbench.lab.runs import Run

MOST_LISTED = 12


def model_select(
    services: Services, scene: Scene, id: str, label: str = "Model", value: str | None = None, otherwise: str = ""
) -> Component:
    """Choose a BDH: `value`, else the open run's model, else `otherwise`, else the first."""
    models = bdh_models(services)
    names = [str(model["name"]) for model in models]
    own = scene.run.model.get("name") if scene.run is not None else None
    chosen = next((name for name in (value, own, otherwise) if name in names), names[0] if names else None)
    data = [{"value": str(model["name"]), "label": str(model.get("title") or model["name"])} for model in models]
    return dmc.Select(id=id, label=label, data=data, value=chosen, allowDeselect=False, searchable=True, size="sm")


def any_model_select(services: Services, scene: Scene, id: str, found: Run | None) -> Component:
    """Choose any model: that of the result `found`, else of the open run, else the first."""
    models = services.models.list_models()
    names = [str(model["name"]) for model in models]
    wanted = [run.model.get("name") for run in (found, scene.run) if run is not None]
    data = [{"value": str(model["name"]), "label": str(model.get("title") or model["name"])} for model in models]
    value = next((name for name in (*wanted, *names) if name in names), None)
    return dmc.Select(id=id, label="Model", data=data, value=value, allowDeselect=False, searchable=True, size="sm")


def checks(choices: Mapping[str, str]) -> Component:
    """The boxes of a group that can be ticked: value and words."""
    boxes = [dmc.Checkbox(label=words, value=value, size="sm") for value, words in choices.items()]
    return html.Div(boxes, className="form-checks")


def text_area(id: str, label: str, value: str, rows: int = 3) -> Component:
    """A text to read."""
    return dmc.Textarea(
        id=id, label=label, value=value, autosize=True, minRows=rows, maxRows=10, spellCheck=False, size="sm"
    )


def text_input(id: str, label: str, value: str, placeholder: str = "") -> Component:
    """A short text."""
    return dmc.TextInput(id=id, label=label, value=value, placeholder=placeholder, spellCheck=False, size="sm")


def select(id: str, label: str, choices: Sequence[tuple[str, str]], value: str) -> Component:
    """One of some (value, words)."""
    return dmc.Select(id=id, label=label, data=[{"value": v, "label": words} for v, words in choices], value=value,
                      allowDeselect=False, size="sm")  # fmt: skip


def count_input(id: str, label: str, value: int | None, first: int, last: int) -> Component:
    """A whole number."""
    return dmc.NumberInput(id=id, label=label, value=value if value is not None else "", min=first, max=last, allowDecimal=False,
                           size="sm", clampBehavior="none")  # fmt: skip


def share_input(id: str, label: str, value: float) -> Component:
    """A number between 0 and 1."""
    return dmc.NumberInput(id=id, label=label, value=value, min=0, max=1, step=0.001, decimalScale=6, size="sm",
                           clampBehavior="none")  # fmt: skip


def side_by_side(*parts: Component) -> Component:
    """Inputs that share a line where there is room."""
    return html.Div(list(parts), className="form-pair")


def form_frame(name: str, title: str, words: str, parts: Sequence[Component], button: str = "Start") -> Component:
    """A form with its start button and the place for what is wrong with it."""
    body = [
        *parts,
        html.Div(dmc.Button(button, id=f"{name}-start", n_clicks=0), className="form-row"),
        html.Div(id=f"{name}-message", className="form-message", role="alert"),
    ]
    return content_frame(f"{name}-form", title, words, html.Div(body, className="form-stack"), "")


def register_form(app: Dash, name: str, fields: Sequence[str], start: Callable[..., Job]) -> None:
    """Connect a form: `start(view, **fields)` is called with what its inputs hold; the ids are `<name>-<field>`."""

    @app.callback(
        Output("job", "data", allow_duplicate=True),
        Output(f"{name}-message", "children"),
        Input(f"{name}-start", "n_clicks"),
        State("view", "data"),
        *[State(f"{name}-{field}", "value") for field in fields],
        prevent_initial_call=True,
        running=[(Output(f"{name}-start", "disabled"), True, False)],
    )
    def start_one(clicks: int, view: dict[str, Any], *values: Any) -> tuple[Any, str]:
        if not clicks:
            return no_update, ""
        shown = ViewState.from_dict(view)
        job, words = try_to_start(lambda: start(shown, **dict(zip(fields, values, strict=True))))
        return (job if job else no_update), words


def earlier_results(
    services: Services, scene: Scene, kind: str, *, of: Mapping[str, str] | None = None, **also: Any
) -> list[Component]:
    """Links to the results of a kind, newest first; nothing when there are none.

    `of`: only those with these settings. `also`: fields of the view that a link changes, besides its result.
    """
    entries = services.store.list(kind=kind)
    if of is not None:
        entries = [e for e in entries if of.items() <= (services.open_run(e.id).manifest.get("settings") or {}).items()]
    entries = entries[:MOST_LISTED]
    if not entries:
        return []
    shown = measured(scene, kind)
    lines = []
    for entry in entries:
        link = html.A(entry.title, href=scene.view.change(result=entry.id, **also).to_url(), className="in-app",
                      **{"aria-current": "true" if shown is not None and entry.id == shown.id else "false"})  # fmt: skip
        about = f"{entry.created[:16].replace('T', ' ')} · {entry.model or 'no model'}"
        lines.append(html.Li([link, html.Div(about, className="form-hint")]))
    return [content_frame(f"{kind}-earlier", "Results", "Newest first.", html.Ul(lines, className="case-history"), "")]


def word_list(pairs: Sequence[Sequence[Any]]) -> Component:
    """Tokens with their numbers, as chips."""
    return html.Span([html.Span(str(word), className="chip chip-mono", title=f"{float(value):.4g}") for word, value in pairs],
                     className="chip-row")  # fmt: skip
