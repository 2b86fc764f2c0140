"""The frame of every page: top bar, navigation, token strip, inspector, job bar, help."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import dash_mantine_components as dmc
from dash import dcc, html
from dash.development.base_component import Component

from app.figures.common import number, token_label, visible_text
from app.frames import icon
from app.panels.overview import token_name
from app.panels.words import kind_words, memory_words, pattern_words
from app.services import Scene
from app.theme import MANTINE_ACCENT, MANTINE_DARK, Theme
from workbench.lab.run_format import ENCODER_PREFIX

PROVENANCE = {
    "trained": ("trained here", "chip-good"),
    "pretrained": ("pretrained weights", "chip-accent"),
    "random": ("random weights", "chip-warning"),
}
INSPECTED = ["page", "run", "part", "layer", "head", "query", "key", "position"]
KEYS = (
    (("←", "→"), "previous, next token"), (("↑", "↓"), "layer up, layer down"), (("[", "]"), "previous, next head"),
    (("/",), "find in the text; Enter goes to the next hit"), (("?",), "this help"),
    (("Esc",), "unpin the tokens and show the whole map"), (("Shift", "click"), "on a token: zoom to the range from the pinned one"),
)  # fmt: skip


class NavigationEntry(Protocol):
    """What the navigation needs to know about a page."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def title(self) -> str: ...
    @property
    def icon(self) -> str: ...
    @property
    def group(self) -> str: ...


def shell(pages: Sequence[NavigationEntry], theme: Theme, jobs_active: bool) -> Component:
    """The whole page before any view is known."""
    return dmc.MantineProvider(
        id="mantine",
        forceColorScheme=theme.name,
        theme={
            "primaryColor": "accent", "primaryShade": {"light": 7, "dark": 6}, "colors": {"dark": MANTINE_DARK, "accent": MANTINE_ACCENT},
            "fontFamily": "var(--wb-font)", "fontFamilyMonospace": "var(--wb-mono)",
            "defaultRadius": "md", "headings": {"fontFamily": "var(--wb-font)"}, "respectReducedMotion": True,
        },
        children=[
            html.A("Skip to the content", href="#page", className="skip-link"),
            dcc.Location(id="url", refresh="callback-nav"),
            dcc.Store(id="view"), dcc.Store(id="facts"), dcc.Store(id="structure"), dcc.Store(id="go"),
            dcc.Store(id="runs-changed", data=0), dcc.Store(id="job"),
            dcc.Store(id="scheme", data=theme.name),
            dcc.Store(id="inspector-slice", data={"depends": INSPECTED, "view": None}),
            dcc.Interval(id="job-tick", interval=400, disabled=not jobs_active),
            html.Div(id="facts-taken", className="sr-only"), html.Div(id="status", className="sr-only", role="status"),
            dmc.AppShell(
                [
                    dmc.AppShellHeader(_top_bar(), className="topbar-frame"),
                    dmc.AppShellNavbar(_navigation(pages)),
                    dmc.AppShellAside(html.Div(id="inspector", className="inspector"), **{"aria-label": "Inspector"}),
                    dmc.AppShellMain([_strip_bar(), html.Div(id="page", tabIndex=-1)]),
                ],
                id="frame", header={"height": 56}, padding=0, transitionDuration=0,
                navbar={"width": 196, "breakpoint": "sm", "collapsed": {"mobile": True}},
                aside={"width": 268, "breakpoint": "lg", "collapsed": {"mobile": True, "desktop": False}},
            ),
            _job_bar(),
            dmc.Modal(id="sheet", title="", size="xl", children=html.Div(id="sheet-content")),
            dmc.Modal(_help(), id="help", title="Keyboard", size="md"),
        ],
    )  # fmt: skip


def _top_bar() -> html.Div:
    return html.Div(
        [
            dmc.Burger(id="burger", opened=False, size="sm", hiddenFrom="sm", **{"aria-label": "Navigation"}),
            html.A([html.Img(src="/assets/logo.svg", alt=""), html.Span("Workbench")], href="/", className="brand in-app"),
            html.Div(id="crumbs", className="crumbs"),
            html.Div(
                [
                    _tool("copy-link", "link", "Copy a link to exactly this view"),
                    _tool("help", "help", "Keyboard and help"),
                    html.Button(
                        [html.Span(icon("moon"), className="only-light"), html.Span(icon("sun"), className="only-dark")],
                        className="tool-button", type="button", title="Light or dark",
                        **{"data-action": "scheme", "aria-label": "Switch between light and dark"},
                    ),
                ],
                className="topbar-tools",
            ),
        ],
        className="topbar",
    )  # fmt: skip


