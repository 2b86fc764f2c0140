"""Compare: the same text in two models, two texts in one model, or two checkpoints, side by side on the same axes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from dash import Dash, Output, html
from dash.development.base_component import Component

from app.figures.common import visible_text
from app.forms import earlier_results, form_frame, register_form
from app.frames import content_frame, explain, frame, scene_of_slice, slice_input, view_slice
from app.measure.compare import KIND, start_comparing
from app.page import Page, choice, head_choice, layer_choice, scale_choice, zoom_buttons
from app.panels import compare, shared_maps
from app.panels.base import NothingToShow
from app.panels.compare import stored_scores
from app.panels.pairs import Pair
from app.services import Scene, Services
from app.view_state import HEAD_SCORES, MATCHES, ViewState
from workbench.lab.jobs import Job

MAP_A, MAP_B, DIFFERENCE = shared_maps.MAPS
HEADS, ALIKE, SURPRISAL, NEXT, APART, LENSES = compare.PANELS
MOST_CHOICES = 200
MOST_CHIPS = 600
"""Parts of the alignment strip; of a longer text those around the pinned token."""


def pair_of(scene: Scene) -> Pair | None:
    """The two runs, or None where there are no two that can be compared; the panels say why."""
    try:
        return Pair.of(scene) if scene.run is not None else None
    except NothingToShow:
        return None


def structure(scene: Scene) -> Hashable:
    return "compare", scene.view.run_b, scene.view.result, scene.layer["n_heads"] if scene.layer else None


def controls(scene: Scene) -> Sequence[Component]:
    if not scene.layers:
        return []
    pair = pair_of(scene)
    heads = [f"{layer}.{head}" for layer, head in pair.heads(1)] if pair is not None else []
    others = [{"value": name, "label": words} for name, words in MATCHES.items()]
    others += [{"value": name, "label": f"layer {name.replace('.', ', head ')}"} for name in heads]
    return [
        layer_choice(scene),
        head_choice(scene),
        choice("head_b", "Head of B", others, scene.view.head_b, 150),
        scale_choice(scene, rows=False),
    ]


def layout(services: Services, scene: Scene) -> Sequence[Component]:
    pair = pair_of(scene)
    chooser = content_frame(
        "compare-runs", "Two runs", "A is the run that is open above.", html.Div(_run_b(services, scene)), "span-12"
    )
    if pair is None:
        return [html.Div([chooser, frame(MAP_A, scene, "span-12")], className="grid")]
    strip = content_frame(
        "compare-alignment", "How the texts align", pair.alignment.in_words(),
        [html.Div(id="compare-strip"), view_slice("content", "compare-strip", ("run", "run_b", "query"))], "span-12",
    )  # fmt: skip
    left = [
        frame(
            DIFFERENCE,
            scene,
            "",
            above=[html.Div([html.Div(), zoom_buttons("Whole maps", "whole-shared", near=False)], className="map-bar")],
        ),
        frame(SURPRISAL, scene, ""),
    ]
    right = [
        frame(HEADS, scene, "", above=[html.Div(_score(scene, pair), className="map-bar")]),
        frame(ALIKE, scene, ""),
        frame(NEXT, scene, ""),
    ]
    words = (
        "Both models read their texts again: how far apart the predictions are, and when either settles on its answer."
    )
    form = form_frame("compare", "Predictions and lenses", words, [], "Measure")
    return [
        html.Div(
            [
                chooser,
                strip,
                frame(MAP_A, scene, "span-6"),
                frame(MAP_B, scene, "span-6"),
                html.Div([*left, frame(APART, scene, ""), frame(LENSES, scene, "")], className="column span-7"),
                html.Div(
                    [
                        *right,
                        form,
                        *earlier_results(services, scene, KIND, of={"run": scene.view.run, "run_b": scene.view.run_b}),
                    ],
                    className="column span-5",
                ),
            ],
            className="grid",
        )
    ]


def _run_b(services: Services, scene: Scene) -> Component:
    """Choose run B among the traces."""
    entries = services.trace_entries()[:MOST_CHOICES]
    data = [
        {"value": e.id, "label": f"{e.model or 'no model'} · {e.title} · {e.tokens} tokens · {e.id[:15]}"}
        for e in entries
        if scene.run is None or e.id != scene.run.id
    ]
    found = choice("run_b", "B", data, scene.view.run_b, 420)
    found.searchable = True
    found.placeholder = "choose a second run"
    found.w = "min(420px, 100%)"
    if not scene.view.run_b:
        found.value = None
    return found


def _score(scene: Scene, pair: Pair) -> Component:
    """Choose the score of the scatter: of the patterns, or one that is stored for both models."""
    known = [stored_scores(scene, run) for run in pair.runs]
    names = {**HEAD_SCORES, **{name: f"{name}, measured" for name in sorted(set(known[0]) & set(known[1]))}}
    return choice(
        "head_score", "Score", [{"value": v, "label": words} for v, words in names.items()], scene.view.head_score, 230
    )


def alignment_strip(scene: Scene) -> Component:
    """Both texts, part over part; what only one of them has is marked."""
    try:
        pair = Pair.of(scene)
    except Exception as failure:  # the other frames stay; this one says why it is empty
        return explain("compare-strip", failure)
    centre, size = pair.part_of(scene.query), len(pair)
    start = 0 if size <= MOST_CHIPS else max(0, min(centre - MOST_CHIPS // 2, size - MOST_CHIPS))
    stop = min(size, start + MOST_CHIPS)
    first, second = pair.texts(0), pair.texts(1)
    cells = []
    for part in range(start, stop):
        look = (
            "align-part"
            + ("" if pair.alignment.aligned[part] else " is-alone")
            + (" is-pinned" if part == centre else "")
        )
        tokens = [pair.alignment.tokens(side)[part].tolist() for side in (0, 1)]
        title = " · ".join(f"{letter} {a}" if b - a == 1 else f"{letter} {a}–{b - 1}" if b > a else f"not in {letter}"
                           for letter, (a, b) in zip("AB", tokens, strict=True))  # fmt: skip
        texts = [
            visible_text(each[part]) if b > a else "" for each, (a, b) in zip((first, second), tokens, strict=True)
        ]
        cells.append(html.Span([html.Span(texts[0] or " "), html.Span(texts[1] or " ")], className=look, title=title))
    more = (
        []
        if size <= MOST_CHIPS
        else [html.P(f"Parts {start} to {stop - 1} of {size}, around the pinned token.", className="form-hint")]
    )
    names = html.Span([html.Span("A"), html.Span("B")], className="align-names")
    parts = html.Div(cells, className="align-parts", tabIndex=0)
    rows = html.Div(
        [names, parts], className="align-strip", role="group", **{"aria-label": "Both texts, part over part"}
    )
    return html.Div([rows, *more])


def register(app: Dash, services: Services) -> None:
    def start(view: ViewState) -> Job:
        return start_comparing(services, services.scene(view))

    register_form(app, "compare", (), start)

    @app.callback(Output("compare-strip", "children"), slice_input("content", "compare-strip"))
    def show_strip(data: dict[str, Any] | None) -> Any:
        return alignment_strip(scene_of_slice(services, data["view"])) if data and data.get("view") else None


PAGE = Page(
    name="compare",
    title="Compare",
    icon="compare",
    order=2,
    group="Measure",
    words="Two models, texts or checkpoints side by side: the same axes, the same zoom, and what differs.",
    layout=layout,
    panels=(*shared_maps.MAPS, *compare.PANELS),
    structure=structure,
    controls=controls,
    register=register,
    opens_kind=KIND,
)
