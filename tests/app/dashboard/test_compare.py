"""The Compare page: aligned patterns against matrices multiplied out, matches, scores, predictions; panels; mistakes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

import models
from app.measure.common import FormError
from app.measure.compare import divergences, start_comparing
from app.pages import find_pages
from app.pages.compare import alignment_strip
from app.panels.base import NothingToShow, TooLarge
from app.panels.compare import stacked, summed
from app.panels.pairs import Pair
from app.services import LeastRecentlyUsed, Services
from app.theme import LIGHT
from app.view_state import HEAD_SCORES, ViewState
from probes.battery import run_probes, store_probes
from probes.lenses import logit_lens
from tests.app.dashboard.bdh_runs import finished, real_services
from tests.app.dashboard.conftest import RunIds
from tests.app.dashboard.panel_checks import PANELS, check_panels
from tests.app.dashboard.test_pages import text_of
from workbench.lab.alignment import TokenText, align
from workbench.lab.factors import LayerFactors
from workbench.lab.layer_arrays import add_layer_arrays
from workbench.lab.runs import Run, RunStore

PAGE = next(page for page in find_pages() if page.name == "compare")
MAPS = ["compare-a", "compare-b", "compare-difference"]
FROM_RUNS = [*MAPS, "compare-heads", "compare-alike", "compare-surprisal", "compare-next"]
MEASURED = ["compare-kl", "compare-lens"]
SHORT, LONG = "the cat sat on the mat.", "the dog sat on the mat. the dog sat."


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Services, dict[str, str]]]:
    """Traces of softmax, retention and BDH models, of a random one, and of another text."""
    torch.set_num_threads(1)
    services, _ = real_services(tmp_path_factory.mktemp("compare"))
    made = {}
    for name in ("gpt-english", "retnet-english", "bdh-english", "lstm-random"):
        made[name] = finished(services, services.models.start_trace(name, SHORT, {}))
    services.models.warm_up()  # so that random models are in the catalogue
    made["long"] = finished(services, services.models.start_trace("gpt-english", LONG, {}))
    yield services, made
    services.jobs.shutdown(timeout=60)


def view_of(made: dict[str, str], first: str, second: str, **more: object) -> ViewState:
    return ViewState(page="compare", run=made[first], run_b=made[second], **more)  # type: ignore[arg-type]


# ---- alignment of patterns, on runs made by hand ---------------------------------------------------------------------


def written(store: RunStore, pieces: Sequence[str], patterns: np.ndarray, tokenizer: str) -> Run:
    """A run whose only layer holds these patterns [head, query, key]."""
    record = {
        "layer": 0, "kind": "by hand", "form": "dense", "n_heads": len(patterns), "n_key_heads": len(patterns), "state": None,
        "n_value_heads": len(patterns), "scale": None, "strict": False, "alibi_slopes": None, "window": None, "signals": [],
        "pattern": {"columns": "tokens", "signed": True, "rows_sum_to": None, "exact": True, "effective": True, "causal": True},
    }  # fmt: skip
    ids = list(range(len(pieces)))
    with store.create(
        "by-hand", "by hand", model={"name": "by hand", "provenance": "random"}, text="".join(pieces)
    ) as run:
        add_layer_arrays(run, record, {"pattern": patterns.astype(np.float32)}, None, len(pieces))
        run.add_array("loss", np.arange(len(pieces), dtype=np.float32) + 0.5, axes=("pos",), unit="nats")
        run.set(tokens={"ids": ids, "strings": list(pieces), "tokenizer": tokenizer}, layers=[record])
    return store.open(run.id)


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """ "a bc def gh" in two tokenizations; only B ends with "!"."""
    store, draw = RunStore(tmp_path_factory.mktemp("by-hand")), np.random.default_rng(0)
    first = written(store, ["a", " ", "b", "c", " def", " gh"], np.tril(draw.standard_normal((2, 6, 6))), "one")
    second = written(store, ["a ", "bc", " d", "ef", " g", "h", "!"], np.tril(draw.standard_normal((2, 7, 7))), "other")
    return Pair(
        (first, second), align(TokenText.of(first.manifest), TokenText.of(second.manifest)), LeastRecentlyUsed(32)
    )


GROUPS = ([[0, 1], [2, 3], [4], [5], []], [[0], [1], [2, 3], [4, 5], [6]])


@pytest.mark.parametrize("side,head,shares", list(itertools.product((0, 1), (0, 1), (False, True))))
def test_sources_are_added_and_readers_averaged(by_hand: Pair, side: int, head: int, shares: bool) -> None:
    """Against membership matrices: (mean over readers) · α · (sum over sources)."""
    assert [list(range(*part)) for part in by_hand.alignment.tokens(side).tolist()] == GROUPS[side]
    weights = by_hand.runs[side].array("layer.0.pattern")[head].astype(np.float64)
    if shares:
        weights = np.abs(weights) / np.abs(weights).sum(axis=1, keepdims=True)
    member = np.array([[float(token in group) for token in range(len(weights))] for group in GROUPS[side]])
    expected = (member / np.maximum(member.sum(axis=1, keepdims=True), 1)) @ weights @ member.T
    seen = member @ np.tril(np.ones_like(weights)) @ member.T > 0
    found = by_hand.block(side, (0, head), (0, 5), (0, 5), shares)
    np.testing.assert_allclose(found, np.where(seen, expected, np.nan), atol=1e-6)
    np.testing.assert_allclose(by_hand.block(side, (0, head), (1, 4), (0, 3), shares), found[1:4, 0:3], atol=1e-12)
    if shares:
        np.testing.assert_allclose(np.nansum(found, axis=1)[[0, 1, 2, 3]], 1, atol=1e-6)  # a row keeps its sum


def test_parts_on_the_page(by_hand: Pair) -> None:
    assert (
        by_hand.labels() == ["a ", "bc", " def", " gh", "!"] and by_hand.texts(0)[4] == "" and by_hand.part_of(3) == 1
    )
    assert by_hand.axis_tokens() == [0, 2, 4, 5, -6]
    sums = summed(by_hand.runs[0].array("loss"), by_hand.alignment.tokens(0))
    np.testing.assert_allclose(sums, [0.5 + 1.5, 2.5 + 3.5, 4.5, 5.5, np.nan])
    np.testing.assert_array_equal(stacked([np.arange(3), np.arange(2)]), [[0, 1, 2], [0, 1, np.nan]])


def test_likeness_is_the_cosine_over_shared_parts(by_hand: Pair) -> None:
    sides = []
    for side in (0, 1):
        blocks = [np.nan_to_num(by_hand.block(side, (0, head), (0, 4), (0, 4))) for head in (0, 1)]
        sides.append([block / np.abs(block).sum(axis=1, keepdims=True) for block in blocks])
    expected = [[(a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()) for b in sides[1]] for a in sides[0]]
    np.testing.assert_allclose(by_hand.likeness(), expected, atol=1e-6)
    for head in (0, 1):
        assert by_hand.matched((0, head), "pattern") == (0, int(np.argmax(expected[head])))
    assert by_hand.matched((0, 1), "0.0") == (0, 0) and by_hand.matched((0, 1), "index") == (0, 1)
    with pytest.raises(NothingToShow, match=r"head 0.7 is not there"):
        by_hand.matched((0, 0), "0.7")


def test_a_copied_head_is_found_wherever_it_lies(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Planted truth: the heads of B are those of A in another order, scaled, which changes nothing."""
    store, draw = RunStore(tmp_path_factory.mktemp("planted")), np.random.default_rng(3)
    patterns, order = np.tril(draw.standard_normal((5, 12, 12))), [3, 0, 4, 2, 1]
    pieces = [f"w{i} " for i in range(12)]
    runs = written(store, pieces, patterns, "same"), written(store, pieces, 7 * patterns[order], "same")
    pair = Pair(runs, align(*(TokenText.of(run.manifest) for run in runs)), LeastRecentlyUsed(32))
    assert pair.alignment.identical and pair.axis_tokens() is None
    assert [order[pair.matched((0, head), "pattern")[1]] for head in range(5)] == list(range(5))


