"""Layers that no factors determine: their patterns and states in runs, whole, in part, and on the pages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from app.panels import attention as attention_panels
from app.panels import state as state_panels
from app.panels.words import memory_words, pattern_words, state_axes
from app.services import LeastRecentlyUsed, Scene
from app.theme import theme_called
from app.view_state import ViewState
from models.attention.site import AttentionConfig
from models.language_model import LanguageModel, LanguageModelConfig
from tests.lab.dense_mixer import TanhConfig
from workbench.instrument.errors import HookError, UnknownHookPoint
from workbench.instrument.interventions import EditState
from workbench.instrument.patterns import PatternMeta
from workbench.lab import trace as trace_module
from workbench.lab.factors import FactorError, LayerFactors
from workbench.lab.pooling import max_pool_signed
from workbench.lab.run_folder import Run
from workbench.lab.runs import RunStore
from workbench.lab.trace import trace_run

TEXT = (
    "A dragon hatches, and others watch it from a distance; some of them for longer than a hundred tokens, as this one."
)
LENGTH = len(TEXT)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(3)
    model = LanguageModel(
        LanguageModelConfig(2, 12, 256, mixer=(TanhConfig(), AttentionConfig(n_heads=2, position="rope")))
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(15)
    return model


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "runs")


def scene(run: Run, **view: object) -> Scene:
    return Scene(ViewState(run=run.id, layer=0, head=1).change(**view), run, None, LeastRecentlyUsed(16), None)  # type: ignore[arg-type]


def test_a_short_text_is_stored_whole(model: LanguageModel, store: RunStore) -> None:
    """Pattern, both states at every token, signals: as the model's own."""
    run = trace_run(model, TEXT, store)
    record, factors = run.layer(0), LayerFactors.from_run(run, 0)
    expected = model.patterns(TEXT, layers=0)[0].values[0].numpy(force=True)
    assert record["form"] == "dense" and "not_stored" not in record and not run.has("layer.0.query")
    assert record["pattern"]["kind"] == "jacobian" and record["pattern"]["exact"] is False
    assert np.allclose(factors.pattern(1), expected[1], atol=1e-6)
    assert np.allclose(run.array("overview.0")[1], max_pool_signed(expected[1], 96, 96), atol=1e-6)
    assert np.allclose(run.array("received.0")[1, 0], expected[1, :, 0].mean(), atol=1e-6)
    states = model.states(TEXT, range(LENGTH), layers=0)[0][0].numpy(force=True)
    moments = model.states(TEXT, range(LENGTH), layers=0, slot="moment")[0][0].numpy(force=True)
    assert record["state"] == {"role": "state", "axes": ["head", "d_head"], "shape": [2, 3]}
    assert [slot["array"] for slot in record["states"]] == ["layer.0.states", "layer.0.states.moment"]
    assert np.allclose(factors.state(1, 7), states[7, 1][:, None]) and factors.state(1, 7).shape == (3, 1)
    assert np.allclose(run.array("layer.0.states.moment"), moments.swapaxes(0, 1))
    assert np.allclose(run.array("state_norm.0")[1], np.linalg.norm(states[:, 1], axis=1), atol=1e-6)
    _, cache = model.run_with_cache(TEXT, names="blocks.0.mixer.hook_v")
    drive = cache["blocks.0.mixer.hook_v"][0].mean(-1).T.numpy()
    assert np.allclose(run.array("layer.0.drive"), drive, atol=1e-6)
    assert [signal["label"] for signal in record["signals"]] == ["mean drive"]
    assert run.layer(1)["form"] == "softmax"
    assert trace_run(model, "a", store).array("layer.0.states").shape == (2, 1, 3)


def test_the_jacobian_is_the_derivative(model: LanguageModel) -> None:
    """The planted mixer's pattern, by autograd: what the pages show is what it says it is."""
    cell = model.mixers[0]
    u = torch.randn(6, 2, 3)

    def run(u: torch.Tensor) -> torch.Tensor:
        h, out = torch.zeros(2, 3), []
        for t in range(6):
            h = torch.tanh(u[t] + torch.einsum("hij,hj->hi", cell.recurrent.detach(), h))
            out.append(h)
        return torch.stack(out)

    jacobian = torch.autograd.functional.jacobian(run, u)
    swapped = model.run_with_cache(
        "abcdef", role="pattern", layers=0, hooks=[("blocks.0.mixer.hook_v", lambda v, hook: u[None])]
    )[1]["blocks.0.mixer.hook_pattern"]
    for head in range(2):
        expected = jacobian[:, head, :, :, head].permute(0, 2, 1, 3).flatten(2).norm(dim=-1)
        assert torch.allclose(swapped[0, head], expected, atol=1e-6)


