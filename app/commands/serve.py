"""`workbench serve`: the dashboard."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from app.commands._options import RunsFolder, existing_folder

PANEL = "Look inside"


def command(
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that others can reach needs --token and --name.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8050,
    runs: RunsFolder = None,
    models: Annotated[
        Path | None,
        existing_folder(
            "Folder of model folders to offer beside the shipped models; $WORKBENCH_MODELS when not given."
        ),
    ] = None,
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
    from app.model_service import open_dashboard

    if models is not None:
        os.environ["WORKBENCH_MODELS"] = str(models.resolve())  # so that a page's Python finds them by the same names

    opens = not no_browser and has_screen()
    ended = open_dashboard(
        host, port, runs, token=token, allowed_hosts=tuple(name or ()), open_browser=opens, models_root=models
    )
    if ended is False:
        # A thread in the middle of a model's step would abort the interpreter while it takes itself down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def has_screen() -> bool:
    """Whether a browser window can open. Without one, Python would start a text browser inside this terminal."""
    return not sys.platform.startswith("linux") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
