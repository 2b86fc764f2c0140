"""`workbench probe`: what the heads of a model read, its sinks, and its retrieval heads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from app.commands._console import (
    Failure,
    add_row,
    new_table,
    note,
    print_json,
    progress_bar,
    read_text,
    stdout,
    two_decimals,
)
from app.commands._options import RUNS_HELP, AsJson, TextFile, complete_corpora, complete_models, open_model, open_store

PANEL = "Look inside"
ALL = "induction,census,sinks,retrieval,local,basin"


def command(
    model: Annotated[str, typer.Argument(help="Model, from `workbench models`.", autocompletion=complete_models)],
    probe: Annotated[str, typer.Option(help="Which probes, separated by commas.")] = ALL,
    text: Annotated[
        str | None, typer.Option(help="The text to read; - reads standard input.", show_default=False)
    ] = None,
    file: TextFile = None,
    corpus: Annotated[
        str | None,
        typer.Option(help="Corpus name or text file to read.", autocompletion=complete_corpora, show_default=False),
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens per made-up sequence or piece of a corpus.", min=24)] = 96,
    lengths: Annotated[
        str, typer.Option(help="Further lengths to measure at, separated by commas; a text is read up to each.")
    ] = "",
    sequences: Annotated[int, typer.Option(help="Sequences.", min=2)] = 16,
    vocab: Annotated[
        int | None,
        typer.Option(help="Tokens that made-up sequences use; at most 128 when not given.", min=16, show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the made-up sequences and the bootstrap.", min=0)] = 0,
    whole_patterns: Annotated[
        bool, typer.Option("--whole-patterns", help="Form the patterns of layers that no factors determine.")
    ] = False,
    encoder: Annotated[
        bool, typer.Option("--encoder", help="Of an encoder-decoder: probe its encoder, as a model of one text.")
    ] = False,
    twin: Annotated[bool, typer.Option(help="Also measure the same architecture at random weights.")] = True,
    out: Annotated[
        Path | None, typer.Option("--out", "--runs", help=RUNS_HELP, file_okay=False, show_default=False)
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the run.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what the heads of a model do, and keep the result as a run.

    Without a text the model reads made-up sequences that repeat at varied distances.

    Examples: `workbench probe induction-circuit`, or `workbench probe gpt-english --probe sinks --corpus english --json`
    """
    content = None if text is None and file is None else read_text(text, file)
    if content is not None and corpus is not None:
        raise Failure("a text and a corpus were given", "Give one of --text, --file and --corpus.")
    names = [name.strip() for name in probe.split(",") if name.strip()]
    if not names:
        raise Failure("no probe was named", f"Known: {ALL}.")
    if not all(each.strip().isdigit() for each in lengths.split(",") if each.strip()):
        raise Failure(f"--lengths is {lengths!r}", "Expected whole numbers separated by commas, such as 48,96,192.")
    further = [int(each) for each in lengths.split(",") if each.strip()]
    store = open_store(out)

    from probes.battery import store_probes, survey

    loaded: Any = open_model(model)
    if encoder:
        if not hasattr(loaded, "encoder_alone"):
            raise Failure(f"{model} has no encoder besides the model that reads the text", "Leave --encoder out.")
        loaded = loaded.encoder_alone()
    options: dict[str, Any] = {
        "corpus": corpus, "length": length, "sequences": sequences, "vocab": vocab, "seed": seed, "whole_patterns": whole_patterns,
    }  # fmt: skip
    with progress_bar(f"probing {model}") as progress:
        found = survey(loaded, names, lengths=further, twin=twin, text=content, progress=progress, **options)
    asked = {"probes": names, "text": content, "lengths": further, "twin": twin, "encoder": encoder, **options}
    run = store_probes(store, loaded, found, title=title, settings=asked)
    if as_json:
        print_json({"id": run.id, "path": run.path, "model": model, "results": run.manifest["results"]})
        return
    for name, result in found.results.items():
        show(name, result)
    note(f"Stored as {run.id} in {store.root}.")


def in_options(reason: str) -> str:
    """A probe's words with the option of this command in place of the argument that they name."""
    return reason.replace("whole_patterns=True", "--whole-patterns")


def show(name: str, result: Any) -> None:
    """One table per probe: the heads with the largest scores."""
    kind = type(result).__name__
    if kind == "NoAnswer":
        note(f"{name}: no answer. {in_options(result.reason)}")
        return
    if kind == "HeadScores":
        table = new_table(name, "layer", "head", "score", numbers=("layer", "head", "score"))
        for score in result.scores:
            for layer, head, value in result.best(score, 3):
                add_row(table, score.replace("_", " "), layer, head, two_decimals(float(value)))
    elif kind == "Census":
        columns = list(result.scores)
        table = new_table(name, "layer", "head", "cluster", *columns, numbers=("layer", "head", "cluster", *columns))
        for row in result.table():
            numbers = [two_decimals(float(row[column])) for column in columns]
            add_row(table, row["label"] or "–", row["layer"], row["head"], row["cluster"], *numbers)
        for left, reason in result.left_out.items():
            note(f"{left} was left out. {in_options(reason)}")
    elif kind == "SinkReport":
        table = new_table(
            name, "layer", "head", "on first token", "mass on sinks", "positions", numbers=("layer", "head")
        )
        for row, layer in enumerate(result.layers):
            for head in range(result.first_mass.shape[1]):
                places = sorted({sink.position for sink in result.sinks if (sink.layer, sink.head) == (layer, head)})
                shown = ", ".join(map(str, places[:6])) + (" …" if len(places) > 6 else "")
                add_row(
                    table,
                    "",
                    layer,
                    head,
                    two_decimals(float(result.first_mass[row, head])),
                    two_decimals(float(result.sink_mass[row, head])),
                    shown,
                )
    elif kind in ("AdaptiveHeads", "SegmentAttention"):
        words = "share of local queries" if kind == "AdaptiveHeads" else "depth of the basin"
        table = new_table(name, "layer", "head", words, numbers=("layer", "head", words))
        for layer, head, value in result.best(8):
            add_row(table, "", layer, head, two_decimals(float(value)))
    else:
        table = new_table(name, "layer", "head", "score", numbers=("layer", "head", "score"))
        for layer, head, value in result.best(8):
            add_row(table, "retrieval head" if value > 0.1 else "", layer, head, two_decimals(float(value)))
        note(f"The needle was repeated in {int(result.counted.sum())} of {len(result.counted)} runs.")
    stdout().print(table)
