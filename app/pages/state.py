"""State: what a mixer remembers from token to token, whatever kind of memory it has."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import dash_mantine_components as dmc
from dash import Dash, Output, html
from dash.development.base_component import Component

from app import ablate
from app.figures.common import number, token_label
from app.frames import content_frame, explain, frame, icon, scene_of_slice, slice_input, view_slice
from app.page import Page, control_id, head_choice, layer_choice, pooling_choice, scale_choice, slot_choice, sort_choice
from app.panels import memory, retention, state
from app.panels.base import Panel
from app.panels.memory import RASTER_X, neuron_rows, sparsity_words
from app.panels.words import memory_words, row_and_column
from app.services import Scene, Services
from app.theme import theme_called

STATE, SPECTRUM, NORMS, DECAY, SIGNALS, TRACKED = state.PANELS
OVER_TIME, KEPT = retention.PANELS
CACHE_KEYS, CACHE_VALUES, NEURONS_X, NEURONS_Y, TOP_NEURONS = memory.PANELS
TIME_FIELDS = ("run", "layer", "slot", "head", "query", "position")


def _form(scene: Scene) -> tuple[bool, ...]:
    """Which kinds of memory the chosen layer has: cache, state of fixed size, neurons, decay, other signals, keys to ask it for."""
    layer, run = scene.layer, scene.run
    if layer is None or run is None:
        return (False,) * 6
    index = layer["layer"]
    return (
        layer.get("form") == "softmax",
        state.has_state(scene),
        run.has(f"layer.{index}.x"),
        run.has(f"layer.{index}.log_decay"),
        run.has(f"layer.{index}.write") or bool(layer.get("signals")),
        state.has_state(scene) and run.has(f"layer.{index}.key") and run.has(f"layer.{index}.value"),
    )


def structure(scene: Scene) -> Hashable:
    if scene.layer is None:
        return None
    form = _form(scene)
    slots = tuple(slot["name"] for slot in scene.slots)
    return form, scene.layer["n_heads"], slots, _is_vector(scene), memory_words(scene.layer) if form[0] else None


def _is_vector(scene: Scene) -> bool:
    """Whether the shown state has no second axis, and so no spectrum."""
    return len(scene.slot.get("axes", ())) < 3


def controls(scene: Scene) -> Sequence[Component]:
    if not scene.layers:
        return []
    neurons = [sort_choice(scene)] if _form(scene)[2] else []
    return [
        layer_choice(scene),
        head_choice(scene),
        *slot_choice(scene),
        *neurons,
        pooling_choice(scene),
        scale_choice(scene),
    ]


def layout(services: Services, scene: Scene) -> Sequence[Component]:
    if scene.layer is None:
        return [html.Div(frame(STATE, scene), className="grid")]
    cache, matrix, neurons, decay, signals, keys = _form(scene)
    time = _time_bar(scene, compare=matrix and not _is_vector(scene))  # a vector shows all times at once
    left: list[Component] = []
    right: list[Component] = []
    if matrix:
        followed = [
            html.Div(id="tracked-list", className="tracked-list"),
            view_slice("content", "tracked", (*TIME_FIELDS, "tracked")),
        ]
        largest = [html.Div(id="largest-entries"), view_slice("content", "largest", (*TIME_FIELDS, "tracked"))]
        shown = OVER_TIME if _is_vector(scene) else STATE
        left += [frame(shown, scene, ""), frame(TRACKED, scene, "", above=followed)]
        right += [
            frame(NORMS, scene, ""), *([] if _is_vector(scene) else [frame(SPECTRUM, scene, "")]),
            content_frame("largest", "Largest entries now", "The entries of largest magnitude in the state shown.", largest, ""),
        ]  # fmt: skip
    if keys:
        right.append(frame(KEPT, scene, ""))
    if decay:
        left.append(frame(DECAY, scene, ""))
    if signals:
        left.append(frame(SIGNALS, scene, ""))
    if neurons:
        listed = [html.Div(id="neuron-rows"), view_slice("content", "neuron", TIME_FIELDS)]
        left += [frame(NEURONS_X, scene, ""), frame(NEURONS_Y, scene, "")]
        right += [
            frame(TOP_NEURONS, scene, ""),
            content_frame("neuron-list", "Most active neurons now", "", listed, ""),
        ]
    parts: list[Component] = [time, html.Div(ablate.button(scene), className="span-12")]
    if left or right:
        parts += [html.Div(left, className="column span-7"), html.Div(right, className="column span-5")]
    if cache:
        words = html.P(
            [memory_words(scene.layer), " It grows with the text instead of being overwritten, so nothing here decays: what "
             "changes from token to token is only that one more column is added."], className="prose",
        )  # fmt: skip
        parts += [
            content_frame("cache-words", "The memory of softmax attention is its KV cache", "", words),
            frame(CACHE_KEYS, scene, "span-6"), frame(CACHE_VALUES, scene, "span-6"),
        ]  # fmt: skip
    if not (cache or matrix or neurons):
        parts.append(frame(STATE, scene))
    return [html.Div(parts, className="grid")]


def _time_bar(scene: Scene, compare: bool) -> html.Section:
    def step(by: int, picture: str, words: str) -> html.Button:
        return html.Button(icon(picture), className="tool-button is-framed", type="button", title=words,
                           **{"data-action": "step", "data-by": str(by), "aria-label": words})  # fmt: skip

    slider = dmc.Slider(
        id=control_id("position"), min=0, max=max(1, scene.n_tokens - 1), value=scene.position, step=1, updatemode="drag",
        label=None, size="sm", className="time-slider", thumbLabel="Time: the token after which the state is shown",
    )  # fmt: skip
    comparing = [
        html.Button("Compare with this time", id="compare-button", type="button", **{"data-action": "compare"},
                    className=f"tool-button is-framed{'' if compare else ' is-hidden'}"),
    ]  # fmt: skip
    return html.Section(
        [
            html.Div([
                html.Div([
                    step(-1, "step-back", "One token back"),
                    html.Button(icon("play"), className="tool-button is-framed", type="button", title="Play over time",
                                **{"data-action": "play", "aria-label": "Play over time", "aria-pressed": "false"}),
                    step(1, "step-forward", "One token on"),
                ], className="time-buttons"),
                slider,
                html.Span(id="time-token", className="time-token"),
                *comparing,
                view_slice("content", "time", (*TIME_FIELDS, "compare")),
            ], className="time-row"),
        ],
        className="panel span-12 time-panel", **{"aria-label": "Time"},
    )  # fmt: skip


def _swatch(colour: str) -> html.Span:
    return html.Span(className="swatch", style={"background": colour})


def largest_entries(scene: Scene) -> Component:
    """The entries of largest magnitude, each with a button to follow it."""
    try:
        state.check_state(STATE, scene)
        names = row_and_column(state.axes_of(scene))
        entries = scene.state_factors().top_entries(scene.view.head, scene.position, 8)
    except Exception as failure:  # the other panels stay; this one says why it is empty
        return explain("largest", failure)
    rows = []
    for entry in entries:
        followed = (entry.state_k, entry.state_v) in scene.view.tracked
        rows.append(html.Tr([
            html.Th(state.entry_words(scene, entry.state_k, entry.state_v), scope="row"), html.Td(number(entry.value)),
            html.Td(html.Button("Stop" if followed else "Follow", className="tool-button is-framed follow-button", type="button",
                                **{"data-action": "untrack", "data-entry": f"{entry.state_k}.{entry.state_v}"})),
        ]))  # fmt: skip
    entry_words = f"[{', '.join(filter(None, names))}]"  # a vector has one axis
    head = html.Thead(html.Tr([html.Th(words, scope="col") for words in (entry_words, "value", "")]))
    return html.Table([head, html.Tbody(rows)], className="value-table")


def tracked_chips(scene: Scene, scheme: str | None) -> list[Component]:
    """The followed entries, each with its colour and a button to let it go."""
    theme = theme_called(scheme)
    try:
        entries = TRACKED.entries(scene)  # type: ignore[attr-defined]
    except Exception:  # the panel below says why
        return []
    return [
        html.Span([
            _swatch(theme.categorical[index % 8]), state.entry_words(scene, row, column),
            html.Button(icon("close"), type="button", title="Stop following",
                        **{"data-action": "untrack", "data-entry": f"{row}.{column}", "aria-label": f"Stop following [{row}, {column}]"}),
        ], className="chip chip-mono")
        for index, (row, column) in enumerate(entries)
    ]  # fmt: skip


def neuron_table(scene: Scene) -> Component:
    """The neurons that fire most at the chosen token."""
    try:
        rows = neuron_rows(scene, RASTER_X)
        words = sparsity_words(scene, RASTER_X)
    except Exception as failure:  # as above
        return explain("neuron-list", failure)
    head = html.Thead(
        html.Tr([html.Th(name, scope="col") for name in ("neuron", "activity", "active at", "strongest at token")])
    )
    body = [
        html.Tr([html.Th(str(neuron), scope="row"), html.Td(number(now)), html.Td(f"{count} tokens"), html.Td(token)])
        for neuron, now, count, token in rows
    ]  # fmt: skip
    return html.Div([html.P(f"At token {token_label(scene.tokens, scene.position)}: {words}.", className="panel-words"),
                     html.Table([head, html.Tbody(body)], className="value-table")])  # fmt: skip


def register(app: Dash, services: Services) -> None:
    def scene_of(data: dict[str, Any] | None) -> Scene | None:
        return scene_of_slice(services, data["view"]) if data and data.get("view") else None

    @app.callback(
        Output("time-token", "children"), Output("compare-button", "children"), slice_input("content", "time")
    )
    def show_time(data: dict[str, Any] | None) -> tuple[Any, str]:
        scene = scene_of(data)
        if scene is None or not scene.n_tokens:
            return "", "Compare with this time"
        other = scene.view.compare
        text = "Compare with this time" if other is None else f"Stop comparing with token {other}"
        return ["after ", token_label(scene.tokens, scene.position)], text

    @app.callback(Output("largest-entries", "children"), slice_input("content", "largest"))
    def show_largest(data: dict[str, Any] | None) -> Any:
        scene = scene_of(data)
        return None if scene is None else largest_entries(scene)

    @app.callback(Output("tracked-list", "children"), slice_input("content", "tracked"))
    def show_tracked(data: dict[str, Any] | None) -> Any:
        scene = scene_of(data)
        return None if scene is None or data is None else tracked_chips(scene, data["view"].get("scheme"))

    @app.callback(Output("neuron-rows", "children"), slice_input("content", "neuron"))
    def show_neurons(data: dict[str, Any] | None) -> Any:
        scene = scene_of(data)
        return None if scene is None else neuron_table(scene)


PANELS: tuple[Panel, ...] = (*state.PANELS, *retention.PANELS, *memory.PANELS)
PAGE = Page(
    name="state",
    title="State",
    icon="state",
    order=2,
    words="What a layer remembers after each token: its state, its neurons, or its KV cache.",
    layout=layout,
    panels=PANELS,
    structure=structure,
    controls=controls,
    register=register,
)