def _tool(action: str, picture: str, words: str, **attributes: Any) -> html.Button:
    return html.Button(icon(picture), className="tool-button hide-narrow" if action != "help" else "tool-button", type="button",
                       title=words, **{"data-action": action, "aria-label": words, **attributes})  # fmt: skip


def _navigation(pages: Sequence[NavigationEntry]) -> html.Nav:
    links: list[Component] = []
    group = ""
    for page in pages:
        if page.group != group:
            group = page.group
            links.append(html.Div(group, className="nav-group"))
        links.append(html.A([icon(page.icon), page.title], href=page.path, className="nav-link",
                            id={"type": "nav", "page": page.name, "path": page.path}))  # fmt: skip
    foot = html.Div([html.Kbd("?"), " keyboard  ", html.Kbd("/"), " find"], className="nav-foot")
    return html.Nav([*links, foot], className="nav", **{"aria-label": "Pages"})


def _strip_bar() -> html.Div:
    return html.Div(
        [
            html.Span(id="strip-position", className="strip-position"),
            html.Div(id="token-strip", className="strip", **{"data-strip": "{}", "aria-label": "Tokens of the run"}),
            html.Div(
                dmc.TextInput(id="token-search", placeholder="find, Enter = next", size="xs", **{"aria-label": "Find in the text"}),
                id="strip-search", className="strip-search",
            ),
            html.Span(id="strip-found", className="strip-found", **{"aria-live": "polite"}),
            html.Button(icon("search"), className="tool-button hide-narrow", type="button", title="Find in the text ( / )",
                        **{"data-action": "search", "aria-label": "Find in the text"}),
            html.Button(icon("expand"), className="tool-button", type="button", title="Show the whole text",
                        **{"data-action": "strip-open", "aria-label": "Show the whole text", "aria-expanded": "false"}),
        ],
        className="strip-bar", id="strip-bar",
    )  # fmt: skip


def _job_bar() -> html.Div:
    return html.Div(
        [
            html.Div([
                html.Span(id="job-title", className="job-title"), html.Span(id="job-percent", className="mono"),
                html.Button("Cancel", id="job-cancel", className="tool-button is-framed", type="button", n_clicks=0),
            ], className="job-line"),
            dmc.Progress(id="job-progress", value=0, size="sm", transitionDuration=200, **{"aria-label": "Progress of the job"}),
            html.Div(id="job-message", className="job-message", **{"aria-live": "polite"}),
        ],
        id="job-bar", className="job-bar is-hidden", role="region", **{"aria-label": "Job"},
    )  # fmt: skip


def _help() -> html.Div:
    rows: list[Component] = []
    for keys, words in KEYS:
        rows += [html.Dt([part for key in keys for part in (html.Kbd(key), " ")]), html.Dd(words)]
    words = "A click on a token pins it on every page. Everything that you see is in the address: copy it to share the view."
    return html.Div([html.Dl(rows, className="help-keys"), html.P(words, className="prose", style={"marginTop": "18px"})])


# ---- parts that follow the view --------------------------------------------------------------------------------------


def crumbs(scene: Scene, run_choices: list[dict[str, str]]) -> list[Component]:
    """model ▸ run ▸ prompt, with the provenance of the weights."""
    select = dmc.Select(
        id={"type": "control", "key": "run", "default": ""}, data=run_choices, value=scene.run.id if scene.run else None, size="xs",
        searchable=True, placeholder="choose a run", className="crumb-run", nothingFoundMessage="no such run",
        allowDeselect=False, comboboxProps={"width": 380, "position": "bottom-start"}, **{"aria-label": "Run"},
    )  # fmt: skip
    if scene.run is None:
        return [select]
    model, text = scene.run.model, scene.run.manifest.get("text") or ""
    arrow = html.Span("▸", className="crumb-separator", **{"aria-hidden": "true"})
    last = html.Span("▸", className="crumb-separator is-last", **{"aria-hidden": "true"})
    parts: list[Component] = [html.Span(model.get("name") or scene.run.title, className="crumb-model")]
    parts += [provenance_chip(model.get("provenance")), arrow, select, last]
    return [*parts, html.Span(f"“{' '.join(text.split())[:160]}”" if text else "", className="crumb-prompt", title=text[:400])]


