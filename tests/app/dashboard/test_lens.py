"""The Lens page: its measurements beside the probes, on every architecture; its panels; mistakes; in a browser."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from app.measure import lens as measure
from app.measure.common import FormError
from app.measure.lens import (
    load_lens,
    pair,
    parts_of,
    reading_of,
    start_reading,
    stream_shape,
    token_id,
)
from app.pages import find_pages
from app.panels.base import NothingToShow
from app.panels.lens import MOST_BARS
from app.services import Services
from app.theme import LIGHT
from app.view_state import LENS_COLOURS, ViewState
from models.registry import ARCHITECTURES as REGISTERED
from probes.lenses import logit_lens
from probes.tuned_lens import train_tuned_lens
from tests.app.dashboard.bdh_runs import finished, real_services
from tests.app.dashboard.panel_checks import PANELS, check_panels
from tests.app.dashboard.test_pages import text_of
from tests.probes.attribution_cases import perturbed
from workbench.lab.batches import TextBatches
from workbench.lab.corpora import Corpus
from workbench.lab.jobs import Job, JobCancelled

models.architecture("bdh")  # registers all
MODEL, TEXT = "gpt-english", "one two three. one two three. one"
PAGE = next(page for page in find_pages() if page.name == "lens")
OWN = [panel.id for panel in PAGE.panels if panel.id.startswith("lens-")]


def small_batches(corpus: str, context: int, batch_size: int, **options: Any) -> TextBatches:
    """A corpus of a few lines, so that reading it takes no time."""
    text = "".join(f"line {i} of a small text, then line {i + 1}.\n" for i in range(80)).encode()
    parts = [
        Corpus("small", split, data, "none", "made here", "")
        for split, data in (("train", text), ("validation", text[:900]))
    ]
    return TextBatches(parts[0], context, batch_size, validation=parts[1], **options)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Services, str]]:
    torch.set_num_threads(1)
    services, _ = real_services(tmp_path_factory.mktemp("lens"))
    run = finished(services, services.models.start_trace(MODEL, TEXT, {}))
    yield services, run
    services.jobs.shutdown(timeout=60)


def read(services: Services, view: ViewState, **asked: Any) -> str:
    form = {"lens": "logit", "corpus": "pydoc", "steps": 4, "answer": "", "wrong": None, "target": "next", **asked}
    return finished(services, start_reading(services, services.scene(view), **form))


@pytest.fixture(scope="module")
def tuned(stage: tuple[Services, str]) -> str:
    """A reading through a lens that was trained for it."""
    services, run = stage
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("workbench.lab.batches.TextBatches", small_batches)
        return read(services, ViewState(run=run, query=12), lens="train", answer="t", wrong="o", target="answer")


def test_the_grid_is_what_the_probe_says(stage: tuple[Services, str], tuned: str) -> None:
    services, run = stage
    model, found = models.load(MODEL), services.open_run(tuned)
    tokens = model.to_tokens(TEXT)
    lens = load_lens(services.open_run(found.manifest["settings"]["lens"]))
    expected = {
        "logit": logit_lens(model, tokens, top=10, target=ord("t")),
        "tuned": lens.read(model, tokens, top=10, target=ord("t")),
    }
    assert float((expected["tuned"].divergence - expected["logit"].divergence).abs().max()) > 1e-2
    for name, reading in expected.items():
        view = ViewState(run=run, result=tuned, lens=name)
        for colour, values in {
            "top": reading.top_log_probs[..., 0].exp(), "target": (-reading.loss).exp(), "rank": reading.rank,
            "entropy": reading.entropy, "divergence": reading.divergence,
        }.items():  # fmt: skip
            shown = PANELS["lens-grid"].values(services.scene(view.change(lens_colour=colour)))
            np.testing.assert_allclose(shown, values[:, 0].numpy(), atol=1e-5)
        np.testing.assert_array_equal(found.array(f"{name}.top_ids"), reading.top_ids[:, 0].numpy())
        cell = PANELS["lens-cell"].values(services.scene(view.change(query=5, depth=2)))
        np.testing.assert_allclose(cell, reading.top_log_probs[2, 0, 5].numpy(), atol=1e-5)
        means = PANELS["lens-depths"].values(services.scene(view))
        np.testing.assert_allclose(means[("logit", "tuned").index(name)], reading.mean("divergence").numpy(), atol=1e-5)


@pytest.mark.parametrize("lens", ["logit", "tuned"])
@pytest.mark.parametrize("colour", LENS_COLOURS)
def test_panels(
    stage: tuple[Services, str], tuned: str, monkeypatch: pytest.MonkeyPatch, lens: str, colour: str
) -> None:
    services, run = stage
    names = OWN if colour == "top" else ["lens-grid", "lens-depths"]
    check_panels(
        services, ViewState(run=run, result=tuned, lens=lens, lens_colour=colour, columns=(3, 20)), names, monkeypatch
    )


def test_the_bars_sum_to_the_difference_of_logits(stage: tuple[Services, str], tuned: str) -> None:
    services, run = stage
    scene = services.scene(ViewState(run=run, result=tuned))
    logits = models.load(MODEL)(TEXT)[0, 12].detach()
    difference = float(logits[ord("t")] - logits[ord("o")])
    bars, cells = PANELS["lens-parts"].values(scene), PANELS["lens-heads"].values(scene)
    assert bars.sum() == pytest.approx(difference, abs=1e-4) and abs(difference) > 0.1
    record = services.open_run(tuned).manifest["results"]["attribution"]
    others = [v for c, v in zip(record["components"], bars, strict=False) if c["layer"] is None]
    assert np.nansum(cells) + sum(others) + record["constant"] == pytest.approx(difference, abs=1e-4)
    facts = " ".join(PANELS["lens-parts"].facts(scene))
    assert "logit ‘t’ − logit ‘o’ after token 12" in facts and "the model's own" in facts
    folded = PANELS["lens-parts"].bars(scene)[1]  # type: ignore[attr-defined]
    assert len(folded) <= MOST_BARS and folded.sum() == pytest.approx(bars.sum())


def test_many_components_are_folded_and_still_sum(
    stage: tuple[Services, str], tuned: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    services, run = stage
    monkeypatch.setattr("app.panels.lens.MOST_BARS", 6)
    scene = services.scene(ViewState(run=run, result=tuned))
    names, values = PANELS["lens-parts"].bars(scene)  # type: ignore[attr-defined]
    whole = PANELS["lens-parts"].values(scene)
    assert (
        len(values) == 6
        and names[-1] == f"{len(whole) - 5} smaller ones"
        and values.sum() == pytest.approx(whole.sum())
    )
    assert np.abs(values[:-1]).min() >= np.sort(np.abs(whole))[-5]


def test_a_lens_is_trained_once_and_resumes(
    stage: tuple[Services, str], tuned: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The stored lens is what the probe trains; asked again, nothing is trained; cancelled half way, it goes on where it stopped."""
    services, run = stage
    monkeypatch.setattr("workbench.lab.batches.TextBatches", small_batches)
    model = models.load(MODEL)
    lens = load_lens(services.open_run(services.open_run(tuned).manifest["settings"]["lens"]))
    data = small_batches(
        "pydoc", measure.CONTEXT, measure.BATCH, validation_windows=measure.HELD_OUT, tokenizer=model.tokenizer
    )
    expected = train_tuned_lens(model, data, tmp_path / "lens", steps=4)
    torch.testing.assert_close(lens.A, expected.lens.A)
    training = services.open_run(tuned).manifest["results"]["training"]
    assert training["held_out"] == pytest.approx(expected.held_out)
    again = read(services, ViewState(run=run), lens="train")
    assert (
        services.open_run(again).manifest["settings"]["lens"] == services.open_run(tuned).manifest["settings"]["lens"]
    )

    started, steps = threading.Event(), []

    class Watched(Job):
        def progress(self, fraction: float, message: str = "") -> None:
            steps.append(message)
            super().progress(fraction, message)
            if "step 2" in message:
                self.cancelling = True
                started.set()

    job = Watched("training", None, threading.Condition())
    with pytest.raises(JobCancelled):
        measure.train(job, services, model, "pydoc", 6)
    assert started.is_set() and not any("step 6" in message for message in steps)
    made = services.open_run(measure.train(Job("again", None, threading.Condition()), services, model, "pydoc", 6))
    assert made.manifest["results"]["steps"] == 6
    whole = train_tuned_lens(model, data, tmp_path / "six", steps=6)
    np.testing.assert_allclose(
        made.array("A"), whole.lens.A.detach().numpy(), atol=1e-6
    )  # the same batches and rates, cut in two
    assert not list((services.store.root / ".lenses").iterdir())