def test_of_a_long_text_rows_and_overview_are_stored(
    model: LanguageModel, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_module, "LARGEST_PATTERN", 2 * LENGTH**2 - 1)
    monkeypatch.setattr(trace_module, "STORED_STATE_NUMBERS", 10 * (6 + 18))
    run = trace_run(model, TEXT, store)
    factors, record = LayerFactors.from_run(run, 0), run.layer(0)
    expected = model.patterns(TEXT, layers=0)[0].values[0].numpy(force=True)
    rows = run.array("layer.0.row_positions").tolist()
    assert len(rows) == 64 and rows[0] == 0 and rows[-1] == LENGTH - 1 and not run.has("layer.0.pattern")
    assert np.allclose(factors.row(1, rows[5]), expected[1, rows[5]], atol=1e-6)
    assert np.allclose(factors.pattern(0, rows[3:9], [0, 4, 5]), expected[0, rows[3:9]][:, [0, 4, 5]], atol=1e-6)
    assert np.allclose(run.array("overview.0")[1], max_pool_signed(expected[1], 96, 96), atol=1e-6)
    other = next(i for i in range(LENGTH) if i not in rows)
    with pytest.raises(
        FactorError, match=f"stores 64 of the {LENGTH} rows of its pattern and not row {other}; nearest stored"
    ):
        factors.row(0, other)
    with pytest.raises(FactorError, match="The run's pooled overview is of the whole pattern"):
        factors.offset_profile(0)
    assert record["not_stored"] == [
        f"The pattern is stored pooled, and exactly at 64 of its {LENGTH} rows.",
        f"States are stored after 10 of {LENGTH} tokens.",
    ]
    assert run.array("layer.0.states").shape == (2, 10, 3)
    picture = attention_panels.AttentionMap()
    assert "more is not stored" in " ".join(picture.facts(scene(run)))
    assert picture.picture(scene(run), theme_called("light"), 96)[:4] == b"\x89PNG"
    assert all(sentence.rstrip(".") in pattern_words(record) for sentence in record["not_stored"])


def test_of_a_very_long_text_states_are_stored(
    model: LanguageModel, store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pattern is not even computed; the run says so, and the pages explain it in words."""
    monkeypatch.setattr(trace_module, "LARGEST_PATTERN", 100)
    monkeypatch.setattr(trace_module, "LARGEST_COMPUTED", 2 * LENGTH**2 - 1)
    run = trace_run(model, TEXT, store)
    record, factors = run.layer(0), LayerFactors.from_run(run, 0)
    assert record["not_stored"] == [
        f"The pattern of 2 × {LENGTH} × {LENGTH} cells is too large to compute whole: none of it is stored."
    ]
    assert not run.has("layer.0.pattern") and not run.has("overview.0") and run.has("layer.0.states")
    assert factors.length == LENGTH and factors.state(0, 3).shape == (3, 1)
    with pytest.raises(FactorError, match="stores no pattern"):
        factors.row(0, 3)
    with pytest.raises(Exception, match="too large to compute whole"):
        attention_panels.AttentionMap().figure(scene(run), theme_called("light"))
    assert state_panels.StatePicture().shape(scene(run)) == (3, 1)


def test_pages_name_it_for_what_it_is(model: LanguageModel, store: RunStore) -> None:
    run = trace_run(model, TEXT, store)
    record = run.layer(0)
    words = pattern_words(record)
    assert any("Jacobian norms, not weights" in fact for fact in words) and not any("exact" in fact for fact in words)
    assert memory_words(record).startswith(
        "Each head carries a vector of 3 numbers (main state) and a matrix of 3 × 3 numbers (moment)"
    )
    assert [state_axes(slot) for slot in record["states"]] == [["d head"], ["row", "column"]]
    light = theme_called("light")
    for panel in (*attention_panels.PANELS, *state_panels.PANELS):
        if panel.id in (
            "decay",
            "tracked",
            "query-row",
            "spectrum",
        ):  # no decay; no entry followed; a strip has no figure; a vector
            continue
        panel.figure(scene(run), light)
        assert panel.facts(scene(run))


def test_states_by_slot_and_traced_entries(model: LanguageModel) -> None:
    with pytest.raises(UnknownHookPoint, match=r"No layer carries a state 'momemt'\. Did you mean 'moment'"):
        model.states(TEXT, 3, slot="momemt")
    traced = model.trace_state(TEXT, 0, [(0, 1), (1, 2)])
    states = model.states(TEXT, range(LENGTH), layers=0)[0]
    assert torch.equal(traced, torch.stack([states[:, :, 0, 1], states[:, :, 1, 2]], dim=-1))
    with pytest.raises(HookError, match=r"State entry \(0, 5\) is outside \(head, d_head\) = \(2, 3\) of layer 0"):
        model.trace_state(TEXT, 0, [(0, 5)])
    with pytest.raises(UnknownHookPoint, match="Layer 1 carries no recurrent state"):
        model.trace_state(TEXT, 1, [(0, 0)])


def test_an_edited_state_is_recorded(model: LanguageModel, store: RunStore) -> None:
    edit = EditState("blocks.0.mixer.hook_state", after=5, operation="scale", value=0.0)
    run = trace_run(model, TEXT, store, interventions=[edit])
    factors = LayerFactors.from_run(run, 0)
    assert run.layer(0)["overwritten"] == ["state"] and not factors.state(0, 5).any() and factors.state(0, 6).any()


def test_a_jacobian_cannot_claim_to_be_exact() -> None:
    with pytest.raises(ValueError, match=r"kind 'jacobian' does not reproduce the output\. Expected exact=False"):
        PatternMeta(kind="jacobian")
    with pytest.raises(ValueError, match=r"Unknown kind of pattern 'jacobean'\. Did you mean 'jacobian'"):
        PatternMeta(kind="jacobean", exact=False)
    assert PatternMeta(kind="jacobian", exact=False).in_words().startswith("Jacobian norms, not weights")
