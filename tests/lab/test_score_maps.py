"""Scores by term, from runs: against what the model's own hook points saw, and against the pattern that a softmax makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import models
from workbench import Ablate
from workbench.lab import trace
from workbench.lab.factors import LayerFactors
from workbench.lab.pattern_factors import FactorError
from workbench.lab.runs import RunStore
from workbench.lab.score_maps import ScoreMaps, score_labels, terms_of
from workbench.lab.trace import trace_run

TEXT = "watch it hatch again"
SCORES = "hook_attn_scores"
TERMS = {
    "alibi": {"bias.alibi"}, "bloom": {"bias.alibi"}, "t5-bias": {"bias.t5"}, "bam": {"bias.bam"}, "cope": {"bias.cope"},
    "transformer-xl-attention": {"bias.relative", "bias.key_preference"}, "music-transformer": {"bias.relative_embedding"},
}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path)


def lively(name: str) -> models.Decoder:
    """The architecture with larger random weights, so that no score is near 0."""
    model = models.build(name)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=generator)
    return model


def seen(model: models.Decoder, hook: str) -> np.ndarray:
    """[head or map, query, key] of layer 1."""
    name = f"blocks.1.attn.{hook}"
    return model.run_with_cache(TEXT, names=[name])[1][name][0].detach().numpy()


@pytest.mark.parametrize("name", TERMS)
def test_every_term_is_what_its_hook_point_saw_and_they_sum_to_the_scores(name: str, store: RunStore) -> None:
    model = lively(name)
    run = trace_run(model, TEXT, store)
    maps = ScoreMaps.from_run(run, 1)
    assert set(maps.labels) == {"scores", "content", *TERMS[name]}
    total = seen(model, SCORES)
    visible = np.isfinite(total)
    hooks = {"scores": SCORES, "content": "hook_content_scores"} | {term: f"{term}.hook_bias" for term in TERMS[name]}
    for head in range(len(total)):
        assert (np.isfinite(maps.tile("scores", head)) == visible[head]).all()
        for term, hook in hooks.items():
            expected = np.where(visible[head], seen(model, hook)[head], np.nan)
            np.testing.assert_allclose(maps.tile(term, head), expected, atol=2e-5, rtol=1e-5)
        summed = sum(maps.tile(term, head) for term in terms_of(maps.labels))
        np.testing.assert_allclose(summed, maps.tile("scores", head), atol=2e-5, rtol=1e-5)
        shares = torch.tensor(maps.tile("scores", head)).nan_to_num(nan=-torch.inf).softmax(-1).numpy()
        np.testing.assert_allclose(LayerFactors.from_run(run, 1).pattern(head), shares, atol=1e-5)
    difference = (run.layer(1).get("scores") or {}).get("difference")
    assert difference is None or difference < 2e-5


def test_a_tile_a_cell_and_a_row_are_parts_of_the_map(store: RunStore) -> None:
    for name in ("alibi", "t5-bias"):  # from factors, and stored
        maps = ScoreMaps.from_run(trace_run(lively(name), TEXT, store), 1)
        whole = maps.tile("content", 2)
        np.testing.assert_allclose(maps.tile("content", 2, slice(3, 9), [0, 5]), whole[3:9][:, [0, 5]], atol=1e-6)
        np.testing.assert_allclose(maps.row(2, 7)["content"], whole[7], atol=1e-6)
        assert maps.at(2, 7, 4)["content"] == pytest.approx(float(whole[7, 4]), abs=1e-6)
        assert np.isnan(maps.at(2, 4, 7)["scores"])
        assert np.isnan(maps.overview("scores", 2, 4, slice(None), slice(None), "max")[0, 3])


def test_both_maps_of_a_differential_head_are_its_own(store: RunStore) -> None:
    model = lively("diff-transformer")
    maps = ScoreMaps.from_run(trace_run(model, TEXT, store), 1)
    raw = seen(model, "hook_raw_pattern")  # two maps per head, the second is subtracted
    assert list(maps.labels) == ["scores~0", "scores~1"] and maps.labels["scores~1"] == "scores (map 1)"
    adjacent = model.mixers[1].maps_adjacent
    for head in range(3):
        for number in range(2):
            shares = torch.tensor(maps.tile(f"scores~{number}", head)).nan_to_num(nan=-torch.inf).softmax(-1).numpy()
            np.testing.assert_allclose(shares, raw[2 * head + number if adjacent else head + 3 * number], atol=1e-5)


def test_what_follows_the_sum_is_told(store: RunStore) -> None:
    run = trace_run(lively("qk-norm"), TEXT, store)  # scores are capped softly
    assert run.layer(1)["scores"]["difference"] > 0.01


def test_a_removed_term_is_zero_in_the_run(store: RunStore) -> None:
    """Also of a layer whose factors tell its scores: the edit overwrites them."""
    run = trace_run(lively("alibi"), TEXT, store, interventions=[Ablate("blocks.1.attn.bias.alibi.hook_bias")])
    maps = ScoreMaps.from_run(run, 1)
    assert np.nanmax(np.abs(maps.tile("bias.alibi", 0))) == 0
    np.testing.assert_allclose(maps.tile("scores", 0), maps.tile("content", 0), atol=1e-6)
    assert np.nanmin(ScoreMaps.from_run(run, 0).tile("bias.alibi", 0)) < -1


def test_what_there_is_not_is_said(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = ScoreMaps.from_run(trace_run(lively("alibi"), TEXT, store), 1)
    with pytest.raises(FactorError, match=r"no score map 'bias.alibo'. Did you mean 'bias.alibi'"):
        maps.tile("bias.alibo", 0)
    retention = trace_run(models.build("retnet"), TEXT, store)
    assert score_labels(retention.layer(0)) == {}
    with pytest.raises(FactorError, match="not made of scores"):
        ScoreMaps.from_run(retention, 0)
    with pytest.raises(FactorError, match="do not tell scores"):
        LayerFactors.from_run(retention, 0).score_terms(0)
    monkeypatch.setattr(trace, "LARGEST_SCORES", 100)
    long = trace_run(models.build("t5-bias"), TEXT, store)
    assert score_labels(long.layer(0)) == {}
    with pytest.raises(FactorError, match="too many to keep"):
        ScoreMaps.from_run(long, 0)
