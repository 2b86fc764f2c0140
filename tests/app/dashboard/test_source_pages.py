"""Runs of an encoder-decoder on the pages: layers that read the source are drawn over its tokens. And what encoders would put here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from app.pages import attention as attention_page
from app.pages import overview as overview_page
from app.panels.base import NothingToShow, PicturePanel, StripPanel
from app.panels.overview import token_name
from app.panels.pairs import Pair
from app.panels.words import memory_words, pattern_words
from app.services import Scene, Services
from app.shell import inspector
from app.theme import LIGHT
from app.view_state import ViewState
from tests.app.dashboard.panel_checks import check_panel
from workbench.lab.jobs import JobQueue
from workbench.lab.runs import Run, RunStore
from workbench.lab.trace import trace_run

SOURCE, TEXT = "eine kleine Katze", "a cat"
PANELS = {panel.id: panel for panel in (*attention_page.PAGE.panels, *overview_page.PAGE.panels)}


def lively(name: str, **changes: Any) -> Any:
    model = models.build(name, **changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Services, Run, dict[int, np.ndarray]]]:
    """A run of T5, and its patterns as the model itself gives them."""
    store = RunStore(tmp_path_factory.mktemp("runs"))
    model = lively("t5").with_source(SOURCE)
    run = trace_run(model, TEXT, store)
    patterns = {layer: pattern.values[0].detach().numpy() for layer, pattern in model.patterns(TEXT).items()}
    yield Services(store, JobQueue(), None), run, patterns  # type: ignore[arg-type]


def scene_of(services: Services, run: Run, **view: Any) -> Scene:
    return services.scene(ViewState(run=run.id, **view))


@pytest.mark.parametrize("name", sorted(PANELS))
@pytest.mark.parametrize("layer", [0, 1])
def test_every_panel_draws_or_says_why_not(
    traced: tuple[Services, Run, Any], name: str, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    services, run, _ = traced
    panel, scene = PANELS[name], scene_of(services, run, layer=layer, head=1, query=2)
    if (name, layer) == ("offsets", 1):
        with pytest.raises(NothingToShow, match="tokens are not before or behind"):
            panel.values(scene)
        return
    check_panel(panel, scene, services, monkeypatch)


def test_the_map_over_the_source(traced: tuple[Services, Run, dict[int, np.ndarray]]) -> None:
    services, run, patterns = traced
    panel = PANELS["pattern"]
    assert isinstance(panel, PicturePanel)
    scene = scene_of(services, run, layer=1, head=2, query=1, key=11, columns=(2, 16))
    assert scene.view.columns == (2, 16) and scene.view.key == 11, "more columns than the text has tokens"
    assert panel.shape(scene) == (5, 17) and panel.spans(scene) == ((0, 5), (2, 16))
    assert np.allclose(panel.values(scene), patterns[1][2][:, 2:16], atol=1e-6)
    reading = panel.reading(scene, 3, 12)
    assert abs(reading.value - patterns[1][2, 3, 12]) < 1e-6
    assert reading.rows[:2] == [("reads", "3 ‘a’"), ("from", "12 ‘K’")]
    assert "token of the source" in panel.explanation(scene)
    assert attention_page.structure(scene) != attention_page.structure(scene_of(services, run, layer=0))
    meta = panel.figure(scene, LIGHT).layout.meta
    assert meta["x"] == {"role": "source", "origin": 0, "size": 17} and meta["click"] == "row"
    assert "source" in panel.figure(scene, LIGHT).layout.xaxis.title.text
    assert "12 ‘K’" in str(inspector(scene_of(services, run, layer=1, key=12)))
    own = scene_of(services, run, layer=0, key=11, columns=(2, 16))
    assert own.view.key == 4 and own.view.columns == (2, 5), "the text's own map has five"
    assert PANELS["pattern"].figure(own, LIGHT).layout.meta["click"] == "pattern"  # type: ignore[attr-defined]


def test_the_row_is_drawn_over_the_source(traced: tuple[Services, Run, dict[int, np.ndarray]]) -> None:
    services, run, patterns = traced
    panel = PANELS["query-row"]
    assert isinstance(panel, StripPanel)
    scene = scene_of(services, run, layer=3, head=0, query=2)
    assert np.allclose(panel.values(scene), patterns[3][0, 2], atol=1e-6)
    drawn = panel.colours(scene, LIGHT)
    assert drawn["tokens"] == list(SOURCE) and len(drawn["colours"]) == len(drawn["values"]) == 17
    assert next(iter(panel.table(scene)[1]))[0] == "0 ‘e’"
    assert "tokens" not in panel.colours(scene_of(services, run, layer=2, query=2), LIGHT)


def test_a_long_source_is_drawn_from_the_overview(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text and source are pooled each by its own length."""
    import app.panels.attention as panels

    monkeypatch.setattr(panels, "DRAWN_CELLS", 100)
    store = RunStore(tmp_path)
    model = lively("t5").with_source("abcdefghij" * 30)
    run = trace_run(model, "a cat sat" * 12, store)
    services = Services(store, JobQueue(), None)  # type: ignore[arg-type]
    panel = PANELS["pattern"]
    assert isinstance(panel, PicturePanel)
    scene = scene_of(services, run, layer=1)
    assert panel.extents(scene) == ((0, 108), (0, 300)) and panel.pooled(scene, 512).shape == (96, 96)
    zoomed = scene_of(services, run, layer=1, rows=(10, 31), columns=(100, 204))
    (top, bottom), (left, right) = panel.extents(zoomed)
    assert top <= 10 < 31 <= bottom and left <= 100 < 204 <= right and right - left < 112 and bottom - top < 26
    stored = run.array("overview.1")[0]
    rows = [i for i in range(96) if top <= i * 108 // 96 < bottom]
    columns = [i for i in range(96) if left <= i * 300 // 96 < right]
    assert np.array_equal(panel.pooled(zoomed, 512), stored[np.ix_(rows, columns)])
    assert "up to 4 × 4 tokens" in " ".join(panel.facts(zoomed))


def test_what_is_said_of_the_layer(traced: tuple[Services, Run, Any]) -> None:
    _, run, _ = traced
    words = pattern_words(run.layer(1))
    assert "columns are source tokens" in words and "reads in both directions" not in words
    assert "of the source's 17 tokens" in memory_words(run.layer(1))


def test_comparing_leaves_these_layers_out(traced: tuple[Services, Run, Any]) -> None:
    """Of two runs the texts are aligned, not the sources."""
    services, run, patterns = traced
    other = trace_run(lively("t5").with_source("ein Hund"), TEXT, services.store)
    pair = Pair.of(scene_of(services, run, run_b=other.id))
    assert {layer for side in (0, 1) for layer, _ in pair.heads(side)} == {0, 2}
    assert np.allclose(pair.block(0, (2, 1), (0, 5), (0, 5))[4], patterns[2][1, 4], atol=1e-6)
    alike = np.diag(pair.likeness())
    assert np.allclose(alike[:4], 1) and (alike[4:] < 0.999).all(), "the sources differ, which layer 0 has not seen yet"
    with pytest.raises(NothingToShow, match="not aligned"):
        pair.factors(1, 3)


def test_an_encoder_with_a_head_says_what_it_would_put_here(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    model = lively("bert", masked_head="gelu")
    run = trace_run(model, TEXT, store)
    services = Services(store, JobQueue(), None)  # type: ignore[arg-type]
    panel, scene = PANELS["next-tokens"], scene_of(services, run, query=2)
    best = model(TEXT).log_softmax(-1)[0, 2].topk(10)
    assert np.allclose(panel.values(scene), best.values.detach().numpy(), atol=1e-5)
    assert [row[1] for row in panel.table(scene)[1]] == [str(i) for i in best.indices.tolist()]
    assert panel.facts(scene)[0] == "at token 2 ‘c’" and "put here" in panel.heading(scene)  # type: ignore[attr-defined]
    assert "would put here" in str(inspector(scene))
    with pytest.raises(NothingToShow):
        PANELS["surprisal-text"].values(scene)
    bare = trace_run(lively("bert"), TEXT, store)
    with pytest.raises(NothingToShow, match="encoder without a head for masked tokens"):
        panel.values(scene_of(services, bare, query=2))


def test_predicted_tokens_are_named(tmp_path: Path) -> None:
    """Also those that the text does not hold, of any tokenizer."""
    store = RunStore(tmp_path)
    run = trace_run(lively("gpt2"), TEXT, store)
    record = dict(run.manifest["tokens"]) | {"tokenizer": "other", "predicted": {"7": "seven"}}
    run.manifest["tokens"] = record
    scene = Scene(ViewState(run=run.id), run, None, Services(store, JobQueue(), None)._cache, None)  # type: ignore[arg-type]
    assert token_name(scene, 7) == "seven" and token_name(scene, 8) == "#8" and token_name(scene, ord("c")) == "c"
