"""The record of a dictionary: sparse codes, histograms, φ, contexts and native neurons against their definitions; studies that go on."""

from __future__ import annotations

from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch
from scipy.sparse import csc_matrix

import models
from probes.features import FeatureTraining, TopK
from probes.features.record import BINS, SLOTS, TOP, Codes, best_matches, native_neurons, store_features
from probes.features.study import continue_study, corpus_tokens, find_features, requested
from probes.features.tokens import token_effects
from probes.progress import MeasurementCancelled
from workbench.lab.activation_store import Site
from workbench.lab.checkpoints import CheckpointError
from workbench.lab.runs import Run, RunStore

TEXT = b"the cat sat on the mat, and the dog sat on the log; then the cat and the dog ran. " * 30
QUICK = FeatureTraining(steps=40, batch_size=64, warmup=5, report_every=20)


def test_codes_against_their_definitions() -> None:
    random = np.random.default_rng(0)
    dense = np.where(random.random((200, 7)) < 0.3, random.random((200, 7)), 0.0)
    dense[:, 5], dense[:, 6] = 0.0, 1.0  # never, always
    codes = Codes(csc_matrix(dense))
    np.testing.assert_allclose(codes.density, (dense > 0).mean(0))
    np.testing.assert_allclose(codes.largest(), dense.max(0), rtol=1e-6)
    for unit, row in enumerate(codes.histograms()):
        inside = dense[dense[:, unit] > 0, unit]
        wanted = np.histogram(inside, BINS, (0, inside.max()))[0] if len(inside) else np.zeros(BINS)
        np.testing.assert_array_equal(row, wanted)
    assert codes.peaks()[5] == -1 and all(codes.peaks()[u] == dense[:, u].argmax() for u in range(5))
    with np.errstate(invalid="ignore"):
        wanted = np.corrcoef((dense > 0).T)  # φ is Pearson's r of two binary variables
    np.testing.assert_allclose(codes.phi([1, 4]), np.nan_to_num(wanted)[[1, 4]], atol=1e-6)


def test_best_matches_are_the_largest_pearson_correlations() -> None:
    random = np.random.default_rng(1)
    neurons = random.normal(size=(300, 9)).astype(np.float32)
    features = np.stack([neurons[:, 4] * 2 + 1, -neurons[:, 2], random.normal(size=300)], 1).astype(np.float32)
    match, r = best_matches(features, neurons)
    wanted = np.corrcoef(features.T, neurons.T)[:3, 3:]
    assert match[0] == 4 and r[0] == pytest.approx(1, abs=1e-5) and match[1] != 2
    np.testing.assert_allclose(r, wanted.max(1), atol=1e-5)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Run, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("record")
    model = models.build("bdh")
    found = find_features(model, "blocks.1.hook_resid_post", TEXT, TopK(40, k=3), root / "dictionary-a", training=QUICK,
                          random_twin=models.build("bdh", seed=5), context=24, sequences=40, n_features=3)  # fmt: skip
    return model, found, store_features(RunStore(root), model, found, folder="dictionary-a"), root


