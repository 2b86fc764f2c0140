"""`workbench serve`: the dashboard."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from app.commands._options import RunsFolder, open_store

PANEL = "Look inside"


def command(
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that others can reach needs --token and --name.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8050,
    runs: RunsFolder = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the address.")] = False,
    token: Annotated[
        str | None,
        typer.Option(help="Secret that visitors must present.", envvar="WORKBENCH_TOKEN", show_default=False),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(help="Host name by which others reach this computer. Repeatable.", show_default=False),
    ] = None,
) -> None:
    """Open the dashboard in the browser.

    It needs no network and answers to this computer alone, unless `--host` says otherwise. Ctrl-C stops it.
    """
    from app.dashboard import serve
    from app.local_models import LocalModels
    from workbench.lab.jobs import JobQueue

    store, jobs = open_store(runs), JobQueue()
    port = port or free_port(host)
    if not no_browser:
        reachable = "localhost" if host in ("127.0.0.1", "::1", "0.0.0.0", "::") else host
        open_when_ready(f"http://{reachable}:{port}/" + (f"?token={token}" if token else ""))
    serve(store, jobs, LocalModels(store, jobs), host=host, port=port, token=token, allowed_hosts=tuple(name or ()))


def free_port(host: str) -> int:
    """A port that nothing listens on just now."""
    import socket

    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host.strip("[]"), 0))
        return probe.getsockname()[1]


def open_when_ready(address: str) -> None:
    """Open the browser once the dashboard answers. Does nothing where there is no screen to open one on."""
    import threading
    import time
    import urllib.request
    import webbrowser
    from urllib.error import HTTPError, URLError

    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return

    def wait_and_open() -> None:
        for _ in range(100):
            try:
                urllib.request.urlopen(address, timeout=5).close()
            except HTTPError:  # it answers, and what it has to say the browser can show
                break
            except URLError:
                time.sleep(0.1)
            else:
                break
        else:
            return
        webbrowser.open(address)

    threading.Thread(target=wait_and_open, name="open-browser", daemon=True).start()