def test_a_result_belongs_to_its_run(stage: tuple[Services, str], tuned: str) -> None:
    services, run = stage
    other = next(entry.id for entry in services.store.list(kind="trace") if entry.id != run)
    for name in OWN:
        with pytest.raises(NothingToShow, match="Press Read"):
            PANELS[name].values(services.scene(ViewState(run=other, result=tuned)))
    words = text_of(PAGE.build(services, services.scene(ViewState(page="lens", run=other))))
    assert "Lens of" not in words  # results of other runs are not offered
    assert "Lens of gpt-english" in text_of(
        PAGE.build(services, services.scene(ViewState(page="lens", run=run, result=tuned)))
    )


@pytest.mark.parametrize("changes,words", [
    ({"lens": "tunde"}, "lens is 'tunde'"), ({"answer": "the"}, "3 tokens"), ({"wrong": "e"}, "token A is not"),
    ({"lens": "train", "corpus": "pydok"}, "Did you mean 'pydoc'"), ({"lens": "train", "steps": 0}, "from 1"), ({"target": "nxt"}, "next"),
])  # fmt: skip
def test_mistakes_are_named(stage: tuple[Services, str], changes: dict, words: str) -> None:
    services, run = stage
    with pytest.raises(FormError, match=words):
        read(services, ViewState(run=run), **changes)


