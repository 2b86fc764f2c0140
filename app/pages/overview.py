"""Overview: what the model is, what it did on this text, and the form that starts the next run."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import dash_mantine_components as dmc
from dash import ClientsideFunction, Dash, Input, Output, State, dcc, html, no_update
from dash.development.base_component import Component

from app.checkpoints import DTYPES, in_words
from app.frames import content_frame, frame
from app.page import Page
from app.panels.overview import PANELS
from app.panels.words import kind_words, spoken_list
from app.services import LARGEST_PROMPT, Scene, Services
from app.shell import provenance_chip
from workbench.lab.jobs import JobError

OTHER = "…"  # no model is called so
EXAMPLE = (
    "There is grandeur in this view of life, with its several powers, having been originally breathed into a few forms "
    "or into one."
)


def structure(scene: Scene) -> Hashable:
    """What the panels are called depends on what the model predicts."""
    return scene.run is not None and scene.run.has("here.log_probs"), scene.run is None


def layout(services: Services, scene: Scene) -> Sequence[Component]:
    form = content_frame(
        "new-run", "New run", "Give a text to a model; everything it does is recorded.", _form(services, scene), ""
    )
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
    title = html.Span(
        [known.get("title") or model.get("name") or run.title, " ", provenance_chip(model.get("provenance"))]
    )
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


def _choices(services: Services) -> list[dict[str, str]]:
    """The models of the form: what is here, with the way to others between the trained ones and the random weights."""
    models = _models(services)
    data = [{"value": str(model["name"]), "label": str(model.get("title") or model["name"])} for model in models]
    here = sum(model.get("provenance") != "random" for model in models)
    return [*data[:here], {"value": OTHER, "label": "Another one: a hub id…"}, *data[here:]] if data else []


def _form(services: Services, scene: Scene) -> Component:
    data = _choices(services)
    if not data:
        return html.P("No model is installed that a run could be started with.", className="form-hint")
    own = None if scene.run is None else scene.run.model.get("name")
    names = [choice["value"] for choice in data if choice["value"] != OTHER]
    chosen = own if own in names else names[0]
    return html.Div(
        [
            dmc.Select(id="form-model", label="Model", data=data, value=chosen, allowDeselect=False, searchable=True),
            html.Div([
                dmc.TextInput(id="form-hub", label="Hub id", placeholder="openai-community/gpt2", spellCheck=False),
                dmc.Button("Look up", id="form-look", n_clicks=0, variant="default"),
            ], id="form-other", className="form-look is-hidden"),
            html.Div(dmc.Select(id="form-dtype", label="Weights in memory", value=DTYPES[0][0], allowDeselect=False, size="sm",
                                data=[{"value": value, "label": words} for value, words in DTYPES]),
                     id="form-precision", className="is-hidden"),
            html.Div(id="form-about", className="form-hint", **{"aria-live": "polite"}),
            html.Div(dmc.Checkbox(id="form-anyway", label="Open it although memory may run out", checked=False),
                     id="form-tight", className="is-hidden"),
            html.Div(dmc.Textarea(id="form-source", label="Source: what its encoder reads", autosize=True, minRows=2, maxRows=6,
                                  spellCheck=False, placeholder="translate English to German: That is good."),
                     id="form-reads", className="is-hidden"),
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


def start(
    services: Services,
    name: str | None,
    text: str | None,
    dtype: str | None = None,
    anyway: bool = False,
    source: str | None = None,
) -> tuple[str | None, str]:
    """Start a trace: (job id or None, what to tell the reader)."""
    if not name or not name.strip():
        return None, "Choose a model first."
    if not text or not text.strip():
        return None, "Type a text first: there is nothing to read."
    for what, given in (("text", text), ("source", source or "")):
        if len(given) > LARGEST_PROMPT:
            return None, f"The {what} has {len(given):,} characters; at most {LARGEST_PROMPT:,} can be started here."
    settings = {"dtype": dtype or DTYPES[0][0]}
    try:
        listed = next((model for model in _models(services) if model["name"] == name), None)
        if listed is None or _is_folder(listed):
            known = services.models.look_up(name, dtype or DTYPES[0][0])
            if known["problem"]:
                return None, f"{name} cannot be opened: {known['problem']}"
            if known["tight"] and not anyway:
                return (
                    None,
                    "This may need more memory than is free: see the estimate above, and tick the box to open it anyway.",
                )
            if known["reads_source"]:
                if not source or not source.strip():
                    return None, f"{name} is an encoder-decoder: type its source, too (of a hub id, after Look up)."
                settings["source"] = source
        return services.models.start_trace(name, text, settings).id, ""
    except (ValueError, LookupError, JobError) as error:
        return None, str(error)


def _is_folder(model: Mapping[str, Any]) -> bool:
    """Whether a listed model is a folder or a hub id, of which files can be asked: neither shipped nor at random weights."""
    return model.get("provenance") != "random" and not model.get("card")


class About(NamedTuple):
    """What the form says of the chosen model, and which of its parts for checkpoints are shown."""

    words: Any
    hub: bool = False
    precision: bool = False
    tight: bool = False
    source: bool = False


def about_model(services: Services, name: str | None, hub: str | None, dtype: str | None, asked: bool) -> About:
    """What the form says once a model is chosen or, for one on the hub, looked up."""
    if name == OTHER:
        if not asked or not (hub or "").strip():
            said = "A model on the Hugging Face hub: its files are downloaded once and stay on this computer."
            return About(said, hub=True, precision=True)
        return _looked_up(services, str(hub), dtype)._replace(hub=True, precision=True)
    model = next((each for each in _models(services) if each["name"] == name), None)
    if model is None:
        return About("")
    if _is_folder(model):
        return _looked_up(services, str(name), dtype)._replace(precision=model.get("provenance") == "pretrained")
    size = _count(model.get("parameters"))
    parts = [part for part in (model.get("family"), size and f"{size} parameters") if part]
    words = [provenance_chip(model.get("provenance")), " ", " · ".join(parts)]
    if model.get("description"):
        words.append(html.P(model["description"], className="panel-words"))
    return About(words)


def _looked_up(services: Services, name: str, dtype: str | None) -> About:
    """What opening a checkpoint would take, whether memory is tight, and whether it reads a source."""
    try:
        known = services.models.look_up(name, dtype or DTYPES[0][0])
    except (ValueError, LookupError) as error:
        return About(html.Div(str(error), className="form-message"))
    facts: list[Component] = [html.Dl([html.Div([html.Dt(term), html.Dd(words)]) for term, words in in_words(known)],
                                      className="card-facts")]  # fmt: skip
    if known["problem"]:
        facts.append(html.Div(f"It cannot be opened: {known['problem']}", className="form-message"))
    return About(facts, tight=bool(known["tight"]), source=bool(known["reads_source"]))


def register(app: Dash, services: Services) -> None:
    @app.callback(
        Output("job", "data", allow_duplicate=True),
        Output("form-message", "children"),
        Input("form-start", "n_clicks"),
        State("form-model", "value"),
        State("form-hub", "value"),
        State("form-dtype", "value"),
        State("form-anyway", "checked"),
        State("form-text", "value"),
        State("form-source", "value"),
        prevent_initial_call=True,
        running=[(Output("form-start", "disabled"), True, False)],
    )
    def start_run(
        clicks: int,
        name: str | None,
        hub: str | None,
        dtype: str | None,
        anyway: bool,
        text: str | None,
        source: str | None,
    ) -> tuple[Any, str]:
        if not clicks:
            return no_update, ""
        job, words = start(services, hub if name == OTHER else name, text, dtype, bool(anyway), source)
        return (job if job else no_update), words

    @app.callback(
        Output("form-about", "children"),
        Output("form-other", "className"),
        Output("form-precision", "className"),
        Output("form-tight", "className"),
        Output("form-reads", "className"),
        Input("form-model", "value"),
        Input("form-look", "n_clicks"),
        Input("form-dtype", "value"),
        State("form-hub", "value"),
        running=[(Output("form-look", "loading"), True, False)],
    )
    def about(name: str | None, clicks: int | None, dtype: str | None, hub: str | None) -> tuple[Any, ...]:
        found = about_model(services, name, hub, dtype, asked=bool(clicks))
        parts = [("form-look", found.hub), ("", found.precision), ("", found.tight), ("", found.source)]
        return found.words, *(own if shown else f"{own} is-hidden".strip() for own, shown in parts)

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
