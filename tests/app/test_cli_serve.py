"""`workbench serve`: its options reach the dashboard, and the real command answers and stops."""

from __future__ import annotations

import inspect
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import app.model_service
from app.commands.serve import has_screen

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls that reach the dashboard, which is not started."""
    calls: list[dict[str, Any]] = []
    real = inspect.signature(app.model_service.open_dashboard)

    def record(*arguments: Any, **options: Any) -> None:
        calls.append(dict(real.bind(*arguments, **options).arguments))

    monkeypatch.setattr(app.model_service, "open_dashboard", record)
    monkeypatch.delenv("WORKBENCH_TOKEN", raising=False)
    monkeypatch.setenv("DISPLAY", ":0")
    return calls


def test_defaults_stay_on_this_computer(workbench: Callable, served: list[dict[str, Any]]) -> None:
    assert workbench("serve").code == 0
    expected = {"host": "127.0.0.1", "port": 8050, "runs": None, "token": None, "models_root": None}
    assert served == [expected | {"allowed_hosts": (), "open_browser": True}]


def test_options_reach_the_dashboard(
    workbench: Callable, served: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--host", "0.0.0.0", "--port", "0", "--runs", tmp_path, "--name", "box", "--name", "box.local")
    assert workbench("serve", *options, "--no-browser", "--token", "secret").code == 0
    monkeypatch.setenv("WORKBENCH_TOKEN", "from the environment")
    assert workbench("serve", *options, "--no-browser").code == 0
    expected = {"host": "0.0.0.0", "port": 0, "runs": tmp_path, "token": "secret", "models_root": None}
    expected |= {"allowed_hosts": ("box", "box.local"), "open_browser": False}
    assert served == [expected, expected | {"token": "from the environment"}]


def test_a_root_of_model_folders(
    workbench: Callable, served: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKBENCH_MODELS", "elsewhere")
    assert workbench("serve", "--models", tmp_path).code == 0 and served[0]["models_root"] == tmp_path
    assert os.environ["WORKBENCH_MODELS"] == str(tmp_path), "a page's Python finds the same folders"
    assert workbench("serve", "--models", tmp_path / "nowhere").code == 2


def test_a_port_that_is_no_port_is_a_usage_error(workbench: Callable, served: list[dict[str, Any]]) -> None:
    assert workbench("serve", "--port", "70000").code == 2
    assert served == []


def test_no_browser_opens_without_a_screen(
    workbench: Callable, served: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert workbench("serve").code == 0 and served[0]["open_browser"] is False
    monkeypatch.setattr(sys, "platform", "darwin")
    assert has_screen()


def test_a_public_address_without_a_token_is_refused(workbench: Callable) -> None:
    refused = workbench("serve", "--host", "0.0.0.0", "--port", "0", "--no-browser")
    assert refused.code == 1 and "token" in refused.err and "Traceback" not in refused.err


def test_a_port_in_use_is_a_failure_in_words(workbench: Callable) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        failed = workbench("serve", "--port", port, "--no-browser")
    assert failed.code == 1 and "in use" in failed.err and "Traceback" not in failed.err


def test_the_real_command_serves_a_page_and_stops_on_ctrl_c(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "app.cli", "serve", "--port", "0", "--no-browser", "--runs", str(tmp_path)]

    def hear_ctrl_c() -> None:
        """A shell's background jobs, this test perhaps among them, hand down an ignored SIGINT."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c
    )
    try:
        assert process.stdout is not None
        address = re.search(r"http://\S+", process.stdout.readline())
        assert address is not None, process.communicate(timeout=10)[1]
        with urllib.request.urlopen(address[0], timeout=60) as reply:
            assert reply.status == 200 and b"_dash-config" in reply.read()
        process.send_signal(signal.SIGINT)
        said, complaints = process.communicate(timeout=60)
        assert process.returncode == 0 and "Dashboard stopped." in said and "Traceback" not in complaints
    finally:
        process.kill()
        process.communicate()
