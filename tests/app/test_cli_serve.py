"""`workbench serve` hands its options to the dashboard; the dashboard itself is tested where it lives."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    fake = ModuleType("app.dashboard")
    fake.serve = lambda **options: calls.append(options)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "app.dashboard", fake)
    monkeypatch.delenv("WORKBENCH_TOKEN", raising=False)
    return calls


def test_defaults_stay_on_this_computer(workbench: Callable, served: list[dict[str, Any]]) -> None:
    assert workbench("serve").code == 0
    assert served == [{"host": "127.0.0.1", "port": 8050, "runs": None, "token": None, "open_browser": True}]


def test_options_reach_the_dashboard(
    workbench: Callable, served: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--host", "0.0.0.0", "--port", "0", "--runs", tmp_path, "--no-browser")
    assert workbench("serve", *options, "--token", "secret").code == 0
    expected = {"host": "0.0.0.0", "port": 0, "runs": tmp_path, "token": "secret", "open_browser": False}
    monkeypatch.setenv("WORKBENCH_TOKEN", "from the environment")
    assert workbench("serve", *options).code == 0
    assert served == [expected, expected | {"token": "from the environment"}]


def test_a_port_that_is_no_port_is_a_usage_error(workbench: Callable, served: list[dict[str, Any]]) -> None:
    assert workbench("serve", "--port", "70000").code == 2
    assert served == []


def test_a_refusal_of_the_dashboard_is_one_line(
    workbench: Callable, served: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: Any) -> None:
        raise ValueError("0.0.0.0 can be reached by others: give a token")

    monkeypatch.setattr(sys.modules["app.dashboard"], "serve", refuse)
    refused = workbench("serve", "--host", "0.0.0.0")
    assert refused.code == 1 and refused.err == "error: 0.0.0.0 can be reached by others: give a token\n"