def test_tokens_by_number() -> None:
    model = models.load(MODEL)
    assert token_id(model, "#10", "Token A") == 10 and token_id(model, "x", "Token A") == 120
    for text in ("#256", "ab"):
        with pytest.raises(ValueError, match="Token A"):
            token_id(model, text, "Token A")


KINDS = (
    "gpt2",
    "gemma2",
    "retnet",
    "deltanet",
    "mamba",
    "mamba2",
    "bdh",
    "bdh-paper",
    "looped",
    "palbert",
    "lstm",
    "xlstm",
    "titans-mac",
)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in KINDS else pytest.mark.slow) for name in sorted(REGISTERED)]
)
def test_every_architecture_can_be_read(name: str) -> None:
    """One row per depth; the last is the model; contributions sum to its own difference, or the probe's words say why there are none."""
    model = perturbed(name, torch.float32)
    tokens = torch.randint(0, model.vocab_size, (1, 10), generator=torch.Generator().manual_seed(1))
    reading, (norms, cosines) = reading_of(model, tokens), stream_shape(model, tokens)
    assert norms.shape == cosines.shape == tuple(reading.entropy[:, 0].shape)
    assert np.nanmax(np.abs(cosines[-1] - 1)) < 1e-5 and (np.isnan(cosines) == ((norms == 0) | (norms[-1] == 0))).all()
    answer, wrong = pair(model, tokens, {"answer": None, "wrong": None, "at": 7})
    logits = model(tokens)[0, 7].detach()
    assert wrong is not None and logits[answer] == logits.max() and (logits > logits[wrong]).sum() == 1
    record, parts = parts_of(model, tokens, answer, wrong, 7)
    if "refused" in record:
        assert "not affine" in record["refused"] and not len(parts)
    else:
        difference = float(logits[answer] - logits[wrong])
        assert parts.sum() + record["constant"] == pytest.approx(difference, abs=1e-3 * max(1.0, np.abs(parts).max()))


def test_capped_logits_are_refused_in_words(stage: tuple[Services, str], tuned: str) -> None:
    """A model without an attribution still has its lens; the panels say why the rest is empty."""
    services, run = stage
    model = perturbed("gemma2", torch.float32, 0.5)
    record, parts = parts_of(model, torch.arange(9)[None], 3, 5, 8)
    assert not len(parts) and not record["components"]
    found = services.open_run(tuned)
    results = {**found.manifest["results"], "attribution": record}
    with services.store.create("lens", "refused", model=found.model, text=TEXT) as copy:
        for name in found.arrays():
            values = parts if name == "contributions" else found.array(name)
            copy.add_array(name, values, axes=found.arrays()[name]["axes"])
        copy.set(settings=found.manifest["settings"], results=results)
    scene = services.scene(ViewState(run=run, result=copy.id))
    for name in ("lens-parts", "lens-heads"):
        with pytest.raises(NothingToShow, match="not affine"):
            PANELS[name].values(scene)
    assert PANELS["lens-grid"].figure(scene, LIGHT) is not None
