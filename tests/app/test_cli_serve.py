"""`workbench serve`: its options reach the dashboard, and the real command answers a browser with the shipped models."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

import app.dashboard
from app.commands.serve import free_port, open_when_ready
from app.local_models import LocalModels

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The calls that reach the dashboard, which is not started."""
    calls: list[dict[str, Any]] = []

    def record(store: Any, jobs: Any, models: Any, **options: Any) -> None:
        calls.append({"root": store.root, "models": type(models), **options})

    monkeypatch.setattr(app.dashboard, "serve", record)
    for name in ("WORKBENCH_TOKEN", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_defaults_stay_on_this_computer(workbench: Callable, served: list[dict[str, Any]]) -> None:
    assert workbench("serve").code == 0
    expected = {"host": "127.0.0.1", "port": 8050, "token": None, "allowed_hosts": ()}
    assert served == [expected | {"root": Path(os.environ["WORKBENCH_RUNS"]), "models": LocalModels}]


def test_options_reach_the_dashboard(
    workbench: Callable, served: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--host", "0.0.0.0", "--port", "8123", "--runs", tmp_path, "--name", "box", "--name", "box.local")
    assert workbench("serve", *options, "--token", "secret").code == 0
    monkeypatch.setenv("WORKBENCH_TOKEN", "from the environment")
    assert workbench("serve", *options).code == 0
    expected = {"host": "0.0.0.0", "port": 8123, "token": "secret", "allowed_hosts": ("box", "box.local")}
    expected |= {"root": tmp_path, "models": LocalModels}
    assert served == [expected, expected | {"token": "from the environment"}]


def test_port_zero_takes_a_free_one(workbench: Callable, served: list[dict[str, Any]]) -> None:
    assert workbench("serve", "--port", "0").code == 0
    assert 1024 < served[0]["port"] < 65536
    assert workbench("serve", "--port", "70000").code == 2


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


@contextmanager
def answering(status: int) -> Iterator[str]:
    """A web server that answers every request with this status."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            return

    server = HTTPServer(("127.0.0.1", free_port("127.0.0.1")), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [200, 403])
def test_the_browser_opens_once_the_dashboard_answers(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    opened: list[str] = []
    done = threading.Event()
    monkeypatch.setattr(webbrowser, "open", lambda address: (opened.append(address), done.set()))
    monkeypatch.setenv("DISPLAY", ":0")
    with answering(status) as address:
        open_when_ready(address)
        assert done.wait(10) and opened == [address]


def test_no_browser_opens_without_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    open_when_ready("http://127.0.0.1:1/")
    assert threading.active_count() == before


def test_the_real_command_serves_a_page_and_stops_on_ctrl_c(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "app.cli", "serve", "--port", "0", "--no-browser", "--runs", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = re.search(r"http://\S+", process.stdout.readline())
        assert address is not None, process.communicate(timeout=10)[1]
        with urllib.request.urlopen(address[0], timeout=20) as reply:
            assert reply.status == 200 and b"_dash-config" in reply.read()
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.communicate()
