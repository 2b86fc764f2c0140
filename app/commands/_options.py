"""Options that several commands share, so that the same word means the same thing everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.commands._console import progress_bar

if TYPE_CHECKING:
    from models.decoder import Decoder
    from workbench.lab.runs import RunStore

RUNS_HELP = "Folder of the runs; $WORKBENCH_RUNS or ./runs when not given."

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
RunsFolder = Annotated[Path | None, typer.Option("--runs", help=RUNS_HELP, file_okay=False, show_default=False)]
TextFile = Annotated[
    Path | None,
    typer.Option(
        "--file", "-f", help="Read the text from a UTF-8 file.", exists=True, dir_okay=False, show_default=False
    ),
]
Words = Annotated[str | None, typer.Argument(help="The text to read; - reads standard input.", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", "--runs", help=RUNS_HELP, file_okay=False, show_default=False)]


def existing_file(help: str) -> Any:
    """An option that names a file that there is."""
    return typer.Option(help=help, exists=True, dir_okay=False, show_default=False)


def existing_folder(help: str) -> Any:
    """An option that names a folder that there is."""
    return typer.Option(help=help, exists=True, file_okay=False, show_default=False)


def open_store(folder: Path | None) -> RunStore:
    from workbench.lab.runs import RunStore

    return RunStore(folder)


def open_model(name: str) -> Decoder:
    """A model by any name that `models.load` takes, with a progress bar while its files come and are read."""
    import models

    with progress_bar(f"opening {name}") as progress:
        return models.load(name, progress=progress)


def complete_runs(incomplete: str) -> list[str]:
    """Run ids for the shell's tab key."""
    return [entry.id for entry in open_store(None).list() if entry.id.startswith(incomplete)]


def complete_models(incomplete: str) -> list[str]:
    """Model names for the shell's tab key."""
    from models.registry import list_models

    return [record.name for record in list_models() if record.name.startswith(incomplete)]


AnyModel = Annotated[str, typer.Argument(help="Model, from `workbench models`.", autocompletion=complete_models)]


def complete_architectures(incomplete: str) -> list[str]:
    """Architecture names for the shell's tab key."""
    from models.registry import list_models

    return sorted({record.architecture for record in list_models() if record.architecture.startswith(incomplete)})


def complete_slugs(incomplete: str) -> list[str]:
    """Paper slugs for the shell's tab key."""
    from workbench.lab.catalogue import load_catalogue

    return [paper.slug for paper in load_catalogue() if paper.slug.startswith(incomplete)]


def complete_corpora(incomplete: str) -> list[str]:
    """Corpus names for the shell's tab key."""
    from workbench.lab.corpora import list_corpora

    return [record.name for record in list_corpora() if record.name.startswith(incomplete)]


def complete_tasks(incomplete: str) -> list[str]:
    """Task names for the shell's tab key."""
    from workbench.lab.tasks import list_tasks

    return [record.name for record in list_tasks() if record.name.startswith(incomplete)]
