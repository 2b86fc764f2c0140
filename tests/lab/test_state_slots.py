"""Every state of every layer, and what it still answers, as a run's factors tell it: against the model's own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import models
from models.architecture_record import ARCHITECTURES
from probes.state_tools import retention_matrix
from workbench.instrument.errors import HookError
from workbench.instrument.interventions import EditState
from workbench.lab.factors import FactorError, LayerFactors
from workbench.lab.linear_state import LinearState
from workbench.lab.run_format import RunError, check_trace
from workbench.lab.runs import RunStore
from workbench.lab.trace import trace_run

LENGTH = 11
TOKENS = torch.arange(LENGTH)[None] * 5 % 17

models.list_models()  # registers all
STATEFUL = sorted(name for name, record in ARCHITECTURES.items() if record.family not in ("attention", "depth"))


@pytest.mark.parametrize("name", STATEFUL)
def test_every_state_and_its_retention_are_the_models_own(name: str, tmp_path: Path) -> None:
    """One layer of each kind: every slot after every token, and the retention matrix where keys can be asked for."""
    model = models.build(name).double()  # memories that learn amplify differences of rounding
    run = trace_run(model, TOKENS, RunStore(tmp_path))
    kinds = {run.layer(layer)["kind"]: layer for layer in range(model.n_layers)}
    for layer in kinds.values():
        factors = LayerFactors.from_run(run, layer)
        points = {
            p.name.rsplit(".hook_", 1)[-1]: p for p in model.hook_points.points.values() if p.layer_index == layer
        }
        carried = [name for name, point in points.items() if point.role == "state"]
        assert sorted(slot["name"] for slot in factors.slots) == sorted(carried)  # none is left out
        for slot in factors.slots:
            truth = model.states(TOKENS, range(LENGTH), layers=layer, slot=slot["name"])[layer][0].numpy(force=True)
            by_head = truth.swapaxes(0, 1) if "head" in points[slot["name"]].axes else truth[None]
            assert list(by_head.shape[2:]) == slot["shape"][1:] and len(slot["axes"]) == len(slot["shape"])
            for head in range(factors.n_heads):
                expected = by_head[min(head, len(by_head) - 1)].reshape(LENGTH, -1)
                view = factors.slot(slot["name"])
                found = np.stack([view.state(head, t).ravel() for t in range(LENGTH)])
                tolerance = 1e-6 * max(1e-3, np.abs(expected).max())
                np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
                np.testing.assert_allclose(
                    view.state_norms(head), np.linalg.norm(expected, axis=1), rtol=1e-5, atol=tolerance
                )
                assert view.state(head, 3).size == 1 or np.allclose(
                    view.state_entry(head, 0, 0), expected[:, 0], atol=tolerance
                )
        if factors.slots:
            same_retention(model, layer, factors)


def same_retention(model: models.LanguageModel, layer: int, factors: LayerFactors) -> None:
    """Equal to the model's, or refused in words: where there are no keys, and where the model alone can be asked, if at all."""
    try:
        found = np.stack([factors.retention(head) for head in range(factors.n_heads)])
    except FactorError as refused:
        if "answers no key by a product" in str(refused):
            if not hasattr(model.mixers[layer], "recall"):
                with pytest.raises(HookError, match="cannot be asked for keys"):
                    retention_matrix(model, TOKENS, layer)
            return
        assert "stores no keys" in str(refused)
        if hasattr(model.mixers[layer], "memory_points"):  # they are no factors of its runs
            return
        with pytest.raises(HookError, match="does not store values under keys"):
            retention_matrix(model, TOKENS, layer)
        return
    expected = retention_matrix(model, TOKENS, layer).cosine[0].numpy(force=True)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    part = factors.retention(1, [4, 9], [0, 7, 8])
    assert np.array_equal(part, found[1][[4, 9]][:, [0, 7, 8]], equal_nan=True) and np.isnan(part[0, 1:]).all()


