"""`workbench models`: the trained models that come with the workbench, and the hook points of one of them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from app.commands._console import Failure, add_row, counted, new_table, note, print_json, stdout
from app.commands._options import AsJson, complete_models

PANEL = "What is here"


def command(
    name: Annotated[
        str | None,
        typer.Argument(help="One model, with its hook points.", autocompletion=complete_models, show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The models: paper, family, size, hook points, what they can show."""
    from models.registry import list_models
    from workbench.instrument.errors import suggestion

    records = list_models()
    if name is not None:
        records = [record for record in records if record.name == name]
        if not records:
            known = [record.name for record in list_models()]
            near = suggestion(name, known)
            raise Failure(f"there is no model {name!r}.{near}", f"Models: {', '.join(known)}" if known else "")
    described = [describe(record) for record in records]
    if as_json:
        print_json(described if name is None else described[0])
    elif name is None:
        listing(described)
    else:
        show(described[0])


def describe(record: Any) -> dict[str, Any]:
    """A model's record with its hook points, which are read from the model itself."""
    import models

    points = models.load(record.name).hook_points()
    return {
        "name": record.name,
        "title": record.title,
        "description": record.description,
        "architecture": record.architecture,
        "paper": record.paper,
        "family": record.family,
        "parameters": record.parameters,
        "provenance": record.provenance,
        "capabilities": list(record.capabilities),
        "hook_points": [
            {"name": point.name, "role": point.role, "axes": list(point.axes)}
            for point in (points.values() if hasattr(points, "values") else points)
        ],
    }


def listing(described: list[dict[str, Any]]) -> None:
    numbers = ("parameters", "hook points")
    table = new_table("model", "paper", "family", *numbers, "weights", "can show", numbers=numbers)
    for model in described:
        parameters, points = f"{model['parameters']:,}", len(model["hook_points"])
        shows = ", ".join(model["capabilities"])
        add_row(table, model["name"], model["paper"], model["family"], parameters, points, model["provenance"], shows)
    stdout().print(table)
    note(f"{counted(len(described), 'model')}. `workbench models NAME` lists the hook points of one.")


def show(model: dict[str, Any]) -> None:
    table = new_table("model", model["name"])
    for key in ("title", "description", "architecture", "paper", "family", "provenance"):
        if model[key]:
            add_row(table, key, model[key])
    add_row(table, "parameters", f"{model['parameters']:,}")
    add_row(table, "can show", ", ".join(model["capabilities"]))
    stdout().print(table)
    points = new_table("hook point", "role", "axes")
    for point in model["hook_points"]:
        add_row(points, point["name"], point["role"], " ".join(point["axes"]))
    stdout().print(points)
