"""`workbench serve`: the dashboard."""

from __future__ import annotations

from typing import Annotated

import typer

from app.commands._options import RunsFolder

PANEL = "Look inside"


def command(
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that others can reach needs --token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8050,
    runs: RunsFolder = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the address.")] = False,
    token: Annotated[
        str | None,
        typer.Option(help="Secret that visitors must present.", envvar="WORKBENCH_TOKEN", show_default=False),
    ] = None,
) -> None:
    """Open the dashboard in the browser.

    It needs no network and answers to this computer alone, unless --host says otherwise.
    """
    from app.dashboard import serve

    serve(host=host, port=port, runs=runs, token=token, open_browser=not no_browser)
