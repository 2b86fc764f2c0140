"""`workbench runs`: list, show, delete, export and import finished runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.commands._console import (
    Failure,
    add_row,
    counted,
    facts_table,
    new_table,
    note,
    print_json,
    readable_bytes,
    stdout,
)
from app.commands._options import AsJson, RunsFolder, complete_runs, open_store

PANEL = "What is here"

group = typer.Typer(help="List, show, delete, export and import runs.", rich_markup_mode="markdown")
RunId = Annotated[str, typer.Argument(help="Id of the run, from `workbench runs`.", autocompletion=complete_runs)]
Kind = Annotated[
    str | None, typer.Option(help="Only runs of this kind, such as trace or training.", show_default=False)
]
Model = Annotated[str | None, typer.Option(help="Only runs of this model.", show_default=False)]


@group.callback(invoke_without_command=True)
def default(context: typer.Context, runs: RunsFolder = None, as_json: AsJson = False) -> None:
    """List, show, delete, export and import runs. Without a further word it lists them."""
    if context.invoked_subcommand is None:
        list_runs(runs, None, None, as_json)
    elif runs is not None or as_json:
        raise typer.BadParameter(f"give --runs and --json after the word {context.invoked_subcommand!r}")


@group.command("list")
def list_runs(runs: RunsFolder = None, kind: Kind = None, model: Model = None, as_json: AsJson = False) -> None:
    """Every run, newest first."""
    store = open_store(runs)
    entries = store.list(kind=kind, model=model)
    if as_json:
        print_json(entries)
    elif entries:
        table = new_table(
            "run", "kind", "model", "tokens", "size", "created", "title", numbers=("tokens", "size"), wide=("title",)
        )
        for entry in entries:
            size, created = readable_bytes(entry.bytes), entry.created[:16].replace("T", " ")
            add_row(table, entry.id, entry.kind, entry.model, entry.tokens or "", size, created, entry.title)
        stdout().print(table)
    else:
        note(f"No runs{' of that description' if kind or model else ''} in {store.root}. `workbench trace` makes one.")
    for problem in store.problems():
        note(f"{problem.folder} is not a readable run: {problem.reason}")


@group.command("show")
def show_run(run_id: RunId, runs: RunsFolder = None, as_json: AsJson = False) -> None:
    """What a run holds: model, settings, text and arrays. With --json the whole manifest."""
    run = open_store(runs).open(run_id)
    if as_json:
        print_json(run.manifest)
        return
    model = run.model
    facts = {
        "title": run.title,
        "kind": run.kind,
        "created": run.created,
        "model": " · ".join(str(model[key]) for key in ("name", "architecture", "provenance") if model.get(key)),
        "parameters": f"{model['parameters']:,}" if model.get("parameters") else "",
        "layers": len(run.layers) or "",
        "text": run.manifest.get("text"),
        "interventions": len(run.manifest.get("interventions") or ()) or "",
        "settings": ", ".join(f"{key}={value}" for key, value in (run.manifest.get("settings") or {}).items()),
        "code": run.manifest.get("code_version"),
        "folder": run.path,
    }
    stdout().print(facts_table("run", run.id, facts))
    arrays = new_table("array", "shape", "axes", "type", "unit")
    for name, array in run.arrays().items():
        shape = " × ".join(map(str, array["shape"]))
        add_row(arrays, name, shape, " ".join(array["axes"]), array["dtype"], array.get("unit"))
    stdout().print(arrays)


@group.command("delete")
def delete_run(
    run_id: RunId,
    runs: RunsFolder = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete a run and everything in its folder."""
    store = open_store(runs)
    if not yes:
        if as_json:
            raise Failure("--json cannot ask whether to delete", "Add --yes.")
        typer.confirm(f"Delete the run {run_id}?", abort=True, err=True)
    store.delete(run_id)
    if as_json:
        print_json({"deleted": run_id})
    else:
        note(f"deleted {run_id}")


@group.command("export")
def export_run(
    run_id: RunId,
    out: Annotated[
        Path | None, typer.Option(help="Zip file to write; <run>.zip when not given.", show_default=False)
    ] = None,
    runs: RunsFolder = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a run as one zip file."""
    target = out or Path(f"{run_id}.zip")
    store = open_store(runs)
    run = store.open(run_id)
    if target.exists() and not force:
        raise Failure(f"{target} exists", "Give another name with --out, or --force to replace it.")
    if not target.parent.is_dir():
        raise Failure(f"there is no folder {target.parent} to write {target.name} into")
    store.export_zip(run.id, target)
    size = target.stat().st_size
    if as_json:
        print_json({"run": run.id, "file": target, "bytes": size})
    else:
        stdout().print(str(target), highlight=False, soft_wrap=True)
        note(f"{readable_bytes(size)}, {counted(len(run.arrays()), 'array')}")


@group.command("import")
def import_run(
    files: Annotated[
        list[Path],
        typer.Argument(help="Zip files, from `workbench runs export` or the page.", exists=True, dir_okay=False),
    ],
    runs: RunsFolder = None,
    as_json: AsJson = False,
) -> None:
    """Take in runs from zip files. Each is checked byte by byte before it is listed."""
    from workbench.lab.run_format import RunError

    store = open_store(runs)
    taken = []
    for file in files:
        try:
            taken.append(store.import_zip(file))
        except RunError as error:
            kept = f" {counted(len(taken), 'run')} before it {'is' if len(taken) == 1 else 'are'} in." if taken else ""
            raise Failure(f"{file}: {error}.{kept}") from None
    if as_json:
        print_json([run.id for run in taken])
        return
    for run in taken:
        stdout().print(run.id, highlight=False, soft_wrap=True)
        note(f"{run.title}: {counted(len(run.arrays()), 'array')}")
