from __future__ import annotations

import random

import pytest

from app.view_state import HEAD_SCORES, LENS_COLOURS, LENSES, MATCHES, MAX_TRACKED, POOLINGS, SCALES, SORTS, ViewState


def some_view(draw: random.Random) -> ViewState:
    def maybe(value: object) -> object:
        return value if draw.random() < 0.6 else None

    def span() -> tuple[int, int]:
        start = draw.randrange(50)
        return start, start + draw.randrange(1, 50)

    return ViewState(
        page=draw.choice(["overview", "attention", "state", "runs"]), run=draw.choice(["", "20260101-abc-1f2e3d"]),
        part=draw.choice(["", "encoder"]), layer=draw.randrange(5), slot=draw.choice(["", "c", "momentum"]), head=draw.randrange(5),
        score_map=draw.choice(["", "scores~1", "bias.t5"]), query=maybe(draw.randrange(99)),
        key=maybe(draw.randrange(99)), depth=maybe(draw.randrange(20)), lens=draw.choice(list(LENSES)),
        lens_colour=draw.choice(list(LENS_COLOURS)), run_b=draw.choice(["", "20260102-abc-1f2e3d"]),
        head_b=draw.choice([*MATCHES, "3.11"]), head_score=draw.choice([*HEAD_SCORES, "induction.induction"]),
        shared_rows=maybe(span()), shared_columns=maybe(span()),
        rows=maybe(span()), columns=maybe(span()), state_rows=maybe(span()), state_columns=maybe(span()),
        pooling=draw.choice(list(POOLINGS)), scale=draw.choice(list(SCALES)), position=maybe(draw.randrange(99)),
        compare=maybe(draw.randrange(99)), sort=draw.choice(list(SORTS)),
        tracked=tuple((draw.randrange(9), index) for index in range(draw.randrange(MAX_TRACKED + 1))),
        synapses=tuple((draw.randrange(2), 0, index, 2, draw.randrange(4), draw.randrange(9)) for index in range(draw.randrange(7))),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(40))
def test_a_view_survives_the_address_and_json(seed: int) -> None:
    view = some_view(random.Random(seed))
    path, _, query = view.to_url().partition("?")
    assert ViewState.from_url(path, query) == view
    assert ViewState.from_url(path, f"?{query}") == view
    assert ViewState.from_dict(view.as_dict()) == view


def test_the_query_string_is_canonical() -> None:
    view = ViewState.from_url("/attention", "head=2&q=5&track=3.4,7.1&layer=0&v=1&cols=3-9&nonsense=1&pool=max")
    assert view.to_query() == "v=1&cols=3-9&head=2&q=5&track=3.4,7.1"
    assert view.to_url() == "/attention?v=1&cols=3-9&head=2&q=5&track=3.4,7.1"
    assert ViewState().to_url() == "/?v=1"


@pytest.mark.parametrize(
    "query",
    [
        "layer=-1", "layer=1e9", "layer=99999999999", "q=٣٤", "q=1.5", "rows=9-3", "rows=5-5", "rows=1-2-3", "rows=-4",
        "pool=../../etc", "scale=<script>", "sort=rm", "track=a.b", "track=", "track=1.2.3", "run=../../etc/passwd",
        "run=A_B", "run=" + "a" * 65, "t=", "q=%00", "syn=1.2.3", "syn=2.0.1-2.0.1", "syn=1.0.x-2.0.1",
        "syn=0.0.1-1.0.2-2.0.3", "layer=None", "q=0x10", "lens=none", "lc=../x", "b=A", "hb=1", "hb=1.2.3", "hs=<b>", "urows=9-3",
        "part=decoder", "slot=<b>", "slot=a.b", "slot=" + "a" * 33,
        "map=<b>", "map=../x", "map=" + "a" * 65,
    ],
)  # fmt: skip
def test_a_bad_value_falls_back_to_its_default(query: str) -> None:
    assert ViewState.from_url("/", query) == ViewState()


def test_a_bad_page_is_the_overview() -> None:
    for path in ("/../x", "/A", "/" + "a" * 40, None, "", "/a/b"):
        assert ViewState.from_url(path, "").page == "overview"


def test_another_version_is_not_misread() -> None:
    assert ViewState.from_url("/attention", "v=2&layer=3") == ViewState(page="attention")


def test_tracked_entries_are_unique_and_few() -> None:
    many = ",".join(f"{n}.1" for n in range(30))
    assert ViewState.from_url("/", "track=1.2,1.2,3.4&v=1").tracked == ((1, 2), (3, 4))
    assert len(ViewState.from_url("/", f"track={many}").tracked) == MAX_TRACKED


def test_clamping_fits_a_view_to_a_shorter_run() -> None:
    view = ViewState(layer=9, head=9, query=500, key=3, rows=(40, 900), columns=(300, 400), position=70, compare=2)
    fitted = view.clamped(60, [4, 2])
    assert (fitted.layer, fitted.head, fitted.query, fitted.key) == (1, 1, 59, 3)
    assert (fitted.rows, fitted.columns, fitted.position, fitted.compare) == ((40, 60), None, 59, 2)
    assert view.clamped(60, []).layer == 0


def test_a_state_that_the_layer_does_not_carry_falls_back_to_its_first() -> None:
    slots = [["h", "c"], ["state"], []]
    assert [ViewState(layer=layer, slot="c").clamped(9, [1, 1, 1], slots).slot for layer in range(3)] == ["c", "", ""]
    assert ViewState(slot="h").clamped(9, [1], slots).slot == ""  # one view has one address
    assert ViewState(slot="c").to_query() == "v=1&slot=c"


def test_a_span_that_is_everything_is_no_span() -> None:
    assert ViewState(rows=(0, 60)).clamped(60, [1]).rows is None


def test_the_state_follows_the_pinned_token_until_a_time_is_chosen() -> None:
    assert ViewState().state_position(10) == 9
    assert ViewState(query=4).state_position(10) == 4
    assert ViewState(query=4, position=7).state_position(10) == 7
    assert ViewState(query=4, position=7).query_position(10) == 4
