"""`workbench order`: in which order documents of a prompt should stand for a model, by what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from app.commands._console import (
    Failure,
    add_row,
    interruptible,
    new_table,
    note,
    print_json,
    progress_bar,
    read_text,
    stdout,
)
from app.commands._options import RUNS_HELP, AsJson, TextFile, complete_models, open_store

PANEL = "Look inside"


def command(
    model: Annotated[str, typer.Argument(help="Model, from `workbench models`.", autocompletion=complete_models)],
    text: Annotated[
        str | None,
        typer.Argument(help="Documents, one a line, then the question; - reads standard input.", show_default=False),
    ] = None,
    file: TextFile = None,
    answer: Annotated[str, typer.Option(help="Its first token's probability is watched, such as ' Rome'.")] = "",
    rounds: Annotated[int, typer.Option(help="Of Attention Sorting.", min=1, max=100)] = 3,
    bases: Annotated[
        str, typer.Option(help="Rotation bases that are read together (Attention Buckets), separated by commas.")
    ] = "",
    out: Annotated[
        Path | None, typer.Option("--out", "--runs", help=RUNS_HELP, file_okay=False, show_default=False)
    ] = None,
    title: Annotated[str | None, typer.Option(help="Title of the run.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Measure which documents a model reads at which places, and plan their order: Attention Sorting, AttnRank, Attention Buckets.

    Example: `printf 'Rome is old.\\nParis is large.\\nWhich is old? ' | workbench order gpt-english - --answer R`
    """
    lines = read_text(text, file).splitlines()
    documents, question = [f"{line}\n" for line in lines[:-1] if line.strip()], lines[-1] if lines else ""
    try:
        given = [float(each) for each in bases.split(",") if each.strip()]
    except ValueError:
        raise Failure(
            f"--bases is {bases!r}", "Expected numbers separated by commas, such as 10000,17500,25000."
        ) from None
    if len(documents) < 2 or not question.strip():
        raise Failure(
            f"the text has {len(documents)} documents before its last line",
            "Write two documents or more, one a line, then the question.",
        )
    store = open_store(out)
    import models
    from probes.document_order import plan_order, store_order
    from probes.progress import MeasurementCancelled

    opened = models.load(model)
    with interruptible() as cancel, progress_bar(f"reading with {model}") as progress:
        try:
            found = plan_order(
                opened, documents, question, answer=answer, rounds=rounds, bases=given, progress=progress, cancel=cancel
            )
        except MeasurementCancelled:
            raise Failure("stopped", "Nothing was stored.") from None
    settings = {
        "model": model, "documents": documents, "question": question, "answer": answer, "rounds": rounds, "bases": given,
    }  # fmt: skip
    settings["said"] = {name: spoken(opened, best) for name, best in found.next_tokens.items()}
    run = store_order(store, opened, found, title, settings)
    if as_json:
        print_json({"id": run.id, "path": run.path, "model": model, **found.to_json()})
        return
    show(found, opened)
    note(f"Stored as {run.id} in {store.root}.")


def spoken(model: Any, best: Sequence[tuple[int, float]]) -> list[tuple[str, float]]:
    """Tokens by their text, with their probabilities."""
    return [(str(model.tokenizer.token_strings([token])[0]), chance) for token, chance in best]


def show(found: Any, model: Any) -> None:
    """What documents and places get, the planned orders, and what is said after each."""
    documents = new_table("document", "", "gets (mean over places)", wide=("",), numbers=("gets (mean over places)",))
    for number, text in enumerate(found.documents):
        add_row(documents, number, text.strip()[:60], f"{found.relevance[number]:.4f}")
    stdout().print(documents)
    places = new_table("place", "gets (mean over documents)", *found.orders, numbers=("gets (mean over documents)",))
    for place, gets in enumerate(found.profile):
        add_row(places, place, f"{gets:.4f}", *(str(order[place]) for order in found.orders.values()))
    stdout().print(places)
    said = new_table(
        "order", "log p(answer)", "likeliest next tokens", numbers=("log p(answer)",), wide=("likeliest next tokens",)
    )
    for name, best in found.next_tokens.items():
        words = ", ".join(f"{token!r} {chance:.2f}" for token, chance in spoken(model, best))
        add_row(said, name, f"{found.answers[name]:.3f}" if name in found.answers else "", words)
    stdout().print(said)