@pytest.mark.parametrize("decay", ["none", "scalar", "rows", "reset"])
def test_answers_without_states_are_those_of_the_recurrence(decay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the recurrence token by token, across blocks, from the first token and from a later one."""
    monkeypatch.setattr("workbench.lab.linear_state.BLOCK", 7)
    draw = np.random.default_rng(5)
    length, k, v = 40, 4, 3
    key, value, write = draw.normal(size=(length, k)), draw.normal(size=(length, v)), draw.uniform(size=length)
    log_decay = {"none": None, "scalar": -draw.uniform(size=length), "rows": -draw.uniform(size=(length, k))}.get(decay)
    if decay == "reset":
        log_decay = np.where(np.arange(length) == 17, -np.inf, -0.1)
    kept = np.ones(length) if log_decay is None else np.exp(log_decay)
    state, asked, expected = np.zeros((k, v)), draw.normal(size=(5, k)), []
    for t in range(length):
        state = kept[t][..., None] * state + write[t] * np.outer(key[t], value[t])
        expected.append(asked @ state)
    linear = LinearState(key, value, write, log_decay)
    for positions in (range(length), [3], [0, 1, 16, 17, 18, 39], [39]):
        for position, found in zip(positions, linear.recalled(asked, positions), strict=True):
            np.testing.assert_allclose(found, expected[position], atol=1e-12)


def test_states_that_are_not_there_are_named(tmp_path: Path) -> None:
    factors = LayerFactors.from_run(trace_run(models.build("lstm"), TOKENS, RunStore(tmp_path)), 0)
    with pytest.raises(FactorError, match=r"layer 0 \(lstm\) carries no 'cc'\. Did you mean 'c'\?"):
        factors.slot("cc")
    assert factors.slot("h") is factors and [slot["name"] for slot in factors.slots] == ["h", "c"]


def test_an_edit_of_a_normaliser_reaches_the_run(tmp_path: Path) -> None:
    """The layer is then stored as it was, with all of its states."""
    model = models.build("mlstm")
    edit = EditState("blocks.1.mixer.hook_normaliser", after=8, operation="scale", value=0.0)
    run = trace_run(model, TOKENS, RunStore(tmp_path), interventions=[edit])
    factors = LayerFactors.from_run(run, 1)
    assert run.layer(1)["form"] == "dense" and [slot["name"] for slot in factors.slots] == ["state", "normaliser"]
    assert not factors.slot("normaliser").state(0, 8).any() and factors.slot("normaliser").state(0, 7).any()
    assert factors.state(0, 8).any()


def test_rows_after_which_no_state_is_stored_are_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.lab.trace.STORED_STATE_NUMBERS", 3 * 5 * 5 * 8 * 6)
    factors = LayerFactors.from_run(trace_run(models.build("loglinear-gdn"), TOKENS, RunStore(tmp_path)), 0)
    stored = factors.state_positions()
    assert 1 < len(stored) < LENGTH
    known = np.isfinite(factors.retention(0)).any(1)
    assert np.flatnonzero(known).tolist() == stored.tolist()


@pytest.mark.parametrize(
    "slot, words",
    [
        ({"name": "c", "axes": ["head"]}, "lacks its name, axes or shape"),
        (
            {"name": "c", "axes": ["head"], "shape": [3], "array": "layer.1.states.c"},
            "expected one of layer.0.states, layer.0.states.c",
        ),
        ("c", "lacks its name, axes or shape"),
    ],
)
def test_a_manifest_with_a_wrong_state_is_refused(slot: object, words: str, tmp_path: Path) -> None:
    run = trace_run(models.build("lstm"), TOKENS, RunStore(tmp_path))
    manifest = {**run.manifest, "layers": [{**run.layer(0), "states": [slot]}]}
    with pytest.raises(RunError, match=words):
        check_trace(manifest)
