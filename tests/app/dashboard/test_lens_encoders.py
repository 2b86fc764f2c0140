"""The Lens page on encoders: those without a head are refused before anything starts, of the others it says what stands where."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from app.measure.common import FormError
from app.measure.interventions import start_intervening
from app.measure.lens import TRAIN, start_reading
from app.measure.patching import start_patching
from app.model_service import WorkbenchModels
from app.pages import find_pages
from app.panels.base import NothingToShow
from app.services import Services
from app.theme import LIGHT
from app.view_state import ViewState
from tests.app.dashboard.bdh_runs import finished
from tests.app.dashboard.panel_checks import PANELS, check_panels
from tests.app.dashboard.test_lens import small_batches
from tests.app.dashboard.test_pages import text_of
from tests.models.pretrained.reference import Case, write
from tests.models.pretrained.test_encoders import CASES
from workbench.lab.jobs import JobQueue
from workbench.lab.runs import RunStore

PAGE = next(page for page in find_pages() if page.name == "lens")
OWN = [panel.id for panel in PAGE.panels if panel.id.startswith("lens-")]
TEXT = "a cat sat on a mat"
FORM = {"lens": "logit", "corpus": "pydoc", "steps": 3, "answer": "", "wrong": None, "target": "next"}


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Services, dict[str, str]]]:
    """Runs of an encoder without a head, and of one with."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("encoders")
    for name, kind in (("bare", "bert"), ("filler", "bert-masked")):
        known = CASES[kind]
        write(Case(known.model, {**known.settings, "vocab_size": 256}), root / "models" / name)
    store, jobs = RunStore(root / "runs"), JobQueue()
    services = Services(store, jobs, WorkbenchModels(store, jobs, root / "models"))
    runs = {name: finished(services, services.models.start_trace(name, TEXT, {})) for name in ("bare", "filler")}
    yield services, runs
    jobs.shutdown(timeout=60)


def test_an_encoder_without_a_head_is_refused_before_it_starts(stage: tuple[Services, dict[str, str]]) -> None:
    services, runs = stage
    scene, before = services.scene(ViewState(page="lens", run=runs["bare"])), len(services.jobs.jobs())
    for lens in ("logit", TRAIN):
        with pytest.raises(
            FormError, match=r"bare is an encoder without a head that predicts tokens.*Open a run of a language model"
        ):
            start_reading(services, scene, **{**FORM, "lens": lens})
    assert len(services.jobs.jobs()) == before, "no job was queued"
    words = text_of(PAGE.build(services, scene))
    assert "an encoder without a head that predicts tokens" in words and "Token A" not in words, (
        "no form to fill in for nothing"
    )
    for name in OWN:
        with pytest.raises(NothingToShow, match="an encoder without a head"):
            PANELS[name].check(scene)
    assert np.isfinite(PANELS["residual"].values(scene)).all(), "the stream itself is drawn"


@pytest.mark.parametrize("lens", ["logit", TRAIN])
def test_an_encoder_with_a_head_says_what_stands_there(
    stage: tuple[Services, dict[str, str]], lens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the mark at the token that is really there: it is the pinned one, not the one behind it."""
    services, runs = stage
    monkeypatch.setattr("workbench.lab.batches.TextBatches", small_batches)
    monkeypatch.setenv("WORKBENCH_MODELS", str(services.models.checkpoints.root))  # type: ignore[attr-defined]
    view = ViewState(
        page="lens", run=runs["filler"], query=2, lens="tuned" if lens == TRAIN else "logit", lens_colour="rank"
    )
    view = view.change(
        result=finished(services, start_reading(services, services.scene(view), **{**FORM, "lens": lens}))
    )
    scene = services.scene(view)
    words = text_of(PAGE.build(services, scene))
    for said in (
        "at the pinned token",
        "Column = at which token",
        "the token that really does is green",
    ):
        assert said in words, said
    assert "follows" not in words and "came next" not in words and "next token" not in words
    drawn = [name for name in OWN if name not in ("lens-parts", "lens-heads")]
    assert "target: the token that really stands there" in [
        fact for name in drawn for fact in PANELS[name].facts(scene)
    ]
    with pytest.raises(NothingToShow, match="not affine in them"):
        PANELS["lens-parts"].values(scene)
    model = services.models.load("filler")
    best = model(TEXT).log_softmax(-1)[0, 2].topk(10).indices.tolist()
    cell = PANELS["lens-cell"]
    assert cell.ids(scene) == best  # type: ignore[attr-defined]
    ticked = [text for text in cell.figure(scene, LIGHT).data[0].text if "✓" in text]  # type: ignore[attr-defined]
    assert len(ticked) == (ord("c") in best)
    here = PANELS["lens-grid"].measure(scene)  # type: ignore[attr-defined]
    logits = model(TEXT)[0]
    ranks = (logits > logits[torch.arange(len(TEXT)), torch.tensor(list(TEXT.encode()))][:, None]).sum(-1)
    assert here[-1].tolist() == ranks.tolist(), "rank of the token itself, at every token"
    if lens == "logit":
        check_panels(services, view, drawn, monkeypatch)


def test_the_pinned_token_is_ticked(stage: tuple[Services, dict[str, str]]) -> None:
    """An encoder that says what it reads: the tick stands at the pinned token."""
    services, runs = stage
    model = services.models.load("filler")
    ids = torch.tensor([list(TEXT.encode())])
    at = int((model(ids).argmax(-1) == ids)[0].long().argmax())
    view = ViewState(page="lens", run=runs["filler"], query=at, lens="logit")
    view = view.change(result=finished(services, start_reading(services, services.scene(view), **FORM)))
    scene = services.scene(view)
    bars = PANELS["lens-cell"].figure(scene, LIGHT).data[0].text  # type: ignore[attr-defined]
    rank = (
        PANELS["lens-cell"].ids(scene).index(int(ids[0, at]))
        if int(ids[0, at]) in PANELS["lens-cell"].ids(scene)
        else None
    )  # type: ignore[attr-defined]
    assert [i for i, text in enumerate(bars) if "✓" in text] == ([] if rank is None else [rank])


def test_other_measurements_of_logits_are_refused_too(stage: tuple[Services, dict[str, str]]) -> None:
    """The Intervene and the Patching page on an encoder without a head: before anything starts."""
    services, runs = stage
    scene, before = services.scene(ViewState(run=runs["bare"])), len(services.jobs.jobs())
    with pytest.raises(FormError, match=r"bare is an encoder without a head.*no logit whose change"):
        start_intervening(services, scene, "zero head 0.1", 4, 0, prompts="")
    with pytest.raises(FormError, match=r"bare is an encoder without a head.*no logit whose change"):
        start_patching(services, scene, "a cat", "a dog", "", "", [], "")
    assert len(services.jobs.jobs()) == before