def provenance_chip(provenance: str | None) -> html.Span:
    """Where the weights come from, as a badge."""
    words, look = PROVENANCE.get(provenance or "", ("unknown weights", ""))
    return html.Span(words, className=f"chip {look}")


def inspector(scene: Scene) -> list[Component]:
    """What is under the pointer (filled in by the page itself), pinned, and known about the layer."""
    under = html.Section([
        html.H2("Under the pointer"),
        html.Div("–", id="inspector-value", className="reading"),
        html.Dl(id="inspector-value-rows", className="facts"),
        html.P("Hover a map to read exact values.", className="panel-words"),
    ])  # fmt: skip
    if scene.run is None:
        return [under]
    return [under, _pinned(scene), *_layer(scene), _run(scene)]


def _facts(rows: Sequence[tuple[str, str]], mono: bool = False) -> html.Dl:
    children: list[Component] = []
    for name, text in rows:
        children += [html.Dt(name), html.Dd(text, className="mono" if mono else "")]
    return html.Dl(children, className="facts")


def _pinned(scene: Scene) -> html.Section:
    run, at_state = scene.opened(), scene.view.page == "state"
    index = scene.position if at_state else scene.query
    if not scene.n_tokens:
        return html.Section([html.H2("Pinned token"), html.P("This run has no tokens.")])
    rows = [("token", token_label(scene.tokens, index))]
    if run.has("loss"):
        rows.append(("surprisal", f"{number(float(run.array('loss')[index]))} nats"))
    for name, words in (("next", "expects"), ("here", "would put here")):
        if not run.has(f"{name}.ids"):
            continue
        best = int(run.array(f"{name}.ids")[index, 0])
        chance = float(run.array(f"{name}.log_probs")[index, 0])
        rows.append((words, f"‘{visible_text(token_name(scene, best))}’ {math.exp(chance):.0%}"))
    if scene.view.key is not None:
        rows.append(("pinned source", token_label(scene.read_tokens, scene.view.key)))
    name = "Token shown" if at_state else "Pinned token" if scene.view.query is not None else "Last token (none pinned)"
    return html.Section([html.H2(name), _facts(rows, mono=True)])


def _layer(scene: Scene) -> list[Component]:
    layer = scene.layer
    if layer is None:
        return []
    kind = kind_words(layer["kind"])
    block = f"{ENCODER_PREFIX if scene.view.part else ''}blocks.{layer['layer']}."
    points = [p for p in scene.opened().manifest.get("hook_points", []) if str(p["name"]).startswith(block)]
    chips = html.Div([html.Span(fact, className="chip", style={"whiteSpace": "normal", "height": "auto", "padding": "2px 8px"})
                      for fact in (pattern_words(layer) if layer.get("form") else [])],
                     style={"display": "flex", "flexWrap": "wrap", "gap": "5px", "margin": "2px 0 10px"})  # fmt: skip
    name = f"{scene.view.part} layer {layer['layer']}: {kind}".strip()
    parts: list[Component] = [html.H2(name[0].upper() + name[1:]), chips, html.P(memory_words(layer), className="panel-words")]
    if points:
        parts.append(html.Details([
            html.Summary(f"{len(points)} hook point{'s' if len(points) > 1 else ''}", className="panel-words"),
            html.Div([html.Div([html.Span(p["name"], className="mono"), html.Span(f" {p['role']}", className="panel-words")])
                      for p in points], style={"fontSize": "11.5px", "overflowWrap": "anywhere"}),
        ]))  # fmt: skip
    return [html.Section(parts)]


def _run(scene: Scene) -> html.Section:
    run = scene.opened()
    settings = ", ".join(f"{name} = {value}" for name, value in run.manifest.get("settings", {}).items())
    rows = [("id", run.id), ("made", run.created[:16].replace("T", " ") + " UTC"), ("tokens", str(scene.n_tokens))]
    rows += [("interventions", str(len(run.manifest.get("interventions", []))))] if run.manifest.get("interventions") else []
    rows += [("seed", str(run.manifest["seed"]))] if run.manifest.get("seed") is not None else []
    rows += [("settings", settings[:160])] if settings else []
    return html.Section([html.H2("Run"), _facts(rows, mono=True)])
