"""`workbench models`: every model that can be opened by name, and the hook points of one of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    convert: Annotated[
        Path | None,
        typer.Option(
            help="New folder: write a checkpoint whose weights are pickles only as safetensors.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The models and their hook points.

    With a NAME, everything about that one: `workbench models bdh-random`. Of a published checkpoint (a folder in Hugging Face layout, or
    a hub id in the local cache), its type, licence, size and the memory that opening it takes, without opening it.
    """
    from models.registry import describe, list_models

    if convert is not None:
        if name is None:
            raise Failure(
                "--convert needs a checkpoint", "Name its folder: `workbench models FOLDER --convert NEW_FOLDER`."
            )
        from models.pretrained.pickles import convert_pickles

        name = str(convert_pickles(name, convert))
        note(f"{name} has the weights as safetensors.")
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
    """What a published checkpoint is and what opening it takes, from its headers or from the hub's list; None for a name of ours."""
    from models.pretrained.folders import folder_called, free_memory
    from models.pretrained.hub import hub_id
    from models.pretrained.loader import is_published
    from models.pretrained.outlook import outlook
    from models.registry import shipped_names

    folder = None if name in shipped_names() else folder_called(name)
    if folder is None and (name in shipped_names() or Path(name).exists() or hub_id(name) is None):
        return None
    if folder is not None and not is_published(folder):
        return None
    return outlook(name).to_json() | {"free_memory_bytes": free_memory()}


def show_checkpoint(record: dict[str, Any]) -> None:
    where = {"folder": "a folder here", "cache": "in the cache of downloads", "hub": "on the hub"}[record["place"]]
    if record["download_bytes"]:
        where += f"; {size(record['download_bytes'])} to download"
    facts = {
        "type": record["model_type"],
        "opens as": f"cannot be opened: {record['problem']}" if record["problem"] else record["architecture"],
        "output": record["gives"] or "not known before it is downloaded",
        "where": where,
        "licence": record["licence"] or "not stated",
        "parameters": f"{record['parameters']:,}, stored as {', '.join(record['stored_dtypes'])}"
        if record["parameters"] is not None
        else "not known before it is downloaded",
        "files": size(record["file_bytes"]),
        "memory as float32": size(record["load_bytes"]),
        "memory of a trace": f"about {size(record['trace_bytes_per_token'], 1000)} more for 1,000 tokens",
        "free memory here": size(record["free_memory_bytes"]),
    }
    if record["reads_source"]:
        facts["reads"] = "a source besides the text: --source of `workbench trace`"
    if record["problem"]:
        del facts["output"]
    stdout().print(facts_table("checkpoint", record["name"], facts))


def size(number: int | None, times: int = 1) -> str:
    return "not known" if number is None else readable_bytes(number * times)


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
