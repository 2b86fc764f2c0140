"""Residual & lens: when the answer appears in the residual stream, and who wrote it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from dash import Dash, html
from dash.development.base_component import Component

from app.forms import count_input, earlier_results, form_frame, register_form, select, side_by_side, text_input
from app.frames import content_frame, frame
from app.measure.common import says_here
from app.measure.lens import (
    KIND,
    PLAIN,
    TARGETS,
    TARGETS_HERE,
    TRAIN,
    corpora,
    lenses_of,
    start_reading,
    why_no_lens,
)
from app.page import Page, choice, zoom_buttons
from app.panels import overview
from app.panels.lens import PANELS as OWN_PANELS
from app.panels.lens import target_of
from app.panels.results import measured
from app.services import Scene, Services
from app.view_state import LENS_COLOURS, LENSES, ViewState
from workbench.lab.jobs import Job

GRID, CELL, DEPTHS, PARTS, HEADS, COSINE = OWN_PANELS
# The overview's own panel, which is drawn here too.
NORMS = next(panel for panel in overview.PANELS if panel.id == "residual")
FORM_TITLE = "Read the text at every depth"
FIELDS = ("lens", "corpus", "steps", "answer", "wrong", "target")


def structure(scene: Scene) -> Hashable:
    return "lens", scene.view.result


def controls(scene: Scene) -> Sequence[Component]:
    def listed(words: dict[str, str]) -> list[dict[str, str]]:
        return [{"value": name, "label": label} for name, label in words.items()]

    return [
        choice("lens", "Lens", listed({**LENSES, "tuned": "tuned, if read"}), scene.view.lens, 122),
        choice("lens_colour", "Colour", listed(LENS_COLOURS), scene.view.lens_colour, 190),
    ]


def layout(services: Services, scene: Scene) -> Sequence[Component]:
    found = measured(scene, KIND)
    side = [_form(services, scene), *earlier_results(services, scene, KIND, of={"run": scene.view.run})]
    stream = [frame(NORMS, scene, ""), frame(COSINE, scene, "")]
    if found is None:
        rows = [
            html.Div([frame(GRID, scene, ""), stream[0]], className="column span-7"),
            html.Div(side, className="column span-5"),
        ]
    else:
        left = [frame(PARTS, scene, ""), frame(HEADS, scene, ""), *stream]
        rows = [
            frame(
                GRID, scene, "span-12", above=[html.Div([html.Div(), zoom_buttons("Whole text")], className="map-bar")]
            ),
            html.Div(left, className="column span-7"),
            html.Div([frame(CELL, scene, ""), frame(DEPTHS, scene, ""), *side], className="column span-5"),
        ]
    return [html.Div(rows, className="grid")]


def _form(services: Services, scene: Scene) -> Component:
    found, run = measured(scene, KIND), scene.opened()
    if why := why_no_lens(run):
        return content_frame("lens-form", FORM_TITLE, why, [])
    here = says_here(run)
    targets = TARGETS_HERE if here else TARGETS
    asked = (found.manifest.get("settings") if found is not None else None) or {}
    answer, wrong = target_of(found) if found is not None else ("", "")
    stored, known = lenses_of(services, run), corpora()
    lenses = [(PLAIN, "logit lens"), *((name, f"{title} · {name.rsplit('-', 1)[-1]}") for name, title in stored),
              (TRAIN, "a tuned lens, trained first")]  # fmt: skip
    chosen = asked.get("lens", PLAIN)
    corpus = "english" if "english" in known else known[0] if known else ""
    return form_frame(
        "lens", FORM_TITLE,
        f"Logit A − logit B {'at' if here else 'after'} the pinned token (else the last) is split into who wrote it. Left empty, they are "
        "the two most likely.",
        [
            select("lens-lens", "Lens", lenses, chosen if chosen in dict(lenses) else PLAIN),
            side_by_side(
                select("lens-corpus", "Train on", [(name, name) for name in known], corpus),
                count_input("lens-steps", "Steps", 250, 1, 100_000),
            ),
            side_by_side(
                text_input("lens-answer", "Token A", answer, "most likely"), text_input("lens-wrong", "Token B", wrong, "second"),
            ),
            select("lens-target", "Target of rank and probability", [*targets.items()], asked.get("target", "next")),
        ],
        "Read",
    )  # fmt: skip


def register(app: Dash, services: Services) -> None:
    def start(view: ViewState, **values: Any) -> Job:
        return start_reading(services, services.scene(view), **values)

    register_form(app, "lens", FIELDS, start)


PAGE = Page(
    name="lens",
    title="Residual & lens",
    icon="lens",
    order=4,
    words="When the answer appears in the residual stream, layer by layer, and which parts of the model wrote it.",
    layout=layout,
    panels=OWN_PANELS,
    structure=structure,
    controls=controls,
    register=register,
    opens_kind=KIND,
)
