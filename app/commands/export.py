"""`workbench export`: stored activations for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.commands._console import Failure, note, print_json
from app.commands._options import AsJson

PANEL = "Make"
FORMS = ("safetensors", "dataset")


def command(
    store: Annotated[
        Path, typer.Argument(help="Folder of stored activations, such as OUT/activations of `workbench features`.")
    ],
    out: Annotated[Path, typer.Argument(help="New folder to write.")],
    form: Annotated[
        str, typer.Option(help="safetensors: plain shards; dataset: Hugging Face's load_from_disk.")
    ] = "safetensors",
    rows: Annotated[int, typer.Option(help="Rows per shard (safetensors).", min=1)] = 65536,
    as_json: AsJson = False,
) -> None:
    """Write stored activations as plain safetensors shards or as a Hugging Face dataset.

    Example: `workbench export scratch/features/activations scratch/plain`
    """
    from workbench.instrument.errors import suggestion
    from workbench.lab.activation_export import export_dataset, export_safetensors
    from workbench.lab.activation_store import ActivationStore

    if form not in FORMS:
        raise typer.BadParameter(f"unknown form {form!r}.{suggestion(form, FORMS)} Known: {', '.join(FORMS)}.")
    if not store.is_dir():
        raise Failure(f"{store} is no folder", "Name a folder of stored activations.")
    opened = ActivationStore(store)
    written = export_dataset(opened, out) if form == "dataset" else export_safetensors(opened, out, rows)
    if as_json:
        print_json({"folder": written, "form": form, "rows": len(opened), "sites": list(opened.sites)})
        return
    note(f"{len(opened):,} rows of {', '.join(opened.sites)} are in {written}.")
