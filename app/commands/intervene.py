"""`workbench intervene`: change something inside a model while it reads, and see what that does beside matched random changes."""

from __future__ import annotations

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
from app.commands._options import AnyModel, AsJson, Out, TextFile, Words, existing_file, open_store

PANEL = "Look inside"


def command(
    model: AnyModel,
    text: Words = None,
    file: TextFile = None,
    do: Annotated[
        list[str] | None,
        typer.Option(help="What to do, such as 'zero head 1.3'; several act together.", show_default=False),
    ] = None,
    basket: Annotated[Path | None, existing_file("A file with one operation a line.")] = None,
    each_line: Annotated[
        bool, typer.Option("--each-line", help="Every line of the text is a prompt of its own.")
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(help="Token whose logit is watched; what the model expects when not given.", show_default=False),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Token whose logit is subtracted from the target's.", show_default=False)
    ] = None,
    at: Annotated[int, typer.Option(help="Token after which the target is watched; -1 is the last.")] = -1,
    controls: Annotated[int, typer.Option(help="Matched random baskets to compare with.", min=0, max=1000)] = 20,
    seed: Annotated[int, typer.Option(help="Of what is drawn.", min=0)] = 0,
    dictionary: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder of `workbench features`, as NAME=FOLDER, for lines that name features.", show_default=False
        ),
    ] = None,
    out: Out = None,
    title: Annotated[str | None, typer.Option(help="Title of the run.", show_default=False)] = None,
    list_kinds: Annotated[
        bool, typer.Option("--list", help="Show what can be done, and what this model does not take.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Change something inside a model while it reads a text.

    Examples: `workbench intervene gpt-english "To be, or not to" --do "zero head 1.3"`, or
    `workbench intervene retnet-english "To be" --do "reset state 1 after 3" --json`
    """
    import models

    if list_kinds:
        opened = models.load(model)
        show_kinds(opened, as_json)
        return
    lines = [*(do or []), *(basket.read_text(encoding="utf-8").splitlines() if basket is not None else [])]
    if not lines:
        raise Failure("nothing to do was given", "Write --do 'zero head 1.3', or see what there is: --list.")
    content = read_text(text, file)
    prompts = [line for line in content.splitlines() if line.strip()] if each_line else [content]
    store = open_store(out)

    from probes.interventions import intervene, parse, store_effects
    from probes.progress import MeasurementCancelled

    parse(lines)
    opened = models.load(model)
    with interruptible() as cancel, progress_bar(f"intervening in {model}") as progress:
        try:
            effects = intervene(
                opened, prompts, lines, target=target, wrong=against, at=at, controls=controls, seed=seed,
                dictionaries=named_dictionaries(dictionary or []), progress=progress, cancel=cancel,
            )  # fmt: skip
        except MeasurementCancelled:
            raise Failure("stopped", "Nothing was stored.") from None
    settings = {
        "basket": "\n".join(lines), "prompts": prompts, "target": target, "against": against, "at": at, "draws": controls, "seed": seed,
    }  # fmt: skip
    run = store_effects(store, opened, effects, title=title, settings=settings)
    if as_json:
        print_json({"id": run.id, "path": run.path, "model": model, "results": run.manifest["results"]})
        return
    show(run.manifest["results"])
    note(f"Stored as {run.id} in {store.root}.")


def named_dictionaries(given: list[str]) -> dict[str, tuple[Any, str, int | None]]:
    """`NAME=FOLDER` each, opened. Failure for one of another form."""
    from probes.interventions.dictionaries import open_dictionary

    found = {}
    for text in given:
        name, mark, folder = text.partition("=")
        if not (name and mark and folder):
            raise Failure(
                f"--dictionary {text!r} is not understood", "Write NAME=FOLDER, the folder of `workbench features`."
            )
        found[name] = open_dictionary(folder)
    return found


def show(results: dict[str, Any]) -> None:
    """Changes with intervals beside the controls, and the prediction before and after."""
    from probes.interventions.effects import MEASURES

    table = new_table("change of", "", "95 %", "random", "p", numbers=("", "random", "p"))
    for measure, words in MEASURES.items():
        found = results["changes"][measure]
        low_high = "" if found["interval"] is None else "{:+.3f} to {:+.3f}".format(*found["interval"])
        drawn = found["controls"]
        spread = f"{min(drawn):+.3f} to {max(drawn):+.3f}" if drawn else "none"
        add_row(
            table, words, f"{found['value']:+.4f}", low_high, spread, "" if found["p"] is None else f"{found['p']:.2g}"
        )
    stdout().print(table)
    before = new_table("next token", "before", "after", numbers=("before", "after"))
    for row in results["before_after"][0]:
        add_row(before, repr(row["token"]), f"{row['before']:.3f}", f"{row['after']:.3f}")
    stdout().print(before)
    if results["no_control"]:
        note(f"No matched random control: {results['no_control']}")


def show_kinds(model: Any, as_json: bool) -> None:
    """What the language has, and why this model does not take some of it."""
    from probes.interventions import KINDS, offered_operations

    points = [point.describe() for point in model.hook_points.points.values()]
    found = offered_operations(
        points, architecture=model.architecture, dictionaries=("a dictionary given with --dictionary",)
    )
    if as_json:
        rows = {
            kind: {"example": f"{spec.verb} {spec.example}", "words": spec.words, "places": found[kind].places,
                   "refused": found[kind].reason}
            for kind, spec in KINDS.items()
        }  # fmt: skip
        print_json(rows)
        return
    table = new_table("example", "what it does", "", wide=("what it does",))
    for kind, spec in KINDS.items():
        add_row(
            table, f"{spec.verb} {spec.example}", spec.words, f"no: {found[kind].reason}" if found[kind].reason else ""
        )
    stdout().print(table)
