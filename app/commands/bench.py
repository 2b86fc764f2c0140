"""`workbench bench`: the benchmark suite of a source checkout."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from app.commands._console import Failure
from app.commands._options import AsJson

PANEL = "Make"


def command(
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Only this benchmark; may be repeated.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure this machine: ratios beside their goals.

    The suite lives beside the tests, so it needs a source checkout. What it measures is reported, never judged: speed
    depends on the machine.
    """
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / "tests" / "benchmarks" / "__main__.py").is_file():
        raise Failure(
            "the benchmark suite is not part of an installed copy", "Run it from a source checkout: make bench"
        )
    chosen = [word for name in only or () for word in ("--only", name)]
    options = [*chosen, "--json"] if as_json else chosen
    done = subprocess.run([sys.executable, "-m", "tests.benchmarks", *options], cwd=checkout, check=False)
    raise typer.Exit(done.returncode)
