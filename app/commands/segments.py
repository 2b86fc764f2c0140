"""`workbench segments`: what a model carries from segment to segment of a text, and what it is worth."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    read_text,
    stdout,
)
from app.commands._options import AnyModel, AsJson, Out, TextFile, Words, existing_file, open_model, open_store

if TYPE_CHECKING:
    from probes.segments import SegmentMemory

PANEL = "Look inside"
MOST_SHOWN = 16
"""Columns of the table of layers; JSON has all."""


def command(
    model: AnyModel,
    text: Words = None,
    file: TextFile = None,
    length: Annotated[int, typer.Option(help="Tokens of a segment.", min=2)] = 64,
    other: Annotated[
        str | None, typer.Option(help="Another text, whose state is patched in.", show_default=False)
    ] = None,
    other_file: Annotated[Path | None, existing_file("Read the other text from a UTF-8 file.")] = None,
    parts: Annotated[
        bool, typer.Option("--parts/--no-parts", help="Also exchange the state layer by layer and slot by slot.")
    ] = True,
    out: Out = None,
    title: Annotated[str | None, typer.Option(help="Title of the run.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Read a text in segments and measure what the state between them is worth, in nats per token.

    Every segment is read again without a state, with the state of another text, and with one layer's part of it cut or exchanged.

    Examples: `workbench segments retnet-english --file play.txt --length 128`, or
    `workbench segments induction-circuit "abcdefghabcdefgh" --length 8 --other "hgfedcba" --json`
    """
    content = read_text(text, file)
    if other is not None and other_file is not None:
        raise Failure("the other text was given twice", "Give --other or --other-file.")
    if other_file is not None:
        other = read_text(None, other_file)
    store = open_store(out)
    from probes.progress import MeasurementCancelled
    from probes.segments import segment_memory, store_segments

    opened = open_model(model)
    with interruptible() as cancel, progress_bar(f"reading with {model}") as progress:
        try:
            found = segment_memory(opened, content, length, other=other, parts=parts, progress=progress, cancel=cancel)
        except MeasurementCancelled:
            raise Failure("stopped", "Nothing was stored.") from None
    run = store_segments(store, opened, found, text=content, other=other, parts=parts, title=title)
    if as_json:
        print_json({"id": run.id, "path": run.path, "model": model, **found.to_json()})
        return
    show(found)
    if other is None:
        note("With --other TEXT also the state of another text is patched in.")
    if found.repeated > 1:
        note(f"The other text is shorter and was begun {found.repeated} times.")
    note(f"Stored as {run.id} in {store.root}; the Segments page of `workbench serve` draws it.")


def show(found: SegmentMemory) -> None:
    """Losses by segment, what the state is worth, layers by segment, and what is carried."""
    said = {"state": "true state", "none": "no state", "other": "other text's"}
    headers = [said[name] for name in found.loss]
    table = new_table("segment", "first token", *headers, numbers=("first token", *headers))
    means = [found.mean_loss(name) for name in found.loss]
    for segment, start in enumerate(found.starts):
        add_row(table, segment, start, *(four_digits(values[segment]) for values in means))
    stdout().print(table)
    for name in found.loss:
        if name != "state":
            nats, interval = found.worth(name)
            stdout().print(
                f"The true state saves {four_digits(nats)} nats per token against {said[name]} {interval}.",
                markup=False,
            )
    for reading in found.layer_loss:
        segments = [str(segment) for segment in range(1, len(found.starts))][:MOST_SHOWN]
        words = "nats lost, layer cut" if reading == "cut" else "with the other text's"
        table = new_table(words, *segments, numbers=segments)
        for name, line in zip(found.layers, found.by_layer(reading), strict=True):
            add_row(table, f"layer {name}", *(f"{value:.4f}" for value in line[1 : len(segments) + 1]))
        stdout().print(table)
    columns = ("numbers first", "numbers last", "bytes last", "norm first", "norm last", "mean change", "mean cosine")
    table = new_table("carried", *columns, numbers=columns)
    for row, name in enumerate(found.slot_names):
        changes = [values[row, 2:] for values in (found.change, found.cosine)]
        add_row(
            table, name, int(found.numbers[row, 1]), int(found.numbers[row, -1]), int(found.bytes[row, -1]),
            *(four_digits(found.norm[row, at]) for at in (1, -1)),
            *(four_digits(float(each.mean()) if each.size else float("nan")) for each in changes),
        )  # fmt: skip
    stdout().print(table)
