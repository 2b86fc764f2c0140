"""Every architecture, none with code of its own: Attention draws its patterns, Overview its blocks, Quantities what is special.

Models that carry a state have the State page besides: `test_recurrent_pages`, which holds their Attention pages too.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import models
from app.figures.common import number
from app.pages import attention as attention_page
from app.pages import overview as overview_page
from app.pages import quantities as quantities_page
from app.panels.base import NothingToShow, PicturePanel, StripPanel
from app.panels.overview import Diagram
from app.panels.quantities import PANELS as QUANTITIES
from app.panels.quantities import quantities_of
from app.panels.scores import labels_of
from app.panels.words import pattern_words
from app.services import Scene, Services
from app.theme import theme_called
from app.view_state import ViewState
from models.architecture_record import ARCHITECTURES
from tests.app.dashboard.test_pages import text_of
from workbench.lab.jobs import JobQueue
from workbench.lab.runs import RunStore
from workbench.lab.score_maps import terms_of
from workbench.lab.trace import trace_run

TEXT = "watch it hatch"
LIGHT = theme_called("light")
models.list_models()  # registers all
QUICK = ("attention", "depth", "memory")  # the Attention pages of the others are drawn in every run of the tests, in `test_recurrent_pages`
NAMES = [
    name if record.family in QUICK else pytest.param(name, marks=pytest.mark.slow) for name, record in ARCHITECTURES.items()
]


@pytest.fixture(scope="module", params=NAMES)
def scene(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scene:
    store = RunStore(tmp_path_factory.mktemp("runs"))
    run = trace_run(models.build(request.param), TEXT, store)
    services = Services(store, JobQueue(), None)  # type: ignore[arg-type]
    return services.scene(ViewState(run=run.id, layer=len(run.layers) - 1, head=min(1, run.layers[-1]["n_heads"] - 1)))


def test_the_attention_page_draws_it(scene: Scene) -> None:
    for panel in attention_page.PAGE.panels:
        try:
            if isinstance(panel, StripPanel):
                assert len(panel.colours(scene, LIGHT)["values"]) == len(TEXT)
                continue
            assert panel.figure(scene, LIGHT).data, panel.id  # type: ignore[attr-defined]
            if isinstance(panel, PicturePanel):
                assert panel.picture(scene, LIGHT, 64)[:4] == b"\x89PNG"
            names: dict[str, object] = {"run": scene.opened(), "np": np, "factors": scene.factors()}
            exec(panel.snippet_body(scene), names)
            np.testing.assert_array_equal(names["values"], panel.values(scene))
        except NothingToShow as reason:  # a cell that is not linear in its values has no map of weights
            assert str(reason).endswith("."), panel.id
            assert (scene.layer or {})["form"] is None or (panel.id == "score-row" and not labels_of(scene)), (panel.id, reason)
    assert pattern_words(scene.layer or {})


def test_the_attention_page_draws_every_map_of_its_scores(scene: Scene) -> None:
    (pattern,) = (panel for panel in attention_page.PAGE.panels if panel.id == "pattern")
    labels = labels_of(scene)
    assert ("scores" in {name.partition("~")[0] for name in labels}) == bool(labels)
    drawn = {}
    for name, label in labels.items():
        other = replace(scene, view=scene.view.change(score_map=name))
        assert label in str(pattern.figure(other, LIGHT).data) and pattern.picture(other, LIGHT, 64)[:4] == b"\x89PNG"
        names: dict[str, object] = {"run": scene.opened(), "np": np, "factors": scene.factors()}
        exec(pattern.snippet_body(other), names)
        drawn[name] = pattern.values(other)
        np.testing.assert_array_equal(names["values"], drawn[name])
        said = dict(pattern.reading(other, 5, 3).rows)
        assert said.get(label, number(float(drawn[name][5, 3]))) == number(float(drawn[name][5, 3]))
    if terms_of(labels) and ((scene.layer or {}).get("scores") or {}).get("difference", 0.0) < 1e-5:
        np.testing.assert_allclose(sum(drawn[name] for name in terms_of(labels)), drawn["scores"], atol=1e-5)


def test_the_overview_draws_its_blocks(scene: Scene) -> None:
    (diagram,) = (panel for panel in overview_page.PAGE.panels if isinstance(panel, Diagram))
    figure, blocks = diagram.figure(scene, LIGHT), diagram.blocks(scene)
    drawn = " ".join(str(note.text).replace("<br>", " ") for note in figure.layout.annotations)
    assert all(str(block["label"]) in drawn for block in blocks if len(str(block["label"])) < 12)
    assert {block["layer"] for block in blocks} == {None, *range(len(scene.layers))}
    assert diagram.pixels_high(scene) >= diagram.height


def test_the_quantities_page_draws_what_is_special(scene: Scene) -> None:
    words = text_of(list(quantities_page.layout(None, scene)))  # type: ignore[arg-type]
    found = quantities_of(scene)
    assert len(found) <= len(QUANTITIES) and all(quantity.label in words for quantity in found)
    assert found or "Nothing special in this layer" in words
    for place in range(len(found)):
        assert QUANTITIES[place].figure(scene, LIGHT).data and QUANTITIES[place].picture(scene, LIGHT, 64)[:4] == b"\x89PNG"
