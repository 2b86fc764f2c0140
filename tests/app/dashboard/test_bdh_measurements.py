"""What the BDH pages measure, beside the probes; their panels' Python; mistakes in their forms."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import models
from app.measure.common import FormError
from app.measure.concepts import sentences_of, start_finding
from app.measure.graph import start_graph
from app.measure.interventions import start_intervening
from app.measure.merging import parents, start_merging
from app.measure.sparsity import start_sparsity
from app.measure.synapses import start_search
from app.pages import find_pages
from app.pages.concepts import NEGATIVE, POSITIVE, candidate_rows
from app.pages.graph import elements, neuron_words
from app.pages.intervene import first_basket
from app.pages.merge import badge
from app.pages.synapses import chips, says, table_rows, toggled, typed
from app.panels.base import NothingToShow
from app.services import Services
from app.theme import LIGHT
from app.view_state import MAX_SYNAPSES, ViewState
from probes import bdh
from probes.features import FeatureTraining, TopK
from probes.features.study import find_features
from tests.app.dashboard.bdh_runs import MODEL, TEXT, finished, real_services
from tests.app.dashboard.panel_checks import PANELS, check_panels
from tests.app.dashboard.test_pages import text_of
from workbench import EditState

PAGES = {page.name: page for page in find_pages()}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Services, str]]:
    torch.set_num_threads(1)
    services, run = real_services(tmp_path_factory.mktemp("bdh"))
    yield services, run
    services.jobs.shutdown(timeout=60)


# ---- synapses --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(stage: tuple[Services, str]) -> str:
    services, run = stage
    return finished(services, start_search(services, services.scene(ViewState(run=run)), "strength", 2))


def test_the_search_finds_what_the_probe_finds(stage: tuple[Services, str], searched: str) -> None:
    services, run = stage
    found = services.open_run(searched)
    expected = bdh.strongest_synapses(models.load(MODEL), TEXT, 2, k=50)
    np.testing.assert_array_equal(found.array("scores"), expected.scores.numpy())
    first = expected.synapses[0]
    address = (first.source_layer, *first.source, first.target_layer, *first.target)
    assert tuple(found.array("addresses")[0]) == address
    assert found.manifest["settings"]["run"] == run and found.manifest["results"]["error"] < 1e-4
    paper = bdh.explained_by_paper(models.load(MODEL), TEXT)[1]  # of layers 1, 2, …
    assert found.manifest["results"]["paper"]["share"] == pytest.approx(float(paper.share.mean()), abs=1e-5)
    assert found.manifest["results"]["paper"]["cosine"] == pytest.approx(float(paper.cosine.mean()), abs=1e-5)
    # The panel reads the same strength from the open run's stored activity.
    scene = services.scene(ViewState(page="synapses", run=run, result=searched, synapses=(address,)))
    traced = PANELS["synapse-strength"].values(scene)[0, -1]
    assert traced == pytest.approx(float(expected.scores[0]), rel=2e-3)
    terms = PANELS["synapse-authors"].values(scene)
    assert abs(terms).max() > 0 and "Source neuron" in text_of(says(scene)) and len(chips(scene, "dark")) == 1
    assert table_rows(scene)[0]["id"] == "{}.{}.{}-{}.{}.{}".format(*address)


@pytest.mark.parametrize("measure,more", [("change", {"since": 20}), ("read", {"symbol": "t"})])
def test_the_other_measures(
    stage: tuple[Services, str], measure: str, more: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    services, run = stage
    scene = services.scene(ViewState(run=run, query=40))
    result = finished(services, start_search(services, scene, measure, 3, **more))
    view = ViewState(page="synapses", run=run, result=result)
    assert services.open_run(result).manifest["settings"]["at"] == 40
    check_panels(services, view, ["top-synapses", "synapse-authors"], monkeypatch)


def test_panels_of_the_synapses_page(
    stage: tuple[Services, str], searched: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    services, run = stage
    first, second = (tuple(map(int, row)) for row in services.open_run(searched).array("addresses")[[0, 5]])
    view = ViewState(page="synapses", run=run, result=searched, synapses=(second, first))  # type: ignore[arg-type]
    check_panels(services, view, [panel.id for panel in PAGES["synapses"].panels], monkeypatch)
    assert text_of(PAGES["synapses"].build(services, services.scene(view))).count("Who wrote it, exactly") == 1


@pytest.mark.parametrize("changes,words", [
    ({"measure": "strenght"}, "Did you mean 'strength'"), ({"layer": 0}, "from 1 to 3"), ({"measure": "change", "since": 84}, "beginning"),
    ({"measure": "read", "symbol": "ab"}, "one character"), ({"measure": "read", "symbol": None}, "one character"),
])  # fmt: skip
def test_mistakes_in_the_search_are_named(stage: tuple[Services, str], changes: dict, words: str) -> None:
    services, run = stage
    with pytest.raises(FormError, match=words):
        start_search(services, services.scene(ViewState(run=run)), **{"measure": "strength", "layer": 2, **changes})


def test_following(stage: tuple[Services, str]) -> None:
    services, run = stage
    scene = services.scene(ViewState(run=run))
    assert typed(scene, [1, 0, 2, 3, 3, 511]) == (1, 0, 2, 3, 3, 511)
    for parts, words in (
        ([1, 0, 2, 3, 3, 512], "Neuron 512"),
        ([2, 0, 0, 2, 0, 0], "higher layer"),
        ([1, 0, "", 2, 0, 0], "neuron is ''"),
    ):
        with pytest.raises(FormError, match=words):
            typed(scene, parts)
    view = ViewState(run=run)
    for number in range(MAX_SYNAPSES + 2):
        change = toggled(view, (0, 0, number, 1, 0, 0))["change"]["syn"]
        view = ViewState.from_url("/synapses", f"run={run}&syn={change}")
    assert [each[2] for each in view.synapses] == list(range(2, MAX_SYNAPSES + 2))
    assert toggled(ViewState(synapses=view.synapses[:1]), view.synapses[0])["change"]["syn"] is None
    with pytest.raises(NothingToShow, match="Search"):
        PANELS["synapse-fixed"].values(scene)


def test_a_run_of_another_model_leads_to_those_of_a_bdh(stage: tuple[Services, str]) -> None:
    services, run = stage
    other = finished(services, services.models.start_trace("gpt-english", "a cat", {}))
    page = PAGES["synapses"].build(services, services.scene(ViewState(page="synapses", run=other)))
    assert (
        "This run is of another model" in text_of(page)
        and f"run={run}" in str(page)
        and "synapse-search" not in str(page)
    )
    assert "This run is of another model" not in text_of(
        PAGES["synapses"].build(services, services.scene(ViewState(run=run)))
    )


# ---- neuron graph ----------------------------------------------------------------------------------------------------

GRAPH = {
    "name": MODEL, "graph": "x", "source_head": 0, "target_head": 0, "edges": 120, "text": TEXT, "layer": 2, "draws": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"threshold": "noise_quantile", "noise_quantile": 0.999},
        {"graph": "state", "target_head": 1},
        {"graph": "coactivation"},
    ],
    ids=lambda c: c.get("graph", c.get("threshold", "x")),
)
def test_a_graph_is_the_probes_and_can_be_made_again(
    stage: tuple[Services, str], changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    services, _ = stage
    result = finished(services, start_graph(services, **{**GRAPH, **changes}))
    found = services.open_run(result)
    source, target, places = (found.array(name) for name in ("source", "target", "places"))
    model, threshold = models.load(MODEL), found.manifest["settings"]["threshold"]
    expected = {
        "x": lambda: bdh.parameter_graph(model, 0, 0, **threshold), "state": lambda: bdh.state_graph(model, TEXT, 2, 0, 1, **threshold),
        "coactivation": lambda: bdh.coactivation_graph(model, TEXT, 2, **threshold),
    }[changes.get("graph", "x")]()  # fmt: skip
    np.testing.assert_array_equal(np.stack(expected.ends), np.stack([source, target]))
    assert (
        threshold == ({"edges": 120} if "threshold" not in changes else {"noise_quantile": 0.999}) and len(source) > 20
    )
    assert found.manifest["results"]["noise_edges"] == expected.noise_edges()
    assert np.isfinite(places[np.union1d(source, target)]).all()
    point = found.manifest["results"]["modularity"]
    assert set(point["baselines"]) == {
        "random",
        "low rank",
        "rewired",
        *(["initial"] if "graph" not in changes else []),
    }
    # Q of the stored division, by its definition, is what the probe says.
    community, weight = found.array("community"), np.abs(found.array("weight"))
    inside = weight[community[source] == community[target]].sum() / weight.sum()
    degree = np.bincount(source, weight, len(community)) + np.bincount(target, weight, len(community))
    shares = np.array([degree[community == c].sum() for c in range(community.max() + 1)]) / (2 * weight.sum())
    assert inside - (shares**2).sum() == pytest.approx(point["observed"]["q"], abs=1e-6)
    shown = [panel.id for panel in PAGES["graph"].panels]
    for way, tail in found.manifest["results"]["tails"].items():
        fit = found.array(f"fit.{way}")
        assert fit.shape[1] == 3 and fit[0, 1] == fit[0, 2] == tail["n_tail"] / tail["n_positive"]
    if not found.manifest["results"]["tails"]:
        shown.remove("graph-degrees")
    check_panels(services, ViewState(page="graph", result=result), shown, monkeypatch)
    drawn = elements(found)
    assert sum("position" in each for each in drawn) == (community >= 0).sum()
    hub = found.manifest["results"]["hubs"][0]
    words = text_of(neuron_words(found, hub["neuron"] + (found.manifest["results"]["n_neurons"] if hub["head"] else 0)))
    assert f"{hub['head']}·{hub['neuron']}" in words and "promotes" in words
    assert "Modularity" in text_of(
        PAGES["graph"].build(services, services.scene(ViewState(page="graph", result=result)))
    )


@pytest.mark.parametrize("changes,words", [
    ({"name": "bdh-englisch"}, "Did you mean 'bdh-english'"), ({"graph": "z"}, "kind of graph"), ({"edges": 3}, "from 20"),
    ({"graph": "state", "text": " "}, "Type a text"), ({"graph": "state", "layer": 0}, "the layer is 0"), ({"draws": 1.5}, "draws"),
    ({"source_head": None}, "source head is None"), ({"threshold": "edge"}, "Did you mean 'edges'"),
    ({"threshold": "noise_quantile", "noise_quantile": 99}, "less than 1"),
])  # fmt: skip
def test_mistakes_in_the_graphs_form_are_named(stage: tuple[Services, str], changes: dict, words: str) -> None:
    with pytest.raises(FormError, match=words):
        start_graph(stage[0], **{**GRAPH, **changes})


# ---- concepts --------------------------------------------------------------------------------------------------------

CONCEPT = {
    "name": MODEL, "concept": "animal", "positive": "", "negative": "", "sentences": 16, "statistic": "strength", "layer": 2, "head": 1,
    "shuffles": 1, "draws": 1,
}  # fmt: skip


def test_a_concept_search_is_the_probes(stage: tuple[Services, str], monkeypatch: pytest.MonkeyPatch) -> None:
    services, _ = stage
    result = finished(services, start_finding(services, **CONCEPT))
    view = ViewState(page="concepts", result=result)
    check_panels(
        services,
        view,
        [panel.id for panel in PAGES["concepts"].panels],
        monkeypatch,
        ["concept-shuffles", "concept-causal"],
    )
    scene = services.scene(view)
    assert len(candidate_rows(scene)) == len(services.open_run(result).array("rank_biserial"))
    assert "Is it causal?" in text_of(PAGES["concepts"].build(services, scene))


def test_own_sentences_have_groups_and_a_stored_dictionary_is_a_rival(
    stage: tuple[Services, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    services, _ = stage
    folder, quick = (
        services.store.root / "some-features",
        FeatureTraining(steps=5, batch_size=32, warmup=1, report_every=5),
    )
    find_features(models.load(MODEL), "blocks.1.hook_resid_post", TEXT.encode() * 8, TopK(16, k=2), folder, training=quick,
                  context=32, n_features=1)  # fmt: skip
    own = {**CONCEPT, "concept": "own", "positive": POSITIVE, "negative": NEGATIVE, "shuffles": 0, "draws": 0,
           "dictionary": folder.name}  # fmt: skip
    found = services.open_run(finished(services, start_finding(services, **own)))
    results = found.manifest["results"]
    assert found.manifest["settings"]["positive"] == POSITIVE.splitlines()
    assert results["transfer"] is None and results["causal"] is None and "groups" in results["no_transfer"]
    rival = results["scores"][-1]
    assert rival["name"] == "dictionary feature, blocks.1.hook_resid_post" and rival["searched"] == 16
    check_panels(services, ViewState(page="concepts", result=found.id), ["concept-rivals"], monkeypatch)
    scene = services.scene(ViewState(page="concepts", result=found.id))
    for name in ("concept-transfer", "concept-causal", "concept-shuffles"):
        with pytest.raises(NothingToShow):
            PANELS[name].values(scene)
    assert sentences_of("a | one two\nthree", "set", 2) == [("a", "one two"), ("", "three")]


@pytest.mark.parametrize("changes,words", [
    ({"concept": "anmal"}, "Did you mean 'animal'"), ({"sentences": 4}, "from 8"),
    ({"concept": "own", "positive": "one line"}, "There are 1"),
    ({"concept": "own", "positive": "a\n" * 9}, "has 1 tokens"), ({"layer": 0}, "target layer"),
    ({"shuffles": None}, "shuffles is None"), ({"dictionary": "../elsewhere"}, "the dictionary is"),
])  # fmt: skip
def test_mistakes_in_the_concept_form_are_named(stage: tuple[Services, str], changes: dict, words: str) -> None:
    with pytest.raises(FormError, match=words):
        start_finding(stage[0], **{**CONCEPT, **changes})


# ---- interventions ---------------------------------------------------------------------------------------------------

BASKET = "ablate 1.0.{i}-2.{h}.{j} after 30\nneurons 0.5\nblock 50 51\nscale layer 1 by 0.5 after 20\nstate layer 2 after 40 from: a cat"


def test_a_basket_does_what_its_hooks_do(
    stage: tuple[Services, str], searched: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    services, run = stage
    _, head, i, _, h, j = services.open_run(searched).array("addresses")[0].tolist()
    basket = BASKET.replace("1.0.", f"1.{head}.").format(i=i, h=h, j=j)
    scene = services.scene(ViewState(run=run, query=60))
    result = finished(services, start_intervening(services, scene, basket, 2, 0))
    found, model = services.open_run(result), models.load(MODEL)
    tokens = model.to_tokens(TEXT)
    synapse = bdh.Synapse(source=(head, i), target=(h, j), target_layer=2)
    hooks = [
        bdh.ablate_synapse(model, TEXT, synapse, after=30), *bdh.ablate_neurons(model, [(0, 5)]),
        bdh.block_reads(model, positions=[50, 51]),
        EditState(layer=1, after=20, value=0.5), *bdh.copy_state(model, "a cat", source_after=-1, after=40, layer=2),
    ]  # fmt: skip
    with torch.no_grad():
        plain, changed = (model.run_with_hooks(tokens, hooks=each)[0].log_softmax(-1) for each in ([], hooks))
    expected = (plain - changed)[:-1].gather(1, tokens[0, 1:, None])[:, 0].numpy()
    np.testing.assert_allclose(found.array("loss")[1:], expected, atol=2e-5)
    np.testing.assert_allclose(found.array("log_probs"), (changed - plain)[60].numpy(), atol=2e-5)
    assert np.abs(expected).max() > 1e-3
    view = ViewState(page="intervene", run=run, result=result)
    check_panels(services, view, [panel.id for panel in PAGES["intervene"].panels], monkeypatch)
    assert first_basket(services.scene(view)) == basket
    assert "random edits" in text_of(PAGES["intervene"].build(services, services.scene(view)))


@pytest.mark.parametrize("basket,words", [
    ("", "0 edits"), ("ablat 1.0.1-2.0.1 after 3", "Did you mean 'ablate'"), ("freeze at 3", "freeze since 40"), ("block 99", "too late"),
    ("mute 2.0.1-1.0.1", "is no synapse"), ("neurons 0.512", "no neuron 0.512"), ("scale layer 4 by 0 after 3", "no layer 4"),
    ("mute 1.0.600-2.0.1", "neuron 600"), ("block 3\n" * 13, "13 edits"),
])  # fmt: skip
def test_mistakes_in_the_basket_are_named(stage: tuple[Services, str], basket: str, words: str) -> None:
    services, run = stage
    with pytest.raises(FormError, match=words):
        start_intervening(services, services.scene(ViewState(run=run)), basket, 2, 0)


# ---- sparsity --------------------------------------------------------------------------------------------------------


def test_sparsity_is_the_probes(stage: tuple[Services, str], monkeypatch: pytest.MonkeyPatch) -> None:
    services, _ = stage
    found = services.open_run(finished(services, start_sparsity(services, MODEL, TEXT)))
    expected = bdh.measure_sparsity(models.load(MODEL), TEXT)
    for name in ("x", "gate", "y"):
        np.testing.assert_array_equal(found.array(f"active.{name}"), expected.of(name)[0].numpy())
        np.testing.assert_array_equal(found.array(f"octile.{name}"), expected.octile_means(name).numpy())
        np.testing.assert_array_equal(found.array(f"dead.{name}"), expected.dead(name).numpy())
    for token in ("read", "next"):
        tied = expected.correlation("y", token=token)
        np.testing.assert_array_equal(found.array(f"correlation.{token}"), tied.value.numpy())
        np.testing.assert_array_equal(found.array(f"null.{token}"), tied.null.numpy())
    curve = bdh.card_curve(models.load(MODEL).card)
    assert found.array("training.step").tolist() == [point.step for point in curve] and curve[0].step == 0
    np.testing.assert_allclose(found.array("training.surprisal"), [point.surprisal for point in curve])
    view = ViewState(page="sparsity", result=found.id)
    check_panels(services, view, [panel.id for panel in PAGES["sparsity"].panels], monkeypatch)
    scene = services.scene(view)
    over = PANELS["sparsity-training"].values(scene)  # activity, measurement, layer
    np.testing.assert_allclose(over[2, -1], np.mean(curve[-1].active["y"], axis=1))
    drawn = PANELS["sparsity-training"].figure(scene, LIGHT)  # type: ignore[attr-defined]
    means = [trace for trace in drawn.data if trace.name and trace.line.dash != "dot"]
    np.testing.assert_allclose(means[2].y, over[2].mean(1)[: len(means[2].y)])
    np.testing.assert_array_equal(PANELS["sparsity-raster"].values(scene)[6], expected.of("y")[0, 1, 2].numpy())
    drawn = text_of(PAGES["sparsity"].build(services, services.scene(view)))
    assert "Fast and slow neurons" in drawn and "Does surprise come with activity?" in drawn


def test_a_model_without_a_curve_of_its_training_says_so(
    stage: tuple[Services, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    services, _ = stage
    unknown = models.load(MODEL)
    unknown.card = {}
    monkeypatch.setattr(type(services.models), "load", lambda self, name: unknown)
    scene = services.scene(ViewState(result=finished(services, start_sparsity(services, MODEL, TEXT[:40]))))
    with pytest.raises(NothingToShow, match="workbench train"):
        PANELS["sparsity-training"].values(scene)
    assert np.isfinite(PANELS["sparsity-raster"].values(scene)).any()


@pytest.mark.parametrize("changes,words", [
    ({"name": "bdh-englisch"}, "Did you mean 'bdh-english'"), ({"text": " "}, "Type a text"), ({"text": "abc"}, "at least 4"),
])  # fmt: skip
def test_mistakes_in_the_sparsity_form_are_named(stage: tuple[Services, str], changes: dict, words: str) -> None:
    with pytest.raises(FormError, match=words):
        start_sparsity(stage[0], **{"name": MODEL, "text": TEXT, **changes})


# ---- merge lab -------------------------------------------------------------------------------------------------------


def test_a_merge_is_measured(stage: tuple[Services, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With untrained weights, and with itself: an identity, with half of everything from either side."""
    services, _ = stage
    found = services.open_run(finished(services, start_merging(services, MODEL, f"initial:{MODEL}", TEXT)))
    model = models.load(MODEL)
    losses = found.array("losses")
    np.testing.assert_allclose(
        losses[0, 1:], model(TEXT, return_type="loss", loss_per_token=True)[0].detach().numpy(), atol=1e-5
    )
    means = np.nanmean(losses, axis=1)
    assert means[0] < means[2] and means[0] < means[1]
    plain, exact = found.manifest["results"]["self_merge"]
    assert exact < 1e-9 < plain
    assert "identity" in text_of(badge(found))
    check_panels(services, ViewState(page="merge", result=found.id), ["merge-losses", "merge-heritage"], monkeypatch)
    itself = services.open_run(finished(services, start_merging(services, MODEL, MODEL, TEXT)))
    np.testing.assert_allclose(itself.array("heritage"), 0.5, atol=1e-4)
    np.testing.assert_allclose(itself.array("losses")[2, 1:], losses[0, 1:], atol=0.02)


def test_folders_of_the_runs_root_can_be_parents(stage: tuple[Services, str]) -> None:
    services, _ = stage
    models.save(models.build("bdh"), services.store.root / "my-bdh")
    (services.store.root / "broken").mkdir()
    (services.store.root / "broken" / "config.json").write_text("{")
    names = [value for value, _ in parents(services)]
    assert "folder:my-bdh" in names and not any("broken" in name for name in names)
    job = services.jobs.wait(start_merging(services, "folder:my-bdh", MODEL, TEXT).id, timeout=60)
    assert job.state == "failed" and "n_layers" in str(job.error)
    for wrong in ("folder:../elsewhere", "folder:my-bhd", "no-such"):
        with pytest.raises(FormError, match="no model"):
            start_merging(services, wrong, MODEL, TEXT)
    with pytest.raises(FormError, match="two tokens"):
        start_merging(services, MODEL, MODEL, "a")
