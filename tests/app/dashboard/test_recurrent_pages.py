"""Every architecture that carries a state, on the Attention and State pages: each panel draws, or says in words why it does not apply.

No page knows an architecture: what is drawn follows from what the run's layers declare. `SAID` is the whole list of what is not
drawn, so that a panel that stops drawing is noticed as much as one that fails.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import models
from app.page import slot_choice
from app.pages import attention as attention_page
from app.pages import state as state_page
from app.panels.base import NothingToShow, PicturePanel, StripPanel
from app.panels.words import memory_words, pattern_words, slot_words, state_axes
from app.services import Services
from app.theme import theme_called
from app.view_state import ViewState
from models.architecture_record import ARCHITECTURES
from workbench.lab.jobs import JobQueue
from workbench.lab.runs import RunStore
from workbench.lab.score_maps import score_labels
from workbench.lab.trace import trace_run

TEXT = "watch it hatch"
PANELS = {panel.id: panel for panel in (*attention_page.PAGE.panels, *state_page.PAGE.panels)}
OF_OTHER_MEMORIES = {"cache-keys", "cache-values", "neurons-x", "neurons-y", "top-neurons"}

models.list_models()  # registers all
STATEFUL = sorted(name for name, record in ARCHITECTURES.items() if record.family not in ("attention", "depth"))

NO_KEYS = {"retention": "It cannot be asked for a key"}
KEEPS = {"decay": "Nothing is forgotten"}
NO_DECAY = {"decay": "No single decay per token"}
VECTOR = {"spectrum": "A vector has one direction"}
CELL = {**VECTOR, **NO_DECAY, **NO_KEYS}
SAID: dict[str, dict[str, str]] = {
    **dict.fromkeys(("aaren normaliser", "mlstm normaliser"), VECTOR),
    **dict.fromkeys(("bdh", "bdh-paper", "deltanet"), KEEPS),
    **dict.fromkeys(("gru state", "paragru state", "rg_lru state"), CELL),
    **dict.fromkeys((f"{cell} {slot}" for cell in ("lstm", "paralstm") for slot in "hc"), CELL),
    **{f"slstm {slot}": CELL for slot in "hcnm"},
    "elman state": {**CELL, "signals": "No other signals"},
    "attention state": {**NO_DECAY, **NO_KEYS, "signals": "No other signals"},
    "mamba state": {**NO_DECAY, **NO_KEYS},
    "infini state": NO_DECAY,
    "infini normaliser": {**NO_DECAY, **VECTOR},
    **dict.fromkeys(("miras state", "titans state", "titans momentum"), NO_KEYS),
    "titans-linear titans state": {},
    "titans-linear titans momentum": {},
}
"""{kind of layer and name of its state, or the architecture where kinds are alike: {panel: the title of what it says instead}}.

