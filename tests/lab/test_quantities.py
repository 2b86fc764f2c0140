"""Special quantities of runs against the hook points that they are read from, on every architecture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import models
from models.architecture_record import ARCHITECTURES
from models.attention.differential import DifferentialConfig
from models.attention.site import AttentionConfig
from models.language_model import LanguageModel, LanguageModelConfig
from workbench.instrument.interventions import Scale
from workbench.lab import quantity_arrays
from workbench.lab.quantities import ORDINARY, WORDS, run_quantities, title_of
from workbench.lab.quantity_arrays import parts_of
from workbench.lab.run_format import RunError, check_manifest
from workbench.lab.runs import RunStore
from workbench.lab.trace import trace_run

models.list_models()  # registers all
TEXT = "watch it hatch now"
LENGTH = len(TEXT)
EXPECTED = {
    "diff-transformer": {"lambda", "raw_pattern"}, "denseformer": {"depth_weights"}, "universal-transformer": {"halting", "step_weight"},
    "nats": {"token_type"}, "landmark": {"block_gate"}, "routing-transformer": {"query_affinity", "key_affinity"},
    "combiner": {"region_pattern", "within_region"}, "cope": {"context_gate", "context_position"}, "hrm": {"low_state", "high_state"},
    "infini": {"gate", "local_z", "memory_z"}, "qwen3-next": {"router"}, "bird-eye": {"importance"}, "titans-mac": {"attention"},
    "dual-attention": {"relations", "symbol_pattern"}, "gated-sinks": {"gate"}, "alibi": {"position_bias"}, "loglinear-gdn": {"level"},
}  # fmt: skip
"""What the papers are read for: each of these roles must appear among the quantities of its architecture."""


SLOW = {"test-time-memory", "recurrent"}  # families whose tiny models take seconds each
NAMES = [
    pytest.param(name, marks=pytest.mark.slow) if record.family in SLOW and name not in EXPECTED else name
    for name, record in ARCHITECTURES.items()
]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_is_what_the_model_computed(name: str, tmp_path: Path) -> None:
    """Every array, cell by cell, from a second run: rows, columns and the choice among heads are where the axes say."""
    model = models.build(name)
    run = trace_run(model, TEXT, RunStore(tmp_path))
    found = run_quantities(run.manifest)
    assert all(each.label and each.words.endswith(".") for each in found)
    titles = [(each.layer, each.label) for each in found]
    assert len(set(titles)) == len(titles)  # told apart
    roles = {record["role"] for record in run.manifest["quantities"]}
    signals = {point.role for mixer in model.mixers for point, _, _ in getattr(mixer, "signal_points", {}).values()}
    assert EXPECTED.get(name, set()) <= roles | signals | {"gate"} and not roles & ORDINARY
    for record in run.manifest["quantities"]:
        point = model.hook_dict[record["point"]]
        addresses = [point.name] if point.steps == 1 else [f"{point.name}@{k}" for k in range(point.steps)]
        _, cache = model.run_with_cache(TEXT, names=addresses)
        axes = list(point.axes[1:])
        values = cache[addresses[0]][0]
        if point.steps > 1:
            values, axes = torch.stack([cache[address][0] for address in addresses]), ["step", *axes]
        got = run.array(record["array"])
        if record["part"]:
            values = (
                values[int(record["part"].split()[-1]) :: 2]
                if "map" in axes
                else values[int(record["part"].split()[-1])][None]
            )
            axes = ["head" if axis == "map" else axis for axis in axes] if "map" in axes else ["one", *axes[1:]]
        for axis in [axis for axis in axes if f"norm over {axis}" in " ".join(record["notes"])]:
            values = values.square().sum(axes.index(axis)).sqrt()
            axes.remove(axis)
        for axis in [axis for axis in axes if f"mean over {axis}" in " ".join(record["notes"])]:
            values = values.sum(axes.index(axis)) / values.shape[axes.index(axis)]
            axes.remove(axis)
        wanted = [axis for axis in " × ".join(record["axes"]).split(" × ") if axis != "one"]
        flat = values.reshape([size for axis, size in zip(axes, values.shape, strict=True) if axis != "one"])
        axes = [axis for axis in axes if axis != "one"]
        assert sorted(wanted) == sorted(axes), (record["point"], wanted, axes)
        expected = flat.permute([axes.index(axis) for axis in wanted]).reshape(got.shape).double().numpy()
        seen = np.isfinite(got)
        np.testing.assert_allclose(got[seen], expected[seen], rtol=1e-4, atol=1e-5)
        if record["axes"][1:] == ["query", "key"] and got.shape[1] == got.shape[2]:
            causal = run.layer(record["layer"])["pattern"]["causal"]
            assert np.array_equal(seen[0], np.isfinite(expected[0]) & (np.tri(LENGTH, dtype=bool) if causal else True))


def test_a_new_role_needs_no_entry() -> None:
    assert title_of("unheard_of")[0] == "Unheard of" and title_of("lambda")[0] == "λ"
    assert not set(WORDS) & ORDINARY


def test_edits_show_in_what_is_kept(tmp_path: Path) -> None:
    """A run keeps what the model went on with."""
    store, name = RunStore(tmp_path), "blocks.1.attn.normalise.hook_block_gate"
    model = models.build("landmark")
    plain, edited = (
        trace_run(model, TEXT, store, interventions=each).array(f"quantity.{name}")
        for each in ([], [Scale(name, factor=0.5)])
    )
    np.testing.assert_allclose(edited, 0.5 * plain, rtol=1e-6)


def test_maps_of_a_long_text_are_pooled_and_larger_ones_left_out_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, model, text = RunStore(tmp_path), models.build("bam"), "a dragon hatches; dragons watch." * 4
    run = trace_run(model, text, store, layers=[1])
    (kept,) = run_quantities(run.manifest)
    assert kept.layer == 1 and run.array(kept.array).shape == (4, 96, 96) and "pooled" in " ".join(kept.notes)
    _, cache = model.run_with_cache(text, names="blocks.1.attn.bias.bam.hook_bias")
    exact = cache["blocks.1.attn.bias.bam.hook_bias"][0, 2].masked_fill(torch.ones(128, 128).triu(1) > 0, 0).numpy()
    bins = np.arange(97) * 128 // 96
    part = exact[bins[70] : bins[71], bins[40] : bins[41]]
    assert run.array(kept.array)[2, 70, 40] == pytest.approx(part.flat[np.abs(part).argmax()], rel=1e-5)
    monkeypatch.setattr(quantity_arrays, "LARGEST", 1000)
    (left_out,) = run_quantities(trace_run(model, text, store, layers=[1]).manifest)
    assert left_out.array == "" and "too many to keep" in left_out.why


def test_both_maps_of_a_head_whatever_their_order(tmp_path: Path) -> None:
    """Pairs that follow each other, and all first maps before all second ones."""
    for pairing in ("adjacent", "halves"):
        site = AttentionConfig(n_heads=3, d_head=4, position="rope", reweight=DifferentialConfig(pairing))
        model = LanguageModel(LanguageModelConfig(1, 24, mixer=site, init_std=0.5))
        run = trace_run(model, TEXT, RunStore(tmp_path))
        first, second = (run.array(f"quantity.blocks.0.attn.hook_raw_pattern.{i}") for i in range(2))
        _, cache = model.run_with_cache(TEXT, names="blocks.0.attn.*")
        weight = cache["blocks.0.attn.reweight.differential.hook_lambda"][0].transpose(0, 1).numpy()
        difference = np.nan_to_num(first) - weight * np.nan_to_num(second)
        np.testing.assert_allclose(difference, cache["blocks.0.attn.hook_pattern"][0].numpy(), atol=1e-6)


def test_more_maps_than_are_kept_are_said() -> None:
    made = parts_of(torch.rand(11, 4, 4), ["relation", "query", "key"], "relations", 2)
    assert len(made) == 8 and "the first 8 of 11" in made[0][1].notes


def test_short_texts_lack_what_they_do_not_reach(tmp_path: Path) -> None:
    for name in ("combiner", "landmark", "titans-mac"):
        run = trace_run(models.build(name), "ab", RunStore(tmp_path))
        assert all(0 not in run.array(record["array"]).shape for record in run.manifest["quantities"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"axes": ["a"]}, "three axes"),
        ({"array": "tokens"}, "names the array"),
        ({"layer": -1}, "layer -1"),
        ({"point": None}, "point None"),
    ],
)
def test_a_broken_record_is_refused(change: dict[str, object], words: str, tmp_path: Path) -> None:
    run = trace_run(models.build("denseformer"), TEXT, RunStore(tmp_path))
    manifest = {**run.manifest, "quantities": [{**run.manifest["quantities"][0], **change}]}
    with pytest.raises(RunError, match=words):
        check_manifest(manifest)