# ---- real models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first,second,how", [
    ("gpt-english", "retnet-english", "index"), ("bdh-english", "gpt-english", "pattern"), ("gpt-english", "long", "1.2"),
])  # fmt: skip
def test_panels_of_two_runs(
    stage: tuple[Services, dict[str, str]], monkeypatch: pytest.MonkeyPatch, first: str, second: str, how: str
) -> None:
    services, made = stage
    view = view_of(made, first, second, head_b=how, layer=1, head=1, query=2)
    check_panels(services, view, MAPS if second == "long" else FROM_RUNS, monkeypatch)
    check_panels(
        services, view.change(shared_rows=(3, 14), shared_columns=(0, 9), scale="linear"), MAPS[1:], monkeypatch
    )
    scene = services.scene(view)
    assert "How the texts align" in text_of(PAGE.build(services, scene)) and "align-part" in str(alignment_strip(scene))


def test_equal_texts_are_compared_token_by_token(stage: tuple[Services, dict[str, str]]) -> None:
    services, made = stage
    scene = services.scene(view_of(made, "gpt-english", "retnet-english", layer=2, head=0))
    factors = [LayerFactors.from_run(services.open_run(made[name]), 2) for name in ("gpt-english", "retnet-english")]
    whole = [each.pattern(0) for each in factors]
    seen = factors[0].visible()
    for name, expected in zip(MAPS[:2], whole, strict=True):
        np.testing.assert_array_equal(PANELS[name].values(scene), np.where(seen, expected, np.nan))
    shares = [np.abs(each) / np.abs(each).sum(axis=1, keepdims=True, dtype=np.float64) for each in whole]
    np.testing.assert_allclose(
        PANELS["compare-difference"].values(scene), np.where(seen, shares[1] - shares[0], np.nan), atol=1e-6
    )
    losses = [services.open_run(made[name]).array("loss") for name in ("gpt-english", "retnet-english")]
    np.testing.assert_allclose(PANELS["compare-surprisal"].values(scene), losses)