def test_the_record_is_the_study(study: tuple[Any, Any, Run, Path]) -> None:
    model, found, run, _ = study
    codes = found.dictionary.encode(found.store.rows(found.site.name)).detach()
    np.testing.assert_allclose(run.array("density"), (codes > 0).float().mean(0), atol=1e-6)
    np.testing.assert_allclose(run.array("held.density"), found.evaluation.density, atol=1e-6)
    shown = run.array("shown")
    assert (np.diff(run.array("density")[shown]) <= 0).all() and set(shown.tolist()) == set(
        (codes > 0).any(0).nonzero()[:, 0].tolist()
    )
    tokens, values, focus, band = (run.array(f"contexts.{key}") for key in ("tokens", "values", "focus", "band"))
    for row, feature in enumerate(shown[:6].tolist()):
        assert values[row, 0, focus[row, 0]] == pytest.approx(
            float(codes[:, feature].max()), rel=1e-5
        )  # the strongest first
        assert (band[row, :TOP] == -1).all() and band.shape[1] == SLOTS
        for slot in np.flatnonzero(focus[row] >= 0):
            text = bytes(tokens[row, slot][tokens[row, slot] >= 0].tolist())
            assert text in TEXT  # contexts are pieces of the text
    effects = token_effects(model, found.site, found.dictionary)
    logits = found.dictionary.directions.detach() @ model.W_U
    assert effects is not None
    np.testing.assert_array_equal(run.array("promoted.ids")[:, 0], logits.argmax(1))
    np.testing.assert_array_equal(run.array("suppressed.ids")[:, 0], logits.argmin(1))
    partner = run.array("partners.ids")[0, 0]
    unit = torch.nn.functional.normalize(found.dictionary.W_dec.detach(), dim=-1)
    assert run.array("partners.cosine")[0, 0] == pytest.approx(float(unit[partner] @ unit[shown[0]]), abs=1e-5)
    results = run.manifest["results"]
    assert results["evaluation"]["fvu"] == pytest.approx(found.evaluation.fvu) and results["control"] is not None
    assert results["strings"][str(int(tokens[0, 0, 0]))] == chr(tokens[0, 0, 0]) and run.array("curve").shape == (2, 4)


def test_native_neurons_are_read_on_the_same_contexts(study: tuple[Any, Any, Run, Path]) -> None:
    model, found, run, _ = study
    neurons = run.manifest["results"]["neurons"]
    active, sequences, heads = native_neurons(model, found.tokens, "blocks.1.hook_x")
    _, cache = model.run_with_cache(found.tokens[:1], names=["blocks.1.hook_x"])
    x = cache["blocks.1.hook_x"][0]  # [head, pos, neuron]
    np.testing.assert_array_equal(active[5].reshape(heads, -1), x[:, 5])
    assert neurons["count"] == active.shape[1] == heads * neurons["per_head"] and sequences == len(found.tokens)
    row, slot = 0, 0
    best = run.array("neurons.match")[row]
    context = found.tokens  # find the context's place in the text
    tokens = run.array("contexts.tokens")[row, slot]
    size = int((tokens >= 0).sum())
    places = [(s, p) for s in range(len(context)) for p in range(context.shape[1] - size + 1)
              if context[s, p : p + size].tolist() == tokens[:size].tolist()]  # fmt: skip
    shown = run.array("contexts.neuron")[row, slot, :size]
    assert any(np.allclose(active[s * context.shape[1] + p :][:size, best], shown, atol=1e-6) for s, p in places)


def test_a_stopped_study_is_continued_from_its_folder(tmp_path: Path) -> None:
    model, cancel = models.build("gpt"), Event()

    def stop(fraction: float, message: str) -> None:
        if message.startswith("step"):
            cancel.set()

    options: dict[str, Any] = {"training": QUICK, "context": 24, "sequences": 30}
    with pytest.raises(MeasurementCancelled):
        find_features(
            model,
            Site("blocks.1.attn.hook_z", head=1),
            TEXT,
            TopK(16, k=2),
            tmp_path / "a",
            progress=stop,
            cancel=cancel,
            **options,
        )
    assert requested(tmp_path / "a")["site"] == {"point": "blocks.1.attn.hook_z", "head": 1, "every": 1}
    again = continue_study(model, tmp_path / "a")
    whole = find_features(model, Site("blocks.1.attn.hook_z", head=1), TEXT, TopK(16, k=2), tmp_path / "b", **options)
    assert torch.equal(again.dictionary.W_dec, whole.dictionary.W_dec) and again.evaluation.fvu == whole.evaluation.fvu
    run = store_features(RunStore(tmp_path), model, again)
    assert "promoted.ids" not in run.arrays() and run.manifest["results"]["no_neurons"]  # a head's output; no BDH
    with pytest.raises(ValueError, match="is of the model"):
        continue_study(models.build("bdh"), tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"no request\.json"):
        continue_study(model, tmp_path / "c")


def test_corpora_are_read_in_the_models_own_tokens() -> None:
    model = models.build("gpt")
    ids = corpus_tokens(model, "pydoc")
    assert ids.ndim == 1 and bytes(ids[:20].tolist()).decode() == model.tokenizer.decode(ids[:20].tolist())
