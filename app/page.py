"""What a page is, and the controls that all pages use.

A page is one module in `app/pages` with a constant `PAGE`. Nothing else has to be edited: navigation, address, panels and
exports follow from it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import dash_mantine_components as dmc
from dash import Dash, html
from dash.development.base_component import Component

from app.panels.base import Panel
from app.panels.words import kind_words, slot_words
from app.services import Scene, Services
from app.view_state import POOLINGS, SCALES, SORTS, ViewState
from workbench.lab.runs import RunError
from workbench.lab.score_maps import run_score_labels

KEY_OF = {each.name: each.metadata["key"] for each in fields(ViewState) if each.metadata["key"]}
GROUPS = ("Look", "BDH", "Measure", "Change", "Results")  # headings of the navigation, in order
DEFAULT_OF = {each.name: str(each.default) for each in fields(ViewState)}


@dataclass(frozen=True)
class Page:
    """One page. `layout` builds it for a scene; it is built anew only when `structure` changes, panels redraw by themselves.

    `structure` is whatever decides which panels and controls there are, beside the run; `register` adds callbacks of its
    own; `group` is the heading of the navigation that it stands under; a page that `needs_run` says in words when there is none, instead of
    being laid out. A page with `parts` shows the part of a run that the address names, such as its encoder; others show the run's own
    text. A page that `opens_kind` of run shows the run that the address names as `result`; a job that made one leads there.
    """

    name: str
    title: str
    icon: str
    order: int
    words: str
    layout: Callable[[Services, Scene], Sequence[Component]]
    panels: Sequence[Panel] = ()
    structure: Callable[[Scene], Hashable] = lambda scene: None
    controls: Callable[[Scene], Sequence[Component]] = lambda scene: ()
    register: Callable[[Dash, Services], None] | None = None
    group: str = GROUPS[0]
    needs_run: bool = True
    parts: bool = False
    opens_kind: str = ""

    def __post_init__(self) -> None:
        if self.group not in GROUPS:
            raise ValueError(f"page {self.name!r} stands under {self.group!r}; expected one of {', '.join(GROUPS)}")

    @property
    def path(self) -> str:
        return "/" if self.name == "overview" else f"/{self.name}"

    def build(self, services: Services, scene: Scene) -> Component:
        """The page for a scene."""
        controls = html.Div(list(self.controls(scene)) if scene.run is not None else [], className="controls")
        head = html.Div([html.Div([html.H1(self.title), html.P(self.words)], className="page-words"), controls], className="page-head")
        banner = [] if not scene.problem else [html.Div(
            [html.Strong("This run is not here"), html.Span(f"{scene.problem[:1].upper()}{scene.problem[1:]}")],
            className="banner", role="alert",
        )]  # fmt: skip
        body = self.layout(services, scene) if scene.run is not None or not self.needs_run else [_no_run(scene)]
        return html.Div([head, *banner, *body], className="page")


def where_to(services: Services, pages: Sequence[Page], run_id: str) -> dict[str, Any]:
    """Where a run is looked at, for the store `go`: the page that opens runs of its kind, else the overview, which also
    says what is wrong with a run that cannot be read."""
    try:
        kind = services.open_run(run_id).kind
    except RunError:
        kind = ""
    for page in pages:
        if kind and page.opens_kind == kind:
            return {"change": {"result": run_id, "study": None}, "page": page.path}
    return {"run": run_id, "page": "/"}


def _no_run(scene: Scene) -> Component:
    title, words = ("No run is open", "Choose another run in the bar above, or ") if scene.problem else ("No run yet", "To have one, ")
    return html.Div([
        html.Strong(title), html.Span([words, html.A("start one on the Overview page", href="/", className="in-app"), "."]),
    ], className="panel-message", role="status")  # fmt: skip


# ---- controls --------------------------------------------------------------------------------------------------------


def control_values(view: ViewState, n_tokens: int) -> dict[str, str | int]:
    """What each control shows for a view, by URL key."""
    values: dict[str, str | int] = {
        KEY_OF[name]: str(getattr(view, name))
        for name in ("run", "layer", "slot", "head", "score_map", "pooling", "scale", "sort", "lens", "lens_colour", "run_b", "head_b",
                     "head_score")
    }  # fmt: skip
    if n_tokens:
        values[KEY_OF["position"]] = view.state_position(n_tokens)
    return values


def control_id(name: str) -> dict[str, str]:
    """The id of the control that sets a view field; moving it changes the address and nothing else."""
    return {"type": "control", "key": KEY_OF[name], "default": DEFAULT_OF[name]}


def choice(name: str, label: str, data: Sequence[Mapping[str, str]], value: str, width: int) -> Component:
    """A drop-down list for a view field."""
    return dmc.Select(id=control_id(name), label=label, data=list(data), value=value, allowDeselect=False, size="xs", w=width,
                      comboboxProps={"position": "bottom-end", "width": "max-content"})  # fmt: skip


def layer_choice(scene: Scene) -> Component:
    """Choose the layer."""
    data = [{"value": str(layer["layer"]), "label": f"{layer['layer']} · {kind_words(layer['kind'])}"} for layer in scene.layers]
    return choice("layer", "Layer", data, str(scene.view.layer), 172)


def head_choice(scene: Scene) -> Component:
    """Choose the head."""
    count = scene.heads_per_layer[scene.view.layer] if scene.heads_per_layer else 1
    return choice("head", "Head", [{"value": str(h), "label": str(h)} for h in range(count)], str(scene.view.head), 70)


def slot_choice(scene: Scene) -> list[Component]:
    """Choose which of the things that a layer carries is shown; nothing where there is one."""
    names = [slot["name"] for slot in scene.slots]
    if len(names) < 2:
        return []
    data = [{"value": "" if number == 0 else name, "label": slot_words(name)} for number, name in enumerate(names)]
    return [choice("slot", "State", data, scene.view.slot, 130)]


def score_map_choice(scene: Scene) -> list[Component]:
    """Choose between weights and the scores behind them, as a whole and by term; nothing for a run without scores."""
    labels = run_score_labels(scene.layers)
    if not labels:
        return []
    data = [{"value": "", "label": "weights"}, *({"value": name, "label": label} for name, label in labels.items())]
    return [choice("score_map", "Map", data, scene.view.score_map, 150)]


def zoom_buttons(whole: str, action: str = "whole-map", near: bool = True) -> Component:
    """Buttons that zoom a map: to the pinned token, and out to the `whole`; `action` is what the page does for it (assets/wb-4-keys.js)."""

    def button(words: str, does: str) -> html.Button:
        return html.Button(words, className="tool-button is-framed", type="button", **{"data-action": does})

    return html.Div([*([button("Zoom to the pinned token", "near")] if near else []), button(whole, action)], className="zoom-row")


def scale_choice(scene: Scene, *, rows: bool = True) -> Component:
    """Choose how values become colours."""
    names = {"linear": "linear", "sqrt": "square root", "log": "logarithmic", "row": "share of row"}
    data = [{"value": name, "label": names[name]} for name in SCALES if rows or name != "row"]
    return choice("scale", "Colour scale", data, scene.view.scale, 136)


def pooling_choice(scene: Scene) -> Component:
    """Choose what a picture cell shows when it stands for several values."""
    names = {"max": "largest magnitude", "mean": "mean", "sum": "sum"}
    return choice("pooling", "Pooling", [{"value": name, "label": names[name]} for name in POOLINGS], scene.view.pooling, 152)


def sort_choice(scene: Scene) -> Component:
    """Choose the order of neurons."""
    return choice("sort", "Neurons by", [{"value": k, "label": words} for k, words in SORTS.items()], scene.view.sort, 150)
