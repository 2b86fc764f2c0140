"""Running from the command line what the dashboard's pages measure: the same jobs, here in the foreground, and their panels as tables."""

from __future__ import annotations

import threading
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from app.commands._console import (
    Failure,
    add_row,
    four_digits,
    interruptible,
    new_table,
    note,
    print_json,
    progress_bar,
    stdout,
)
from app.commands._options import complete_models, open_store
from app.view_state import ViewState

Model = Annotated[
    str, typer.Argument(help="A BDH, from `workbench models`, or a folder of one.", autocompletion=complete_models)
]
Figure = Annotated[
    Path | None, typer.Option(help="Also draw it, as one HTML file.", dir_okay=False, show_default=False)
]
At = Annotated[int | None, typer.Option(help="After which token; the last when not given.", min=0, show_default=False)]

SHOWN = 12
"""Lines of a table that are printed; JSON has all."""


class Foreground:
    """Stands in for the job queue: what is submitted runs at once, in this thread, with its progress on a bar."""

    def __init__(self, progress: Callable[[float, str], None], cancel: threading.Event) -> None:
        self.progress, self.cancel = progress, cancel

    def submit(self, title: str, function: Callable[..., Any], *, key: str | None = None, **arguments: Any) -> Any:
        """Run `function(job, **arguments)`; the job that comes back has its result."""
        job = SimpleNamespace(title=title, progress=self.report, check_cancelled=self.check, id=key, result=None)
        job.result = function(job, **arguments)
        return job

    def report(self, fraction: float, message: str = "") -> None:
        self.check()
        self.progress(fraction, message)

    def check(self) -> None:
        from probes.progress import MeasurementCancelled

        if self.cancel.is_set():
            raise MeasurementCancelled("stopped")


class Named:
    """The models of the registry, and model folders that were named on the command line."""

    def __init__(self, *names: str) -> None:
        self.names, self._models = names, dict[str, Any]()

    def list_models(self) -> Sequence[Mapping[str, Any]]:
        """As `app.services.ModelCatalogue`."""
        from models.registry import list_models

        known = [{"name": r.name, "title": r.title, "architecture": r.architecture} for r in list_models()]
        folders = [name for name in self.names if Path(name).is_dir()]
        return [*known, *({"name": n, "title": n, "architecture": self.load(n).architecture} for n in folders)]

    def load(self, name: str) -> Any:
        """The model of that name, opened once."""
        import models

        if name not in self._models:
            self._models[name] = models.load(name)
        return self._models[name]


def measure(start: Callable[[Any], Any], out: Path | None, names: Sequence[str], title: str) -> tuple[Any, Any]:
    """Run what `start(services)` submits, and open the run that it made: (services, run). Failure when it was stopped."""
    from app.services import Services
    from probes.progress import MeasurementCancelled

    with interruptible() as cancel, progress_bar(title) as progress:
        services: Any = Services(open_store(out), Foreground(progress, cancel), Named(*names))  # type: ignore[arg-type]
        try:
            job = start(services)
        except MeasurementCancelled:
            raise Failure("stopped before the end", "Nothing was stored.") from None
    return services, services.open_run(job.result)


def report(
    services: Any, view: ViewState, result: Any, panels: Sequence[Any], *, as_json: bool, figure: Path | None
) -> None:
    """Print a measurement as its panels show it: tables and facts, or JSON with every line; draw them into one HTML file if asked."""
    scene = services.scene(view.change(result=result.id))
    if figure is not None:
        write_figures(figure, result.title, [drawn(panel, scene) for panel in panels])
    if as_json:
        found = {panel.id: tabulated(panel, scene) for panel in panels}
        asked = {key: result.manifest[key] for key in ("settings", "results")}
        print_json({"id": result.id, "path": result.path, **asked, "panels": found})
        return
    for panel in panels:
        show(panel, scene)
    note(f"Stored as {result.id} in {services.store.root}; `workbench serve` shows it.")


def tabulated(panel: Any, scene: Any) -> dict[str, Any]:
    """A panel's table and facts as plain data; why it has none, where it has none."""
    from app.panels.base import READABLE_ERRORS

    try:
        panel.check(scene)
        columns, rows = panel.table(scene)
        return {
            "title": panel.title,
            "columns": columns,
            "rows": [list(row) for row in rows],
            "facts": panel.facts(scene),
        }
    except READABLE_ERRORS as reason:
        return {"title": panel.title, "nothing": str(reason)}


def show(panel: Any, scene: Any) -> None:
    """One panel as a table, its first lines only, and its facts."""
    from rich.text import Text

    found = tabulated(panel, scene)
    stdout().print(Text(found["title"], style="bold"))
    if "nothing" in found:
        note(f"  {found['nothing']}")
        return
    columns, rows = found["columns"], found["rows"]
    numbers = [c for i, c in enumerate(columns) if rows and all(isinstance(row[i], float) for row in rows)]
    table = new_table(*columns, numbers=numbers)
    for row in rows[:SHOWN]:
        add_row(table, *(four_digits(cell) if isinstance(cell, float) else cell for cell in row))
    stdout().print(table)
    if len(rows) > SHOWN:
        note(f"  … and {len(rows) - SHOWN:,} more lines, with --json")
    for fact in found["facts"]:
        note(f"  {fact}")


def drawn(panel: Any, scene: Any) -> Any:
    """A panel's figure in the light scheme with its title; None where it has none."""
    from app.panels.base import READABLE_ERRORS, FigurePanel, ImagePanel
    from app.theme import LIGHT

    if not isinstance(panel, FigurePanel):
        return None
    try:
        panel.check(scene)
        figure = panel.figure(scene, LIGHT)
        if isinstance(panel, ImagePanel):  # the dashboard's address of the picture means nothing in a file
            figure.layout.images[
                0
            ].source = f"data:image/png;base64,{b64encode(panel.picture(scene, LIGHT, 512)).decode()}"
    except READABLE_ERRORS:
        return None
    return figure.update_layout(title={"text": panel.title}, height=max(360, panel.height), margin={"t": 60})


def write_figures(path: Path, title: str, figures: Sequence[Any]) -> None:
    """All figures in one HTML file that needs nothing else. Failure where none could be drawn or the file is there already."""
    from html import escape

    kept = [figure for figure in figures if figure is not None]
    if not kept:
        raise Failure("there is nothing to draw", "Leave --figure out to see why.")
    if path.exists():
        raise Failure(f"{path} is there already", "Name another file.")
    parts = [figure.to_html(full_html=False, include_plotlyjs=number == 0) for number, figure in enumerate(kept)]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><body>'
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(f"{head}<h1>{escape(title)}</h1>{''.join(parts)}</body></html>", encoding="utf-8")
    partial.replace(path)
