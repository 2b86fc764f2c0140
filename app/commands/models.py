"""`workbench models`: every model that can be opened by name, and the hook points of one of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.commands._console import add_row, counted, facts_table, new_table, note, print_json, stdout
from app.commands._options import AsJson, complete_models

if TYPE_CHECKING:
    from models.registry import ModelRecord

PANEL = "What is here"


def command(
    name: Annotated[
        str | None,
        typer.Argument(
            help="One model, with its hook points; or a published checkpoint, a folder or hub id.",
            autocompletion=complete_models,
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The models and their hook points.

    With a NAME, everything about that one: `workbench models bdh-random`. Of a published checkpoint (a folder in Hugging Face layout, or
    a hub id in the local cache), its type, licence, size and the memory that opening it takes, without opening it.
    """
    from models.registry import describe, list_models

    published = None if name is None else checkpoint(name)
    if published is not None:
        if as_json:
            print_json(published)
        else:
            show_checkpoint(published)
        return
    if name is None:
        records = [summary(record) for record in list_models()]
        if as_json:
            print_json(records)
        else:
            listing(records)
        return
    record = summary(describe(name)) | {"hook_points": hook_points(name)}
    if as_json:
        print_json(record)
    else:
        show(record)


def checkpoint(name: str) -> dict[str, Any] | None:
    """What a published checkpoint is, from its headers; None for a name of ours."""
    from models.pretrained.hub import hub_id, snapshot
    from models.pretrained.loader import is_published, summary_of

    folder = Path(name)
    if not folder.exists():
        identity = hub_id(name)
        if identity is None:
            return None
        folder = snapshot(identity)
    return summary_of(folder) | {"name": name} if is_published(folder) else None


def show_checkpoint(record: dict[str, Any]) -> None:
    facts = {
        "type": record["model_type"] if record["supported"] else f"{record['model_type']} (cannot be opened here)",
        "licence": record["licence"] or "not stated",
        "stored numbers": f"{record['stored_values']:,} in {record['tensors']} tensors, {', '.join(record['storage_dtypes'])}",
        "files": f"{record['file_bytes'] / 2**20:,.1f} MiB",
        "memory as float32": f"{record['memory_float32_bytes'] / 2**20:,.1f} MiB",
    }
    stdout().print(facts_table("checkpoint", record["name"], facts))


def summary(record: ModelRecord) -> dict[str, Any]:
    names = ("name", "title", "description", "architecture", "paper", "family", "parameters", "provenance", "fidelity",
             "capabilities")  # fmt: skip
    return {**{name: getattr(record, name) for name in names}, "hook_points": list(record.hook_point_names)}


def hook_points(name: str) -> list[dict[str, Any]]:
    """Name, role and axes of every hook point, read from the model itself."""
    import models

    points = models.load(name).hook_dict
    return [{"name": point, "role": slot.role, "axes": slot.axes} for point, slot in points.items()]


def listing(records: list[dict[str, Any]]) -> None:
    numbers = ("parameters", "hooks")
    table = new_table("model", "paper", "family", *numbers, "can show", numbers=numbers, wide=("can show",))
    for model in records:
        sizes = (f"{model['parameters']:,}", len(model["hook_points"]))
        add_row(table, model["name"], model["paper"], model["family"], *sizes, ", ".join(model["capabilities"]))
    stdout().print(table)
    note(f"{counted(len(records), 'model')}. `workbench models NAME` lists the hook points of one.")


def show(model: dict[str, Any]) -> None:
    facts = {
        key: model[key] for key in ("title", "description", "architecture", "paper", "family", "provenance", "fidelity")
    }
    facts |= {"parameters": f"{model['parameters']:,}", "can show": ", ".join(model["capabilities"])}
    stdout().print(facts_table("model", model["name"], facts))
    points = new_table("hook point", "role", "axes")
    for point in model["hook_points"]:
        add_row(points, point["name"], point["role"], " ".join(point["axes"]))
    stdout().print(points)
