"""What every panel must do: over a traced run, and over a measurement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from app.pages import find_pages
from app.panels.base import FigurePanel, Panel, PicturePanel, StripPanel
from app.services import Scene, Services
from app.theme import DARK, LIGHT
from app.view_state import ViewState

PANELS = {panel.id: panel for page in find_pages() for panel in page.panels}


def check_panel(panel: Panel, scene: Scene, services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    """One panel over a traced run: drawn in both schemes, with a table, a summary and Python that makes its array."""
    values = panel.values(scene)
    if isinstance(panel, FigurePanel):
        assert all(panel.figure(scene, theme).to_json() for theme in (LIGHT, DARK))
    if isinstance(panel, PicturePanel):
        assert panel.picture(scene, LIGHT, 64)[:4] == b"\x89PNG"
    headers, rows = panel.table(scene)
    assert all(len(line) == len(headers) for line in rows)
    assert panel.summary(scene) and all(isinstance(fact, str) for fact in panel.facts(scene))
    monkeypatch.setenv("WORKBENCH_RUNS", str(services.store.root))
    found: dict[str, Any] = {}
    exec(panel.snippet(scene), found)
    np.testing.assert_allclose(np.asarray(found["values"]), values, rtol=1e-5, atol=1e-7)


def check_panels(
    services: Services,
    view: ViewState,
    names: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    unrun: Sequence[str] = (),
) -> None:
    """Every panel draws in both schemes, has a table, and its Python makes its array (`unrun`: too slow to run once more here)."""
    monkeypatch.setenv("WORKBENCH_RUNS", str(services.store.root))
    scene = services.scene(view)
    for name in names:
        panel = PANELS[name]
        panel.check(scene)
        values = panel.values(scene)
        assert np.isfinite(values).any(), name
        if isinstance(panel, StripPanel):
            assert len(panel.colours(scene, LIGHT)["values"]) == scene.n_tokens
        else:
            assert all(len(panel.figure(scene, theme).to_json()) < 400_000 for theme in (LIGHT, DARK)), name
        headers, rows = panel.table(scene)
        lines = list(rows)
        assert lines and all(len(line) == len(headers) for line in lines), name
        assert panel.facts(scene) is not None and panel.source(scene) is not None
        code, found = panel.snippet(scene), {}  # type: ignore[var-annotated]
        compile(code, name, "exec")
        if name in unrun:
            continue
        exec(code, found)
        np.testing.assert_allclose(np.asarray(found["values"]), values, rtol=1e-5, atol=1e-7, err_msg=code)
