"""Merge lab: two BDH models side by side in one, without training."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from dash import Dash, html
from dash.development.base_component import Component

from app.figures.common import number
from app.forms import earlier_results, form_frame, register_form, select, text_area
from app.frames import content_frame, frame
from app.measure.merging import KIND, parents, start_merging
from app.page import Page
from app.panels.merging import IDENTITY, PANELS
from app.panels.results import measured
from app.services import Scene, Services
from workbench.lab.runs import Run

LOSSES, HERITAGE = PANELS
EXAMPLE = (
    "The old lighthouse keeper climbed the stairs. At the top of the stairs the old lighthouse keeper lit the lamp."
)


def structure(scene: Scene) -> Hashable:
    return "merge", scene.view.result


def layout(services: Services, scene: Scene) -> Sequence[Component]:
    found = measured(scene, KIND)
    left = [frame(LOSSES, scene, ""), frame(HERITAGE, scene, "")]
    right = [
        _form(services, found),
        *([badge(found)] if found is not None else []),
        *earlier_results(services, scene, KIND),
    ]
    return [
        html.Div(
            [html.Div(left, className="column span-7"), html.Div(right, className="column span-5")], className="grid"
        )
    ]


def _form(services: Services, found: Run | None) -> Component:
    asked = (found.manifest.get("settings") if found is not None else None) or {}
    known = parents(services)
    if not known:
        return content_frame(
            "merge-form",
            "Two models",
            "",
            html.P("No BDH is installed that could be merged.", className="form-hint"),
            "",
        )
    values = [value for value, _ in known]
    first, second = (asked.get(which) if asked.get(which) in values else values[0] for which in ("first", "second"))
    text = (found.manifest.get("text") if found is not None else None) or EXAMPLE
    return form_frame(
        "merge", "Two models", "They must agree in depth, width, heads and norms; neurons may differ in number.",
        [select("merge-first", "First parent", known, str(first)), select("merge-second", "Second parent", known, str(second)),
         text_area("merge-text", "Text", text, 3)], "Merge",
    )  # fmt: skip


def badge(found: Run) -> Component:
    """How exact a merge of the first parent with itself is: the measured errors, and whether that is an identity."""
    plain, exact = found.manifest["results"]["self_merge"]
    holds = exact < IDENTITY
    chip = html.Span("identity" if holds else "no identity", className=f"chip {'chip-good' if holds else 'chip-bad'}")
    words = html.P([chip, f" Merged with itself, the first parent's logits change by {number(exact)} of their size with ε → 0 in float64, "
                    f"and by {number(plain)} as it is: ε of its norms sees sums twice as large."], className="panel-words")  # fmt: skip
    return content_frame("merge-badge", "Self-merge", "A right merge of a model with itself is the model.", words, "")


def register(app: Dash, services: Services) -> None:
    register_form(app, "merge", ("first", "second", "text"), lambda view, **values: start_merging(services, **values))


PAGE = Page(
    name="merge",
    title="Merge lab",
    icon="merge",
    order=5,
    group="BDH",
    words="Two BDH models joined neuron by neuron, without training: what the merge still knows, and whose neurons do the work.",
    layout=layout,
    panels=PANELS,
    structure=structure,
    register=register,
    needs_run=False,
    opens_kind=KIND,
)
