"""Figures are pure: arrays in, figure out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from app.figures.attention import attention_map, head_mosaic, head_profiles, offset_profile
from app.figures.common import Axis, Colours, colour_bar, extremes, plain_label, ticks, token_lines, visible_text
from app.figures.neurons import neuron_order
from app.figures.overview import MOST_COLUMNS, block_diagram, column_count, loss_strip, next_tokens
from app.figures.state import effective_rank, singular_values, state_picture, tracked_entries
from app.render import colour_fraction
from app.theme import DARK, LIGHT, colour_scale

ROOT = Path(__file__).resolve().parents[3]
HOSTILE = ["<b>bold</b>", '<a href="https://example.org">x</a>', "&lt;", "a", "a", "\n", " ", "\x00", "", "<", "é", "語"]
COLOURS = Colours("diverging-light", 2.0, "sqrt", True, "weight")


def strings_of(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for each in value.values() for text in strings_of(each)]
    if isinstance(value, (list, tuple)):
        return [text for each in value for text in strings_of(each)]
    return []


def test_tokens_cannot_write_markup_into_a_label() -> None:
    figures = [
        attention_map("/img/pattern?v=1", HOSTILE, (0, 12), (0, 12), COLOURS, LIGHT, panel="pattern"),
        token_lines([("<i>head</i>", np.arange(12.0))], HOSTILE, LIGHT, y_title="x", panel="p"),
        next_tokens(HOSTILE, np.log(np.full(12, 1 / 12)), LIGHT, panel="p", actual=1),
        loss_strip(np.arange(12.0), HOSTILE, LIGHT, panel="p"),
        block_diagram([{"kind": "x", "label": "<b>", "detail": "<a href='y'>", "layer": 0}], LIGHT, panel="p"),
        tracked_entries(["[1, 2]"], np.zeros((1, 12)), HOSTILE, LIGHT, panel="p"),
    ]
    for figure in figures:
        texts = strings_of({"data": [t.to_plotly_json() for t in figure.data], "layout": figure.layout.to_plotly_json()})
        for text in texts:
            own = ("<br>", "<extra>", "</extra>", "<b>&lt;b&gt;</b>", "<span style='font-size:10px'>", "</span>")
            for markup in own:
                text = text.replace(markup, "")
            assert "<" not in text, text


def test_equal_tokens_stay_apart_on_an_axis() -> None:
    made = ticks(Axis("token", 6, "key", ["a", "a", "b", "a", "b", "b"]), 0, 6)
    assert made["ticktext"] == ["a", "a", "b", "a", "b", "b"]
    assert made["tickvals"] == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5]


@pytest.mark.parametrize("start,stop", [(0, 100), (0, 1000), (0, 32768), (700, 800), (31000, 32768), (0, 49), (5, 6)])
def test_positions_are_labelled_sparsely_and_truly(start: int, stop: int) -> None:
    made = ticks(Axis("token", stop, "key", None), start, stop)
    assert 1 <= len(made["tickvals"]) <= 10
    assert [float(text) + 0.5 for text in made["ticktext"]] == made["tickvals"]
    assert all(start <= value < stop for value in made["tickvals"])


def test_what_cannot_be_seen_gets_a_sign() -> None:
    assert [visible_text(token) for token in (" ", "\n", "\t", "", "a b", "\x00", "x\ny", "\xa0")] == [
        "·", "↵", "⇥", "∅", "a b", "\\x00", "x↵y", "\\xa0",
    ]  # fmt: skip
    assert plain_label("<b>&") == "&lt;b&gt;&amp;"


@pytest.mark.parametrize("scale", ["linear", "sqrt", "log"])
@pytest.mark.parametrize("signed", [True, False])
def test_the_colour_bar_tells_the_truth(scale: str, signed: bool) -> None:
    colours = Colours("diverging-dark" if signed else "sequential-light", 0.8, scale, signed, "weight")
    bar = colour_bar(colours).marker
    assert [tuple(pair) for pair in bar.colorscale] == colour_scale(colours.table)
    assert bar.cmin == (-1 if signed else 0) and bar.cmax == 1
    for place, text in zip(bar.colorbar.tickvals, bar.colorbar.ticktext, strict=True):
        if text != "≈0":
            value = float(text.replace("−", "-"))
            assert colour_fraction(np.array([value]), 0.8, scale)[0] == pytest.approx(place, abs=0.02)


def test_a_map_says_what_its_axes_stand_for() -> None:
    figure = attention_map("/img/pattern?v=1", ["a"] * 50, (10, 20), (0, 50), COLOURS, DARK, panel="pattern")
    meta, image = figure.layout.meta, figure.layout.images[0]
    assert meta["x"] == {"role": "key", "origin": 0, "size": 50} and meta["y"]["role"] == "query"
    assert meta["click"] == "pattern" and meta["zoom"] == {"x": "cols", "y": "rows"} and meta["value"] is True
    assert (image.x, image.y, image.sizex, image.sizey) == (0, 10, 50, 10)
    assert list(figure.layout.xaxis.range) == [0, 50] and list(figure.layout.yaxis.range) == [20, 10]
    assert figure.layout.hoveranywhere and figure.layout.clickanywhere
    assert "query" in figure.layout.yaxis.title.text and "key" in figure.layout.xaxis.title.text


@pytest.mark.parametrize("heads", [[4, 4], [12] * 12, [1], [2, 8, 1], [64] * 3, [2] * 48])
def test_a_mosaic_of_any_shape(heads: list[int]) -> None:
    figure = head_mosaic("/img/heads?v=1", heads, LIGHT, panel="heads")
    assert list(figure.layout.xaxis.range) == [0, max(heads)] and list(figure.layout.yaxis.range) == [len(heads), 0]
    assert 1 <= len(figure.layout.xaxis.tickvals) <= 12 and 1 <= len(figure.layout.yaxis.tickvals) <= 12
    assert figure.layout.meta["click"] == "tile"


def test_lines_keep_exact_values_and_gaps() -> None:
    values = np.array([0.1, np.nan, 1 / 3], dtype=np.float32)
    figure = token_lines([("one", values)], ["a", "b", "c"], LIGHT, y_title="x", panel="p", selected=0)
    np.testing.assert_array_equal(np.asarray(figure.data[0].y, np.float32), values)
    assert figure.layout.meta["x"]["origin"] == -0.5


def test_a_long_line_is_thinned_to_its_extremes() -> None:
    values = np.zeros(40_000, dtype=np.float32)
    values[[77, 30_001]] = 5, -5
    figure = token_lines([("one", values)], ["a"] * len(values), LIGHT, y_title="x", panel="p")
    kept = np.asarray(figure.data[0].x)
    assert len(kept) <= 4096 and {77, 30_001} <= set(kept.tolist()) and (np.diff(kept) > 0).all()
    np.testing.assert_array_equal(np.asarray(figure.data[0].y), values[kept])
    assert "every 20" in figure.layout.xaxis.title.text


def test_extremes_by_hand() -> None:
    values = np.array([3.0, 1, 2, np.nan, np.nan, np.nan, 5, np.nan, 4])
    assert extremes(values, 3).tolist() == [0, 1, 3, 6, 8]
    assert extremes(values, 1).tolist() == list(range(9))


def test_the_chosen_head_is_drawn_on_top() -> None:
    figure = head_profiles(np.arange(12.0).reshape(4, 3), ["a", "b", "c"], 1, LIGHT, y_title="x", panel="p", role="key")
    assert [trace.name for trace in figure.data] == ["head 0", "head 2", "head 3", "head 1"]
    assert figure.data[-1].line.color == LIGHT.accent and figure.data[-1].opacity == 1


def test_bars_of_an_offset_profile() -> None:
    figure = offset_profile(np.array([np.nan, 0.5, 0.25]), LIGHT, panel="p")
    assert list(figure.data[0].x) == [0, 1, 2] and figure.data[0].y[1] == 0.5


def test_next_tokens_mark_what_came() -> None:
    figure = next_tokens(["a", "b"], np.log([0.75, 0.25]), LIGHT, panel="p", actual=1)
    assert list(figure.data[0].x) == pytest.approx([0.75, 0.25])
    assert figure.data[0].marker.color == (LIGHT.accent, LIGHT.good)
    assert figure.data[0].text == ("75.0%", "25.0% ✓")


def test_neuron_orders_by_hand() -> None:
    activity = np.array([[0, 0, 2, 0], [1, 0, 2, 0], [1, 0, 0, 5.0]])  # pos, neuron
    assert neuron_order(activity, "index").tolist() == [0, 1, 2, 3]
    assert neuron_order(activity, "total").tolist() == [3, 2, 0, 1]
    assert neuron_order(activity, "peak").tolist() == [3, 2, 0, 1]
    assert neuron_order(activity, "first").tolist() == [2, 0, 3, 1]
    with pytest.raises(ValueError, match="size"):
        neuron_order(activity, "size")


def test_effective_rank() -> None:
    assert effective_rank(np.ones(5)) == pytest.approx(5)
    assert effective_rank(np.array([3.0, 0, 0])) == pytest.approx(1)
    assert np.isnan(effective_rank(np.zeros(3)))
    # shares 3/4 and 1/4: exp of their entropy
    assert effective_rank(np.array([3.0, 1])) == pytest.approx(np.exp(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25))))


def test_followed_entries_wear_their_colours() -> None:
    entries = [(1, 2), (3, 4)]
    picture = state_picture("/img/state?v=1", (8, 8), ("k", "v"), (0, 8), (0, 8), COLOURS, LIGHT, panel="s", tracked=entries)
    lines = tracked_entries(["[1, 2]", "[3, 4]"], np.zeros((2, 3)), ["a", "b", "c"], LIGHT, panel="t")
    assert [shape.line.color for shape in picture.layout.shapes] == [trace.line.color for trace in lines.data]
    assert (picture.layout.shapes[0].x0, picture.layout.shapes[0].y0) == (2, 1)  # column first, row second


def test_a_comparison_draws_both_spectra() -> None:
    figure = singular_values(np.array([2.0, 1]), np.array([1.0, 0.5]), LIGHT, panel="p", names=("after 5", "after 2"))
    assert [trace.name for trace in figure.data] == ["after 2", "after 5"]


def block(layer: int | None, kind: str = "attention") -> dict[str, object]:
    return {"kind": kind, "label": kind, "detail": "4 heads", "layer": layer}


def test_a_deep_model_is_drawn_in_groups_and_a_shallow_one_in_full() -> None:
    shallow = [block(None, "embed"), *[part for at in range(6) for part in (block(at), block(at, "mlp"))], block(None, "head")]
    assert column_count(shallow) == 8
    layers = [block(at, "attention" if at < 40 else "mamba2") for at in range(60)]
    deep = [block(None, "embed"), *layers, block(None, "head")]
    assert column_count(deep) == 4 <= MOST_COLUMNS
    figure = block_diagram(deep, LIGHT, panel="p", layer=45)
    names = [annotation.text for annotation in figure.layout.annotations]
    assert "layers 0–39" in names and "layers 40–59" in names
    assert figure.layout.meta["layers"] == [None, 0, 40, None]


def test_figures_know_no_dash_and_no_torch() -> None:
    code = (
        "import sys, pkgutil, importlib, app.figures\n"
        "for m in pkgutil.iter_modules(app.figures.__path__): importlib.import_module('app.figures.' + m.name)\n"
        "print([name for name in ('dash', 'torch', 'flask') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"
