"""Overview: what the model is, what it did on this text, and the form that starts the next run."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import dash_mantine_components as dmc
from dash import ClientsideFunction, Dash, Input, Output, State, dcc, html, no_update
from dash.development.base_component import Component

from app.frames import content_frame, frame
from app.page import Page
from app.panels.overview import PANELS
from app.panels.words import kind_words, spoken_list
from app.services import LARGEST_PROMPT, Scene, Services
from app.shell import provenance_chip
from workbench.lab.jobs import JobError

EXAMPLE = (
    "There is grandeur in this view of life, with its several powers, having been originally breathed into a few forms "
    "or into one."
)


def structure(scene: Scene) -> Hashable:
    return scene.run is None


def layout(services: Services, scene: Scene) -> Sequence[Component]:
    form = content_frame("new-run", "New run", "Give a text to a model; everything it does is recorded.", _form(services), "")
    if scene.run is None:
        return [html.Div([html.Div(_welcome(), className="column span-7"), html.Div(form, className="column span-5")],
                         className="grid")]  # fmt: skip
    diagram, text, surprisal, next_tokens, residual = PANELS
    left = [_card(services, scene), *[frame(panel, scene, "") for panel in (diagram, text, surprisal)]]
    right = [form, frame(next_tokens, scene, "")]
    columns = [html.Div(left, className="column span-8"), html.Div(right, className="column span-4")]
    return [html.Div([*columns, frame(residual, scene)], className="grid")]


def _welcome() -> Component:
    words = (
        "A run is one text read by one model, with everything that happened inside written down: who reads from whom, what "
        "is remembered, and what comes next. Start one with the form, then look at it on the other pages."
    )
    return content_frame("welcome", "No run yet", "", html.P(words, className="prose"), "")


# ---- model card ------------------------------------------------------------------------------------------------------


def _card(services: Services, scene: Scene) -> Component:
    run = scene.opened()
    model = run.model
    known = next((each for each in _models(services) if each["name"] == model.get("name")), {})
    kinds = [layer["kind"] for layer in run.layers]
    made_of = spoken_list([f"{kinds.count(kind)} × {kind_words(kind)}" for kind in dict.fromkeys(kinds)])
    facts = [
        ("architecture", model.get("architecture")), ("family", model.get("family")), ("layers", made_of),
        ("parameters", _count(model.get("parameters"))), ("paper", model.get("paper")),
        ("tokens", f"{scene.n_tokens} ({(run.manifest.get('tokens') or {}).get('tokenizer') or 'unknown'})"),
    ]  # fmt: skip
    shown = [html.Div([html.Dt(name), html.Dd(text)]) for name, text in facts if text]
    details: list[Component] = [html.P(known["description"], className="prose")] if known.get("description") else []
    details.append(html.Dl(shown, className="card-facts"))
    if known.get("card"):
        card = dcc.Markdown(known["card"], className="card-text")
        details.append(html.Details([html.Summary("Full card", className="card-summary"), card]))
    title = html.Span([known.get("title") or model.get("name") or run.title, " ", provenance_chip(model.get("provenance"))])
    return content_frame("card", title, "", details, "")  # type: ignore[arg-type]


def _count(number: Any) -> str | None:
    if not isinstance(number, (int, float)) or number <= 0:
        return None
    for size, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= size:
            return f"{number / size:.3g} {name}"
    return str(int(number))


# ---- new run ---------------------------------------------------------------------------------------------------------


def _models(services: Services) -> Sequence[Mapping[str, Any]]:
    return services.models.list_models()


def _form(services: Services) -> Component:
    models = _models(services)
    data = [{"value": model["name"], "label": model.get("title") or model["name"]} for model in models]
    if not data:
        return html.P("No model is installed that a run could be started with.", className="form-hint")
    return html.Div(
        [
            dmc.Select(id="form-model", label="Model", data=data, value=data[0]["value"], allowDeselect=False, searchable=True),
            html.Div(id="form-about", className="form-hint"),
            dmc.Textarea(id="form-text", label="Text", value=EXAMPLE, autosize=True, minRows=3, maxRows=9, spellCheck=False,
                         placeholder="Type or paste a text"),
            html.Div([
                dmc.Button("Start", id="form-start", n_clicks=0),
                html.Span(id="form-size", className="form-hint", **{"aria-live": "polite"}),
            ], className="form-row"),
            html.Div(id="form-message", className="form-message", role="alert"),
        ],
        className="form-stack",
    )  # fmt: skip


def start(services: Services, name: str | None, text: str | None) -> tuple[str | None, str]:
    """Start a trace: (job id or None, what to tell the reader)."""
    if not name:
        return None, "Choose a model first."
    if not text or not text.strip():
        return None, "Type a text first: there is nothing to read."
    if len(text) > LARGEST_PROMPT:
        return None, f"The text has {len(text):,} characters; at most {LARGEST_PROMPT:,} can be started from here."
    try:
        return services.models.start_trace(name, text, {}).id, ""
    except (ValueError, LookupError, JobError) as error:
        return None, str(error)


def register(app: Dash, services: Services) -> None:
    @app.callback(
        Output("job", "data", allow_duplicate=True),
        Output("form-message", "children"),
        Input("form-start", "n_clicks"),
        State("form-model", "value"),
        State("form-text", "value"),
        prevent_initial_call=True,
        running=[(Output("form-start", "disabled"), True, False)],
    )
    def start_run(clicks: int, name: str | None, text: str | None) -> tuple[Any, str]:
        if not clicks:
            return no_update, ""
        job, words = start(services, name, text)
        return (job if job else no_update), words

    @app.callback(Output("form-about", "children"), Input("form-model", "value"))
    def about(name: str | None) -> Any:
        model = next((each for each in _models(services) if each["name"] == name), None)
        if model is None:
            return ""
        size = _count(model.get("parameters"))
        parts = [part for part in (model.get("family"), size and f"{size} parameters") if part]
        words = [provenance_chip(model.get("provenance")), " ", " · ".join(parts)]
        return [*words, html.P(model["description"], className="panel-words")] if model.get("description") else words

    app.clientside_callback(
        ClientsideFunction("workbench", "text_size"),
        Output("form-size", "children"),
        Input("form-text", "value"),
    )


PAGE = Page(
    name="overview",
    title="Overview",
    icon="overview",
    order=0,
    words="What the model is made of, what it found hard in this text, and what it expects next.",
    layout=layout,
    panels=PANELS,
    structure=structure,
    register=register,
    needs_run=False,
)
