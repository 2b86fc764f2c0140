"""Every panel on every run: its numbers, its picture, its Python."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from app.figures.common import number
from app.page import Page
from app.pages import find_pages
from app.panels.base import READABLE_ERRORS, NothingToShow, Panel, PicturePanel, StripPanel, TooLarge
from app.panels.results import OfResult
from app.panels.words import pattern_words
from app.render import share_of_row, to_levels
from app.services import Scene, Services
from app.theme import DARK, LIGHT, colour_table
from app.view_state import POOLINGS, SCALES, SORTS, ViewState
from tests.app.dashboard.conftest import TOKENS, RunIds
from workbench.lab.factors import LayerFactors
from workbench.lab.pooling import pool
from workbench.lab.runs import RunStore

PANELS = {panel.id: panel for page in find_pages() for panel in page.panels}
SHOWN = {
    "softmax": {"diagram", "surprisal-text", "surprisal", "next-tokens", "residual", "heads", "pattern", "query-row", "received",
                "row-profile", "offsets", "score-row", "cache-keys", "cache-values"},
    "gated": {"diagram", "surprisal-text", "surprisal", "next-tokens", "residual", "heads", "pattern", "query-row", "received",
              "row-profile", "offsets", "state", "spectrum", "state-norms", "tracked", "decay", "retention"},
    "bdh": {"diagram", "surprisal-text", "surprisal", "next-tokens", "residual", "heads", "pattern", "query-row", "received",
            "row-profile", "offsets", "state", "spectrum", "state-norms", "tracked", "retention", "neurons-x", "neurons-y", "top-neurons"},
}  # fmt: skip


def scene_of(services: Services, run: str, **view: object) -> Scene:
    return services.scene(ViewState(run=run, **{"head": 1, "query": 30, "tracked": ((1, 2), (3, 4)), **view}))  # type: ignore[arg-type]


def run_called(run_ids: RunIds, name: str) -> str:
    return getattr(run_ids, name)


@pytest.fixture
def runs_root(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_RUNS", str(services.store.root))


def decode(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def expected_pixels(levels: np.ndarray, table: str) -> np.ndarray:
    colours = np.vstack([colour_table(table), [[0, 0, 0]]])
    pixels = np.concatenate([colours[levels], np.where(levels == 255, 0, 255)[..., None]], axis=-1)
    return pixels.astype(np.uint8)


@pytest.mark.parametrize("kind", SHOWN)
@pytest.mark.parametrize("name", PANELS)
def test_a_panel_draws_or_says_why_not(services: Services, run_ids: RunIds, kind: str, name: str) -> None:
    panel, scene = PANELS[name], scene_of(services, run_called(run_ids, kind))
    if name not in SHOWN[kind]:
        with pytest.raises(NothingToShow) as why:
            panel.values(scene)
        assert len(why.value.title) > 5 and str(why.value).endswith(".")
        return
    if isinstance(panel, StripPanel):
        data = panel.colours(scene, LIGHT)
        assert len(data["colours"]) == len(data["values"]) == TOKENS
    else:
        for theme in (LIGHT, DARK):
            assert len(panel.figure(scene, theme).to_json()) < 100_000
    assert panel.facts(scene) is not None and len(panel.summary(scene)) > 10
    headers, rows = panel.table(scene)
    lines = list(rows)
    assert lines and all(len(line) == len(headers) for line in lines)


@pytest.mark.parametrize("kind,name", [(kind, name) for kind, shown in SHOWN.items() for name in sorted(shown)])
def test_the_python_of_a_panel_makes_its_array(
    services: Services, run_ids: RunIds, runs_root: None, kind: str, name: str
) -> None:
    views = [
        {},
        {
            "layer": 1,
            "head": 0,
            "rows": (10, 31),
            "columns": (4, 40),
            "position": 20,
            "compare": 7,
            "state_rows": (1, 9),
        },
    ]
    views += [{"sort": sort} for sort in SORTS] if name.startswith("neurons") else []
    for view in views:
        scene, panel = scene_of(services, run_called(run_ids, kind), **view), PANELS[name]
        names: dict[str, object] = {}
        code = panel.snippet(scene)
        exec(code, names)
        values = np.asarray(names["values"])
        np.testing.assert_array_equal(values, panel.values(scene), err_msg=code)
        assert max(map(len, code.splitlines())) <= 110


@pytest.mark.parametrize("kind", SHOWN)
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("scale", SCALES)
def test_the_picture_of_a_pattern_is_the_pooled_pattern(
    services: Services, run_ids: RunIds, kind: str, pooling: str, scale: str
) -> None:
    run_id = run_called(run_ids, kind)
    rows, columns, size = (7, 58), (0, 49), 16
    scene = scene_of(services, run_id, layer=1, rows=rows, columns=columns, pooling=pooling, scale=scale)
    panel = PANELS["pattern"]
    assert isinstance(panel, PicturePanel)
    colours = panel.colours(scene, LIGHT)

    # The oracle: the whole exact pattern, masked cells as zeros in a bin that has others, pooled by numpy.
    factors = LayerFactors.from_run(services.store.open(run_id), 1)
    exact = factors.pattern(1)[slice(*rows), slice(*columns)]
    seen = factors.visible()[slice(*rows), slice(*columns)]
    pooled = np.where(
        np.isfinite(pool(np.where(seen, 1.0, np.nan), size, size)), pool(exact, size, size, pooling), np.nan
    )
    limit, bent = (1.0, "linear") if scale == "row" else (colours.limit, scale)
    levels = to_levels(share_of_row(pooled) if scale == "row" else pooled, limit, bent, colours.signed).astype(int)
    found = decode(panel.picture(scene, LIGHT, size))
    # Summing in another order may move a value across the border of two levels, never further.
    near = [
        expected_pixels(np.where(levels == 255, 255, np.clip(levels + by, 0, 254)), colours.table) for by in (-1, 0, 1)
    ]
    if pooling == "max":
        np.testing.assert_array_equal(found, near[1])
    else:
        assert np.any([(found == each).all(axis=-1) for each in near], axis=0).all()


def test_the_picture_of_a_whole_long_map_keeps_a_one_cell_diagonal(services: Services, run_ids: RunIds) -> None:
    panel = PANELS["pattern"]
    assert isinstance(panel, PicturePanel)
    scene = scene_of(services, run_ids.long, head=0)
    pooled = panel.pooled(scene, 512)
    assert pooled.shape == (512, 512)
    assert np.nanmin(np.diagonal(pooled)[1:]) > 0.9  # the planted previous-token head; a mean would show 1/8 of it
    assert len(panel.picture(scene, LIGHT, 512)) < 100_000


def test_a_part_too_large_to_draw_comes_from_the_stored_overview(
    services: Services, run_ids: RunIds, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.panels.attention.DRAWN_CELLS", 1000)
    panel = PANELS["pattern"]
    assert isinstance(panel, PicturePanel)
    stored = services.store.open(run_ids.long).array("overview.0")[0]
    edges = np.arange(97) * 4096 // 96
    scene = scene_of(services, run_ids.long, head=0, rows=(100, 700), columns=(43, 301))
    (top, bottom), (left, right) = panel.extents(scene)
    assert (top, bottom, left, right) == (edges[2], edges[17], edges[1], edges[8])  # edges 85, 725, 42, 341
    pooled = panel.pooled(scene, 512)
    expected = stored[2:17, 1:8]
    assert pooled.shape == expected.shape
    assert (
        ((pooled == expected) | (np.isnan(pooled) & (expected == 0))).all()
        and np.isnan(pooled[0, -1])
        and np.isfinite(pooled[-1, 0])
    )
    image = panel.figure(scene, LIGHT).layout.images[0]
    assert (image.x, image.y, image.sizex, image.sizey) == (left, top, right - left, bottom - top)
    assert any("coarse" in fact and "43 × 43" in fact for fact in panel.facts(scene))
    with pytest.raises(TooLarge, match="zoom in"):
        panel.figure(scene_of(services, run_ids.long, pooling="mean"), LIGHT)


@pytest.mark.parametrize("kind", SHOWN)
def test_a_reading_is_the_exact_value(services: Services, run_ids: RunIds, kind: str) -> None:
    scene = scene_of(services, run_called(run_ids, kind), layer=1, rows=(20, 40))
    panel = PANELS["pattern"]
    assert isinstance(panel, PicturePanel)
    factors = LayerFactors.from_run(scene.opened(), 1)
    for row, column in ((30, 12), (59, 58), (3, 1)):
        reading = panel.reading(scene, row, column)
        assert np.float32(reading.value) == np.float32(factors.value(1, row, column)) == factors.pattern(1)[row, column]
    hidden = panel.reading(scene, 3, 9)
    assert np.isnan(hidden.value) and any("cannot see" in words for _, words in hidden.rows)
    for outside in ((-1, 0), (0, TOKENS), (TOKENS, 0)):
        with pytest.raises(IndexError):
            panel.reading(scene, *outside)


def pictures(services: Services, run_ids: RunIds) -> Iterator[tuple[PicturePanel, Scene]]:
    for kind, shown in SHOWN.items():
        for name in sorted(shown):
            panel = PANELS[name]
            if isinstance(panel, PicturePanel):
                yield panel, scene_of(services, run_called(run_ids, kind))


def test_every_picture_is_its_block_pooled_and_every_reading_its_block(services: Services, run_ids: RunIds) -> None:
    seen = 0
    for panel, scene in pictures(services, run_ids):
        rows, columns = panel.spans(scene)
        block = panel.block(scene, rows, columns)
        whole = panel.pooled(scene, 4096)
        np.testing.assert_array_equal(np.asarray(whole, np.float32), np.asarray(block, np.float32), err_msg=panel.id)
        row, column = rows[0] + len(block) // 2, columns[0] + block.shape[1] // 3
        value = panel.reading(scene, row, column).value
        np.testing.assert_equal(np.float32(value), np.float32(block[row - rows[0], column - columns[0]]))
        assert np.nanmax(np.abs(block)) <= panel.colours(scene, LIGHT).limit * (1 + 1e-6), panel.id
        seen += 1
    assert seen >= 12


def test_one_reset_is_not_lost_when_the_decay_picture_is_pooled(services: Services, run_ids: RunIds) -> None:
    panel, scene = PANELS["decay"], scene_of(services, run_ids.gated, layer=1)
    assert isinstance(panel, PicturePanel)
    kept = panel.block(scene, *panel.spans(scene))
    assert panel.pooled(scene, 5).min() == pytest.approx(kept.min(), abs=1e-6)


def test_a_state_difference_is_the_difference_of_two_states(services: Services, run_ids: RunIds) -> None:
    scene = scene_of(services, run_ids.gated, position=40, compare=11)
    factors = LayerFactors.from_run(scene.opened(), 0)
    expected = factors.state(1, 40).astype(np.float64) - factors.state(1, 11)
    np.testing.assert_allclose(PANELS["state"].values(scene), expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert any("minus" in fact for fact in PANELS["state"].facts(scene))


def test_colours_of_the_state_hold_still_while_time_plays(services: Services, run_ids: RunIds) -> None:
    panel = PANELS["state"]
    assert isinstance(panel, PicturePanel)
    limits = {panel.colours(scene_of(services, run_ids.bdh, position=t), LIGHT).limit for t in (0, 4, 19, TOKENS - 1)}
    assert len(limits) == 1


def test_patterns_say_what_they_are(services: Services, run_ids: RunIds) -> None:
    def words(run: str, layer: int = 0) -> str:
        return "; ".join(pattern_words(services.store.open(run).layer(layer)))

    softmax, gated, bdh = (words(run) for run in run_ids.each())
    assert "no negative weights" in softmax and "rows sum to 1" in softmax and "effective" not in softmax
    assert "signed" in gated and "rows do not sum to 1" in gated and "exact" in gated
    assert "never reads itself" in bdh
    assert "window" in words(run_ids.softmax, 1) and "ALiBi" in words(run_ids.softmax, 1)


def test_a_signed_row_is_summed_and_a_probability_row_has_an_entropy(services: Services, run_ids: RunIds) -> None:
    factors = LayerFactors.from_run(services.store.open(run_ids.gated), 0)
    sums = PANELS["row-profile"].values(scene_of(services, run_ids.gated))
    np.testing.assert_allclose(sums[0], factors.pattern(1).sum(1, dtype=np.float64), rtol=1e-5, atol=1e-5)
    entropy = PANELS["row-profile"].values(scene_of(services, run_ids.softmax))
    weights = LayerFactors.from_run(services.store.open(run_ids.softmax), 0).pattern(1).astype(np.float64)
    by_hand = -(weights * np.log(np.where(weights > 0, weights, 1))).sum(1)
    np.testing.assert_allclose(entropy[1], by_hand, rtol=1e-4, atol=1e-5)


def test_nothing_to_show_without_a_run(services: Services, tmp_path: os.PathLike) -> None:
    empty = Services(RunStore(tmp_path), services.jobs, services.models)
    for view, title in ((ViewState(), "No run yet"), (ViewState(run="20200101-gone-123456"), "This run is not here")):
        scene = empty.scene(view)
        assert scene.run is None and scene.tokens == [] and scene.layers == []
        for panel in PANELS.values():
            with pytest.raises(NothingToShow) as why:
                panel.check(scene)
            assert why.value.title == ("Nothing measured yet" if isinstance(panel, OfResult) else title)


def test_too_many_numbers_for_one_file_are_refused_in_words(services: Services, run_ids: RunIds) -> None:
    scene = scene_of(services, run_ids.long)
    with pytest.raises(TooLarge, match="zoom in"):
        PANELS["pattern"].values(scene)
    assert PANELS["pattern"].values(scene_of(services, run_ids.long, rows=(0, 30), columns=(0, 20))).shape == (30, 20)


def test_answers_stay_small_for_a_long_text(services: Services, run_ids: RunIds) -> None:
    scene = scene_of(services, run_ids.long)
    for name in sorted(SHOWN["softmax"]):
        panel = PANELS[name]
        if isinstance(panel, StripPanel):
            assert len(str(panel.colours(scene, LIGHT))) < 500_000
        else:
            assert len(panel.figure(scene, LIGHT).to_json()) < 500_000, name


def test_every_panel_belongs_to_one_page_and_depends_on_real_fields() -> None:
    pages: list[Page] = find_pages()
    names = [panel.id for page in pages for panel in page.panels]
    assert len(names) == len(set(names)) >= 22
    view = ViewState().as_dict()
    for panel in PANELS.values():
        assert "run" in panel.depends and set(panel.depends) <= set(view), panel.id
        assert panel.title and panel.words.endswith("."), panel.id


class Recorder(dict):
    """A view as a dict that remembers which of its fields were read."""


@pytest.mark.parametrize("kind", SHOWN)
def test_a_panel_depends_on_no_more_than_it_says(services: Services, run_ids: RunIds, kind: str) -> None:
    """Changing a field that a panel does not name must not change what it draws; otherwise it would be stale on the page."""
    base = scene_of(services, run_called(run_ids, kind))
    other = scene_of(
        services, run_called(run_ids, kind), layer=1, head=0, query=12, key=3, rows=(3, 20), columns=(2, 30), position=9, compare=4,
        tracked=((5, 6),), pooling="mean", scale="linear", sort="index", state_rows=(0, 4), state_columns=(0, 4),
    )  # fmt: skip
    for name in sorted(SHOWN[kind]):
        panel: Panel = PANELS[name]
        kept = {field: getattr(base.view, field) for field in panel.depends}
        mixed = services.scene(other.view.change(**kept))
        try:
            drawn = [
                (panel.colours(s, LIGHT), panel.facts(s)) if isinstance(panel, StripPanel)
                else (panel.figure(s, LIGHT).to_json(), panel.facts(s))
                for s in (base, mixed)
            ]  # fmt: skip
        except READABLE_ERRORS as error:  # pragma: no cover
            pytest.fail(f"{name}: {error}")
        assert drawn[0] == drawn[1], name


def test_numbers_are_written_for_people() -> None:
    assert [number(v) for v in (0, -0.5, 1234.5678, 1e-9, float("nan"), 0.0312)] == [
        "0",
        "−0.5",
        "1235",
        "1.00e-09",
        "–",
        "0.0312",
    ]