def test_a_changed_word_is_left_out_and_said(stage: tuple[Services, dict[str, str]]) -> None:
    services, made = stage
    scene = services.scene(view_of(made, "gpt-english", "long", query=5))  # "a" of "cat"
    pair = Pair.of(scene)
    assert "without a counterpart: 3 of 23 tokens of A, 16 of 36 of B" in pair.alignment.in_words()
    difference = PANELS["compare-difference"].values(scene)
    aligned = pair.alignment.aligned
    assert np.isnan(difference[~aligned]).all() and np.isnan(difference[:, ~aligned]).all()
    assert np.isfinite(difference[np.ix_(aligned, aligned)]).any()
    with pytest.raises(NothingToShow, match="Pin another"):
        PANELS["compare-next"].values(scene)
    place = PANELS["compare-b"].place(scene, 5, 0)  # type: ignore[attr-defined]
    assert place[0] == ("reads", "‘a’ is not in B")
    assert PANELS["compare-a"].figure(scene, LIGHT).layout.meta["x"]["tokens"][7] == -9


@pytest.mark.parametrize("score", HEAD_SCORES)
def test_scores_from_the_patterns(stage: tuple[Services, dict[str, str]], score: str) -> None:
    services, made = stage
    scene = services.scene(view_of(made, "gpt-english", "bdh-english", head_score=score))
    found = PANELS["compare-heads"].values(scene)
    assert found.shape == (16, 2) and np.isfinite(found).all()
    for side, name in enumerate(("gpt-english", "bdh-english")):
        factors = LayerFactors.from_run(services.open_run(made[name]), 1)
        weights = np.abs(factors.pattern(2)).astype(np.float64)
        rows = np.flatnonzero(weights.sum(axis=1) > 0)
        rows = rows[rows > 0]
        share = weights[rows] / weights[rows].sum(axis=1, keepdims=True)
        expected = {
            "distance": (share * np.abs(rows[:, None] - np.arange(len(weights)))).sum(axis=1),
            "entropy": np.array([-(row[row > 0] * np.log(row[row > 0])).sum() for row in share]),
            "first": share[:, 0], "previous": share[np.arange(len(rows)), rows - 1], "itself": share[np.arange(len(rows)), rows],
        }[score]  # fmt: skip
        assert found[4 + 2, side] == pytest.approx(expected.mean(), rel=1e-5)


