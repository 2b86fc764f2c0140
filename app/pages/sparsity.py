"""Sparsity: how few neurons of a BDH are active, where and when, and whether surprise wakes more of them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from dash import Dash, html
from dash.development.base_component import Component

from app.forms import earlier_results, form_frame, model_select, register_form, text_area
from app.frames import frame
from app.measure.sparsity import KIND, start_sparsity
from app.page import Page, scale_choice
from app.panels.results import measured
from app.panels.sparsity import PANELS
from app.services import Scene, Services

TOKENS, LAYERS, SURPRISE, OCTILES, TRAINING, RASTER = PANELS
EXAMPLE = (
    "The old lighthouse keeper climbed the stairs. At the top of the stairs the old lighthouse keeper lit the lamp, "
    "and the lamp threw its light over the water."
)


def structure(scene: Scene) -> Hashable:
    return "sparsity", scene.view.result


def layout(services: Services, scene: Scene) -> Sequence[Component]:
    found = measured(scene, KIND)
    narrow = [_form(services, scene), *earlier_results(services, scene, KIND)]
    wide = [frame(TOKENS, scene, "")]
    if found is not None:
        wide += [frame(RASTER, scene, ""), frame(SURPRISE, scene, ""), frame(OCTILES, scene, "")]
        narrow = [frame(LAYERS, scene, ""), frame(TRAINING, scene, ""), *narrow]
    columns = html.Div(wide, className="column span-7"), html.Div(narrow, className="column span-5")
    return [html.Div(list(columns), className="grid")]


def _form(services: Services, scene: Scene) -> Component:
    found = measured(scene, KIND)
    asked = (found.manifest.get("settings") if found is not None else None) or {}
    run_text = (scene.run.manifest.get("text") or "") if scene.run is not None else ""
    text = (found.manifest.get("text") if found is not None else None) or run_text or EXAMPLE
    return form_frame(
        "sparsity", "A text", "Every neuron of every layer is counted at every token. A longer text gives narrower chance bars.",
        [model_select(services, scene, "sparsity-name", value=asked.get("model")), text_area("sparsity-text", "Text", text[:4000], 4)],
    )  # fmt: skip


def register(app: Dash, services: Services) -> None:
    register_form(app, "sparsity", ("name", "text"), lambda view, **values: start_sparsity(services, **values))


PAGE = Page(
    name="sparsity",
    title="Sparsity",
    icon="sparsity",
    order=3,
    group="BDH",
    words="How few neurons of a BDH are active: by layer, head, token and time scale, and whether surprise wakes more of them.",
    layout=layout,
    panels=PANELS,
    structure=structure,
    controls=lambda scene: [scale_choice(scene)],
    register=register,
    needs_run=False,
    opens_kind=KIND,
)
