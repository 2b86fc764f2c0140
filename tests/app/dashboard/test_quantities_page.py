"""The Quantities page on models with special parts: every panel draws, and its Python makes its array. No page knows an architecture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import models
from app.pages import quantities as page
from app.panels.base import NothingToShow
from app.panels.quantities import PANELS, quantities_of
from app.services import Services
from app.theme import DARK, LIGHT
from app.view_state import ViewState
from tests.app.dashboard.test_pages import text_of
from workbench.instrument.hook_points import HookPoint
from workbench.lab.jobs import JobQueue
from workbench.lab.runs import RunStore
from workbench.lab.trace import trace_run

TEXT = "watch it hatch"
TITLES = {
    "diff-transformer": ["Map before reweighting (map 0)", "Map before reweighting (map 1)", "λ: share of the second map"],
    "denseformer": ["Depth weights (DWA): after layer 0", "Depth weights (DWA): after layer 1", "Depth weights (DWA): after layer 2"],
    "universal-transformer": ["Halting", "Weight of every step (ponder map)"],
    "routing-transformer": ["Clusters of queries", "Clusters of keys"],
    "nats": ["Token types"],
    "landmark": ["Weight of every block"],
    "qwen3-next": ["Experts chosen"],
    "cope": ["Contextual positions", "What heads count"],
    "hrm": ["Fast state", "Slow state"],
    "infini": ["What the memory gives", "Share of the memory"],
    "loglinear-mamba2": ["Weight of every level"],
    "titans-mac": ["Attention beside the memory"],
}


@pytest.mark.parametrize("name", TITLES)
def test_every_special_quantity_is_a_named_panel(name: str, tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    run = trace_run(models.build(name), TEXT, store)
    services = Services(store, JobQueue(), None)  # type: ignore[arg-type]
    layer = max(int(record["layer"] or 0) for record in run.manifest["quantities"] if record["layer"] != 2)
    view = ViewState(page="quantities", run=run.id, layer=layer, head=1)
    scene = services.scene(view)
    words = text_of(page.PAGE.build(services, scene))
    assert all(title in words for title in TITLES[name]), words
    for place, quantity in enumerate(quantities_of(scene)):
        panel = PANELS[place]
        assert panel.heading(scene) == quantity.label and panel.explanation(scene).endswith(".")
        for theme in (LIGHT, DARK):
            assert panel.figure(scene, theme).data and panel.picture(scene, theme, 64)[:4] == b"\x89PNG"
        names: dict[str, object] = {}
        exec(panel.snippet_body(scene), {"run": run}, names)
        np.testing.assert_array_equal(names["values"], panel.values(scene))
        rows, columns = panel.shape(scene)
        assert panel.reading(scene, rows - 1, columns // 2).rows and panel.facts(scene) and len(panel.summary(scene)) > 10
        assert panel.values(scene).shape == (rows, columns) and panel.pixels_high(scene) > 100


def test_the_drawn_map_is_the_chosen_heads(tmp_path: Path) -> None:
    """Of four heads in two groups, heads 2 and 3 read the second group's types."""
    store = RunStore(tmp_path)
    run = trace_run(models.build("nats"), TEXT, store)
    services = Services(store, JobQueue(), None)  # type: ignore[arg-type]
    array = run.array("quantity.blocks.0.attn.normalise.hook_type")
    for head, group in enumerate((0, 0, 1, 1)):
        scene = services.scene(ViewState(run=run.id, head=head))
        np.testing.assert_array_equal(PANELS[0].values(scene), array[group])


def test_a_layer_without_any_says_so_and_where_there_are_some(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    run = trace_run(models.build("routing-transformer"), TEXT, store)
    services = Services(store, JobQueue(), None)  # type: ignore[arg-type]
    scene = services.scene(ViewState(run=run.id, layer=0))
    words = text_of(page.PAGE.build(services, scene))
    assert "Nothing special in this layer" in words and "Layers that have special quantities: 1." in words
    with pytest.raises(NothingToShow, match="no more than"):
        PANELS[0].values(scene)


def test_a_part_that_nobody_has_heard_of_appears_by_its_role(tmp_path: Path) -> None:
    """A new hook point is drawn under its role, without an entry anywhere."""
    model = models.build("gpt")
    block = model.blocks[1]
    block.hook_wobble = HookPoint("wobble_of_tokens", "batch pos wobble")
    inner = block.mlp.forward
    block.mlp.forward = lambda x: inner(x) + 0 * block.hook_wobble(x[..., :3]).sum()
    model.name_hook_points()
    store = RunStore(tmp_path)
    run = trace_run(model, TEXT, store)
    services = Services(store, JobQueue(), None)  # type: ignore[arg-type]
    scene = services.scene(ViewState(run=run.id, layer=1))
    assert "Wobble of tokens" in text_of(page.PAGE.build(services, scene)) and PANELS[0].shape(scene) == (3, len(TEXT))
