"""What the pages say of attention variants: names of terms and rows, units, empty rows, where the memory is."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import models
from app.commands.probe import in_options
from app.figures.overview import block_diagram
from app.panels.attention import PANELS as ATTENTION
from app.panels.base import NothingToShow
from app.panels.probe_scores import in_the_form
from app.panels.quantities import PANELS as QUANTITIES
from app.panels.quantities import quantities_of
from app.panels.scores import ScoreRow
from app.panels.state import PANELS as STATE
from app.panels.words import pattern_words
from app.services import Scene, Services
from app.theme import theme_called
from app.view_state import ViewState
from probes.statistics import attention_statistics
from workbench import HookError
from workbench.lab.jobs import JobQueue
from workbench.lab.runs import RunStore
from workbench.lab.trace import trace_run

LIGHT = theme_called("light")


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Services:
    return Services(RunStore(tmp_path_factory.mktemp("runs")), JobQueue(), None)  # type: ignore[arg-type]


def scene_of(services: Services, name: str, text: str = "watch it hatch", **view: object) -> Scene:
    run = trace_run(models.build(name), text, services.store)
    return services.scene(ViewState(run=run.id, **view))  # type: ignore[arg-type]


def test_biases_go_by_the_names_of_the_score_maps(services: Services) -> None:
    scene = scene_of(services, "transformer-xl-attention")
    found = {each.label: each.unit for each in quantities_of(scene)}
    assert found == dict.fromkeys(("Score bias: key preference", "Position bias: relative"), "added to the score, nats")


def test_rows_of_several_things_have_several_numbers(services: Services) -> None:
    scene = scene_of(services, "dual-attention")
    symbols = next(at for at, each in enumerate(quantities_of(scene)) if each.label == "Symbols chosen")
    heads, count = quantities_of(scene)[symbols].row_shape
    labels = QUANTITIES[symbols].row_labels(scene)
    assert (
        labels[0] == "0 · 0"
        and labels[count] == "1 · 0"
        and len(labels) == heads * count == QUANTITIES[symbols].shape(scene)[0]
    )
    assert QUANTITIES[symbols].place(scene, count, 2)[0] == ("symbol head × symbol", "1 · 0")
    assert labels[count] in QUANTITIES[symbols].figure(scene, LIGHT).layout.yaxis.ticktext


def test_a_signal_has_the_sentence_of_its_role(services: Services) -> None:
    (each,) = (each for each in quantities_of(scene_of(services, "diff-transformer")) if each.name.endswith("lambda"))
    assert "subtracted from the first" in each.words and each.unit == "share"


def test_a_row_that_reads_nothing_says_so(services: Services) -> None:
    row = next(panel for panel in ATTENTION if panel.id == "query-row")
    scene = scene_of(services, "ngram-heads", "abcdefgh", layer=1, head=1)  # no earlier occurrence to read
    assert any("reads nothing" in fact for fact in row.facts(scene)) and any(
        "none pinned" in fact for fact in row.facts(scene)
    )
    repeated = scene_of(services, "ngram-heads", "abcdeabcde", layer=1, head=1, query=9)
    assert any("pinned: token 9" in fact for fact in row.facts(repeated)) and not any(
        "nothing" in fact for fact in row.facts(repeated)
    )


def test_masks_are_grey_and_effective_maps_are_called_so(services: Services) -> None:
    pattern = next(panel for panel in ATTENTION if panel.id == "pattern")
    strided = scene_of(services, "sparse-transformer", "watch it hatch, watch it", layer=1)
    drawn = pattern.values(strided)
    weights = strided.factors().pattern(0)
    assert np.isnan(drawn[np.tril(weights == 0) & ~np.eye(len(weights), dtype=bool)]).any() and np.nansum(
        drawn
    ) == pytest.approx(len(drawn))
    whole, zoomed = (
        pattern.pooled(strided, 512),
        pattern.pooled(replace(strided, view=strided.view.change(rows=(4, 9))), 512),
    )
    np.testing.assert_array_equal(np.isnan(whole[4:9]), np.isnan(zoomed))
    words = " ".join(pattern_words(scene_of(services, "infini").layer or {}))
    assert "not formed by the model" in words and "no softmax" not in words


def test_where_the_memory_is(services: Services) -> None:
    state = next(panel for panel in STATE if panel.id == "state")
    for name, words in (("landmark", "keys and values"), ("recurrent-memory", "Layers that have one: 0.")):
        with pytest.raises(NothingToShow, match=words):
            state.values(scene_of(services, name, layer=1))


def test_a_term_that_only_other_layers_have(services: Services) -> None:
    """The chooser has the terms of all layers, so that a page need not be built anew for another layer."""
    pattern = next(panel for panel in ATTENTION if panel.id == "pattern")
    scene = scene_of(services, "ngram-heads", layer=0, score_map="content")
    assert scene.view.score_map == "content"
    with pytest.raises(NothingToShow, match="Layers that have: 1"):
        pattern.values(scene)
    assert np.isfinite(pattern.values(replace(scene, view=scene.view.change(layer=1)))).any()
    hybrid = scene_of(services, "qwen3-next", layer=0, score_map="bias.t5")
    assert hybrid.view.score_map == ""  # no layer of this run has it
    with pytest.raises(NothingToShow, match="Layers that have: 1"):
        ScoreRow().values(hybrid)
    assert np.isfinite(ScoreRow().values(replace(hybrid, view=hybrid.view.change(layer=1)))).any()


def test_names_of_blocks_break_at_hyphens() -> None:
    blocks = [{"kind": "infini", "label": "Infini-attention", "detail": "4 × 6", "layer": 0}]
    texts = [str(note.text) for note in block_diagram(blocks, LIGHT, panel="diagram").layout.annotations]
    assert any("Infini-<br>attention" in text for text in texts)


def test_a_refusal_names_the_tick_of_the_form() -> None:
    with pytest.raises(HookError) as refused:
        attention_statistics(models.build("diff-transformer"), "abcabc")
    assert "whole_patterns" not in in_the_form(str(refused.value)) and "in the form" in in_the_form(str(refused.value))
    assert "--whole-patterns" in in_options(str(refused.value))