A kind that is not listed draws everything, a layer of attention is only asked for its pattern.
"""


def expected(architecture: str, kind: str, slot: str) -> dict[str, str]:
    keys = (f"{architecture} {kind} {slot}", architecture if not slot else "", f"{kind} {slot}")
    said = next((SAID[key] for key in keys if key in SAID), {})
    return said if "spectrum" in said else {**said, "state-over-time": "A matrix is shown one token at a time"}


@pytest.mark.parametrize("name", STATEFUL)
def test_every_panel_draws_every_state_or_says_why_not(name: str, tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    run = trace_run(models.build(name), TEXT, store)
    services = Services(store, JobQueue(), None)  # type: ignore[arg-type]
    kinds = {layer["kind"]: layer["layer"] for layer in reversed(run.layers)}
    light = theme_called("light")
    for kind, layer in kinds.items():
        record = run.layer(layer)
        slots = [slot["name"] for slot in record.get("states") or []] or [""]
        for slot in slots:
            view = ViewState(
                run=run.id, layer=layer, slot=slot, head=min(1, record["n_heads"] - 1), tracked=((1, 0), (0, 0))
            )
            scene = services.scene(view)
            said = {}
            for panel in PANELS.values():
                try:
                    if isinstance(panel, StripPanel):
                        assert len(panel.colours(scene, light)["values"]) == len(TEXT)
                        continue
                    assert panel.figure(scene, light).data, panel.id
                    if isinstance(panel, PicturePanel):
                        assert panel.picture(scene, light, 64)[:4] == b"\x89PNG"
                        assert panel.reading(scene, 0, 0).rows
                    names: dict[str, object] = {"run": run, "np": np, "factors": scene.factors()}
                    exec(panel.snippet_body(scene), names)
                    np.testing.assert_array_equal(names["values"], panel.values(scene))
                    assert panel.facts(scene) and len(panel.summary(scene)) > 10
                except NothingToShow as reason:
                    assert len(str(reason)) > 15 and str(reason).endswith("."), panel.id
                    said[panel.id] = reason.title
            if record["form"] != "softmax":
                assert OF_OTHER_MEMORIES - set(said) in (set(), OF_OTHER_MEMORIES - {"cache-keys", "cache-values"})
            if record["form"] == "softmax" or record["state"] is None:
                continue
            without = {} if score_labels(record) else {"score-row": "No scores in this layer"}
            assert {panel: title for panel, title in said.items() if panel not in OF_OTHER_MEMORIES} == {
                **without,
                **expected(name, kind, slot),
            }
            words = [*(state_axes(entry) for entry in scene.slots), [memory_words(record)], pattern_words(record)]
            assert not any(
                "state_" in word or "hidden_" in word for some in words for word in some
            )  # axes are called by what they are
            labels = [signal["label"] for signal in record["signals"]]
            assert len(set(labels)) == len(labels)
            chooser = slot_choice(scene)
            assert [entry["label"] for each in chooser for entry in each.data] == [
                slot_words(s) for s in slots if len(slots) > 1
            ]
            unit = "Jacobian norm" if record["pattern"].get("kind") == "jacobian" else "weight"
            assert PANELS["pattern"].colours(scene, light).unit == unit  # type: ignore[attr-defined]
            assert ("Jacobian" in " ".join(pattern_words(record))) == (unit != "weight")


def test_decays_of_rows_are_drawn_as_their_mean(tmp_path: Path) -> None:
    run = trace_run(models.build("kda"), TEXT, RunStore(tmp_path))
    scene = Services(RunStore(tmp_path), JobQueue(), None).scene(ViewState(run=run.id))  # type: ignore[arg-type]
    kept, decay = PANELS["decay"], np.exp(run.array("layer.0.log_decay"))
    assert decay.ndim == 3 and np.allclose(kept.values(scene), decay.mean(-1))
    assert any("mean over the rows" in fact for fact in kept.facts(scene))


def test_a_state_of_one_matrix_is_read_by_its_own_axes(tmp_path: Path) -> None:
    """Levels and key channels share the rows of the picture; a reading tells them apart. A state that heads share says so."""
    services = Services(RunStore(tmp_path), JobQueue(), None)  # type: ignore[arg-type]
    levels = trace_run(models.build("loglinear-gdn"), TEXT, services.store)
    scene = services.scene(ViewState(run=levels.id, head=1))
    reading = PANELS["state"].reading(scene, 7, 3)  # type: ignore[attr-defined]
    assert reading.rows[:3] == [("level", "1"), ("key channel", "2"), ("value channel", "3")]  # five key channels
    assert reading.value == scene.factors().state(1, scene.position)[7, 3]
    shared = services.scene(ViewState(run=trace_run(models.build("mamba"), TEXT, services.store).id, head=2))
    assert PANELS["state-norms"].values(shared).shape[0] == 1
    assert "one state for the whole layer" in PANELS["state"].facts(shared)
    assert memory_words(shared.layer or {}).startswith("The layer carries a matrix of 48 × 5 numbers")
    assert PANELS["state"].reading(shared, 7, 3).rows[:2] == [("channel", "7"), ("mode", "3")]  # type: ignore[attr-defined]


def test_a_vector_is_drawn_over_time(tmp_path: Path) -> None:
    """The chosen state of a cell after every token; matrices are refused there, and the page then shows the other picture."""
    services = Services(RunStore(tmp_path), JobQueue(), None)  # type: ignore[arg-type]
    run = trace_run(models.build("lstm"), TEXT, services.store)
    panel, found = PANELS["state-over-time"], {}
    for slot in ("", "c"):
        scene = services.scene(ViewState(page="state", run=run.id, layer=1, head=2, slot=slot))
        found[slot] = panel.values(scene)
        stored = run.array("layer.1.states.c" if slot else "layer.1.states")[2]  # every token of a short text
        np.testing.assert_array_equal(found[slot], stored.T)
        page = str(state_page.PAGE.build(services, scene))
        assert "panel-state-over-time" in page and "panel-spectrum" not in page and "panel-state'" not in page
    assert not np.allclose(found[""], found["c"])
    followed = services.scene(ViewState(run=run.id, tracked=((3, 0),)))
    assert PANELS["tracked"].table(followed)[0] == ["token", "[3]"]
