"""`workbench weights`: read a model's heads from its weights alone: which compose, and what their maps do."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from app.commands._console import Failure, add_row, counted, new_table, note, print_json, stdout
from app.commands._options import AsJson, complete_models, open_model

PANEL = "Look inside"


def command(
    model: Annotated[str, typer.Argument(help="Model to look inside.", autocompletion=complete_models)],
    composition: Annotated[
        bool, typer.Option("--composition", help="Which heads read which: Q-, K- and V-composition, beside chance.")
    ] = False,
    svd: Annotated[
        list[str] | None,
        typer.Option(help="Singular directions of head LAYER.HEAD, such as 1.3; may be repeated.", show_default=False),
    ] = None,
    which: Annotated[str, typer.Option("--map", help="Of --svd: ov (what it moves) or qk (what it matches).")] = "ov",
    fold_norms: Annotated[
        bool, typer.Option("--fold-norms", help="First fold norms into the maps that read them.")
    ] = False,
    centre: Annotated[
        bool, typer.Option("--centre", help="First centre what is written to the stream (models with layer norms).")
    ] = False,
    top: Annotated[int, typer.Option(help="Pairs of heads per kind, and directions per head, to show.", min=1)] = 5,
    draws: Annotated[int, typer.Option(help="Random rotations that chance is estimated from.", min=2)] = 50,
    seed: Annotated[int, typer.Option(help="Seed of these.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Read heads from weights; no text is involved.

    Example: `workbench weights induction-circuit --composition --svd 1.0 --fold-norms`

    Without --composition and --svd: what could be folded and centred.
    """
    from models.weight_processing import process_weights
    from probes.weights import composition as compose
    from probes.weights import head_svd

    heads = [place(text) for text in svd or []]
    opened = open_model(model)
    found: dict[str, Any] = {"model": model, "processing": None}
    if fold_norms or centre:
        opened = process_weights(opened, fold_norms=fold_norms, centre_writing=centre, partial=True)
        found["processing"] = opened.processing.to_json()
    if not (composition or heads):
        found["can"] = possible(opened) if found["processing"] is None else {}
    result = compose(opened, draws, seed) if composition else None
    directions = [head_svd(opened, layer, head, which, top) for layer, head in heads]
    if as_json:
        if result is not None:
            pairs = [pair.to_json() for kind in result.scores for pair in result.largest(kind, top)]
            found["composition"] = {**result.to_json(), "largest": pairs}
        found["svd"] = [record.to_json() for record in directions]
        print_json(found)
        return
    if "can" in found:
        show_possible(found["can"])
    if found["processing"] is not None:
        done = found["processing"]
        note(f"{counted(len(done['folded']), 'norm')} folded, {counted(len(done['centred']), 'writer')} centred.")
        for name, why in done["left"].items():
            note(f"{name} is left as it is: {why}.")
    if result is not None:
        show_composition(result, top)
    for record in directions:
        show_directions(opened, record)


def place(text: str) -> tuple[int, int]:
    """`1.3` is head 3 of layer 1."""
    found = re.fullmatch(r"(\d+)\.(\d+)", text)
    if found is None:
        raise Failure(f"{text!r} names no head", "Write LAYER.HEAD, such as --svd 1.3.")
    return int(found[1]), int(found[2])


def possible(model: Any) -> dict[str, str]:
    """What each kind of processing would do, or why it refuses, in words."""
    from models.weight_processing import CannotProcess, process_weights

    answers = {}
    for name in ("fold_norms", "centre_writing", "centre_unembedding"):
        try:
            done = process_weights(model, **{name: True}, partial=name == "fold_norms").processing
        except CannotProcess as reason:
            answers[name] = str(reason)
            continue
        left = "".join(f"; {norm} stays: {why}" for norm, why in done.left.items())
        answers[name] = f"possible ({', '.join((*done.folded, *done.centred))}{left})"
    return answers


def show_possible(answers: dict[str, str]) -> None:
    table = new_table("processing", "answer", wide=("answer",))
    for name, answer in answers.items():
        add_row(table, name.replace("_", " "), answer)
    stdout().print(table)
    note(
        "--composition compares heads, --svd LAYER.HEAD takes one apart; --fold-norms and --centre process a copy first."
    )


def show_composition(result: Any, top: int) -> None:
    numbers = ("score", "chance", "deviations")
    table = new_table("composition", "later head", "reads", *numbers, numbers=numbers)
    names = {"Q": "queries", "K": "keys", "V": "values"}
    for kind in result.scores:
        for pair in result.largest(kind, top):
            later, earlier = (f"{layer}.{head}" for layer, head in (pair.later, pair.earlier))
            add_row(
                table,
                f"{kind} ({names[kind]})",
                later,
                earlier,
                f"{pair.score:.3f}",
                f"{pair.chance:.3f}",
                f"{pair.z:.1f}",
            )
    stdout().print(table)
    for layer, why in result.skipped.items():
        note(f"Layer {layer} takes no part: {why}")


def show_directions(model: Any, record: Any) -> None:
    sides = ("reads", "writes") if record.which == "ov" else ("queries", "keys")
    wide = (*sides, *(f"{side}, other way" for side in sides))
    table = new_table(
        f"{record.layer}.{record.head} {record.which}", "value", "share", *wide, numbers=("value", "share"), wide=wide
    )

    def words(tokens: list[tuple[int, float]]) -> str:
        ids = [token for token, _ in tokens]
        strings = model.tokenizer.token_strings(ids) if model.tokenizer is not None else [str(i) for i in ids]
        return " ".join(repr(text)[1:-1] for text in strings)

    for number, one in enumerate(record.directions):
        listed = (one.reads, one.writes, one.reads_against, one.writes_against)
        add_row(table, number, f"{one.value:.3g}", f"{one.share:.1%}", *map(words, listed))
    stdout().print(table)
    note(f"Effective rank {record.effective_rank:.1f} of {len(record.values)}.")