def test_stored_scores_take_their_place(
    stage: tuple[Services, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    services, made = stage
    view = view_of(made, "gpt-english", "retnet-english", head_score="induction.induction")
    with pytest.raises(NothingToShow, match="Probes page"):
        PANELS["compare-heads"].values(services.scene(view))
    tables = []
    for name in ("gpt-english", "retnet-english"):
        model = models.load(name)
        found = run_probes(model, ["induction"], length=40, sequences=4)
        stored = store_probes(services.store, model, found)
        tables.append(stored.array("induction.induction"))
    values = PANELS["compare-heads"].values(services.scene(view))
    np.testing.assert_allclose(values, np.stack([table.ravel() for table in tables], axis=1))
    check_panels(services, view, ["compare-heads"], monkeypatch)
    assert "induction.induction, measured" in str(PAGE.build(services, services.scene(view)))


def test_a_layer_without_a_map_says_so(stage: tuple[Services, dict[str, str]]) -> None:
    services, made = stage
    for first, second in (("gpt-english", "lstm-random"), ("lstm-random", "gpt-english")):
        scene = services.scene(view_of(made, first, second))
        for name in (*MAPS, "compare-heads", "compare-alike"):
            try:
                assert np.isfinite(PANELS[name].values(scene)).any()
            except NothingToShow as why:
                assert str(why).endswith(".")
        assert np.isfinite(PANELS["compare-surprisal"].values(scene)).any()


def test_a_large_map_asks_to_zoom(services: Services, run_ids: RunIds) -> None:
    scene = services.scene(ViewState(run=run_ids.long, run_b=run_ids.softmax))
    with pytest.raises(TooLarge, match="zoom in"):
        PANELS["compare-a"].pooled(scene, 256)  # type: ignore[attr-defined]
    near = services.scene(
        ViewState(run=run_ids.long, run_b=run_ids.softmax, shared_rows=(0, 50), shared_columns=(0, 50))
    )
    assert PANELS["compare-a"].pooled(near, 256).shape == (50, 50)  # type: ignore[attr-defined]


# ---- the measured comparison -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(stage: tuple[Services, dict[str, str]]) -> str:
    services, made = stage
    return finished(services, start_comparing(services, services.scene(view_of(made, "gpt-english", "long"))))


def test_predictions_and_lenses(
    stage: tuple[Services, dict[str, str]], compared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    services, made = stage
    view = view_of(made, "gpt-english", "long", result=compared)
    check_panels(services, view, MEASURED, monkeypatch)
    scene, model = services.scene(view), models.load("gpt-english")
    chances = [model(text)[0].detach().double().softmax(-1) for text in (SHORT, LONG)]
    parts, found = Pair.of(scene).alignment, PANELS["compare-kl"].values(scene)
    for number, (a, _, b, _) in enumerate(parts.parts.tolist()):
        if not parts.aligned[number]:
            assert np.isnan(found[:, number]).all()
            continue
        p, q = chances[0][a].numpy(), chances[1][b].numpy()
        m = (p + q) / 2
        expected = [
            (p * np.log(p / q)).sum(),
            (q * np.log(q / p)).sum(),
            0.5 * (p * np.log(p / m) + q * np.log(q / m)).sum(),
        ]
        np.testing.assert_allclose(found[:, number], expected, atol=1e-5)
    assert found[0, 0] < 1e-9 < found[0, -20]  # the beginnings are the same text
    lens = [logit_lens(model, text).mean("agreement").numpy() for text in (SHORT, LONG)]
    np.testing.assert_allclose(PANELS["compare-lens"].values(scene), np.stack(lens), atol=1e-6)
    with pytest.raises(NothingToShow, match="Press Measure"):
        PANELS["compare-kl"].values(services.scene(view.change(run_b=made["bdh-english"])))


def test_a_closed_divergence() -> None:
    """The same prediction, then 9 : 1 against 1 : 9, by hand."""
    text = TokenText("ab", [1, 2], ["a", "b"], "t")
    first = torch.tensor([[0.5, 0.5], [0.9, 0.1]], dtype=torch.float64).log()
    second = torch.tensor([[0.5, 0.5], [0.1, 0.9]], dtype=torch.float64).log()
    found = divergences(align(text, text), first, second)
    gap = 0.8 * np.log(9)
    middle = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
    np.testing.assert_allclose(found, [[0, gap], [0, gap], [0, middle]], atol=1e-12)


def test_mistakes_are_named(stage: tuple[Services, dict[str, str]], services: Services, run_ids: RunIds) -> None:
    real, made = stage
    with pytest.raises(FormError, match="second run"):
        start_comparing(real, real.scene(ViewState(run=made["long"])))
    with pytest.raises(FormError, match="no run '20200101-gone-123456'"):
        start_comparing(real, real.scene(ViewState(run=made["long"], run_b="20200101-gone-123456")))
    with pytest.raises(FormError, match="not in the catalogue"):
        start_comparing(services, services.scene(ViewState(run=run_ids.gated, run_b=run_ids.softmax)))
    for view, words in (
        (ViewState(run=made["long"]), "Choose a second run"),
        (ViewState(run=made["long"], run_b="20200101-gone-123456"), "no run"),
    ):
        scene = real.scene(view)
        for name in FROM_RUNS:
            with pytest.raises(NothingToShow, match=words):
                PANELS[name].check(scene)
        assert "Two runs" in text_of(PAGE.build(real, scene))


def test_different_vocabularies_have_no_divergence(stage: tuple[Services, dict[str, str]], compared: str) -> None:
    services, made = stage
    found = services.open_run(compared)
    with services.store.create("comparison", "refused", model=found.model, text=SHORT) as copy:
        for name in ("lens.a.agreement", "lens.b.agreement", "lens.a.divergence", "lens.b.divergence"):
            copy.add_array(name, found.array(name), axes=("depth",))
        copy.set(
            settings=found.manifest["settings"],
            results={**found.manifest["results"], "refused": "A predicts 256 tokens, B 30522."},
        )
    scene = services.scene(view_of(made, "gpt-english", "long", result=copy.id))
    with pytest.raises(NothingToShow, match="30522"):
        PANELS["compare-kl"].values(scene)
    assert np.isfinite(PANELS["compare-lens"].values(scene)).all()
