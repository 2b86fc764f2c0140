"""`workbench trace`: run a model on a text and keep everything that the views need."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from app.commands._console import Failure, facts_table, note, print_json, progress_bar, read_text, stdout
from app.commands._options import AnyModel, AsJson, Out, TextFile, Words, open_model, open_store
from app.reading import reading

PANEL = "Look inside"


def command(
    model: AnyModel,
    text: Words = None,
    file: TextFile = None,
    out: Out = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Only the heavy arrays of these layers, such as 0,2-4; all when not given.", show_default=False
        ),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="What an encoder-decoder's encoder reads.", show_default=False)
    ] = None,
    title: Annotated[
        str | None, typer.Option(help="Title of the run; the text when not given.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a model on a text and keep what happened inside.

    The result is a run: the dashboard shows it, and `workbench.RunStore` opens it in Python.

    An encoder-decoder needs --source. An encoder with a head for masked tokens says what it would put at every [MASK] of the text.

    Examples: `workbench trace bdh-random "To be, or not to be"`, or `workbench trace bdh-random -f play.txt --json`
    """
    content = read_text(text, file)
    store = open_store(out)

    from workbench.lab.trace import trace_run

    opened = open_model(model)
    try:
        loaded, read = reading(opened, source, content)
    except ValueError as error:
        raise Failure(str(error), 'Of an encoder-decoder, and only there: --source "what its encoder reads".') from None
    chosen = None if layers is None else parse_layers(layers, loaded.n_layers)
    with progress_bar(f"tracing {model}") as progress:
        run = trace_run(loaded, read, store, title=title or content[:60], progress=progress, layers=chosen)
    manifest = run.manifest
    record = {
        "id": run.id,
        "path": run.path,
        "title": run.title,
        "model": manifest["model"]["name"],
        "tokens": len(manifest["tokens"]["ids"]),
        "layers": len(run.layers),
        "arrays": len(run.arrays()),
        "seconds": manifest.get("seconds"),
    }
    fills = masked_tokens(run, getattr(loaded.tokenizer, "mask_id", None))
    if as_json:
        print_json({**record, "masked": fills} if fills else record)
        return
    shown = {name: f"{value:.2f}" if isinstance(value, float) else value for name, value in record.items()}
    del shown["id"]
    for fill in fills:
        chances = zip(fill["tokens"], fill["probabilities"], strict=True)
        shown[f"at {fill['position']}"] = ", ".join(f"{token} {chance:.0%}" for token, chance in chances)
    stdout().print(facts_table("run", run.id, shown))
    where = f" --runs {store.root}" if out is not None else ""
    note(f"See it with `workbench serve{where}`.")


def masked_tokens(run: Any, mask: int | None, most: int = 5) -> list[dict[str, Any]]:
    """What an encoder would put at every masked token of its run: position, likeliest tokens and their probabilities."""
    if mask is None or not run.has("here.ids"):
        return []
    import numpy as np

    named, found = run.manifest["tokens"].get("predicted", {}), []
    for position in np.flatnonzero(run.array("tokens") == mask).tolist():
        ids, logs = (run.array(f"here.{name}")[position, :most] for name in ("ids", "log_probs"))
        tokens = [named.get(str(token), str(token)) for token in ids.tolist()]
        found.append({"position": position, "tokens": tokens, "probabilities": np.exp(logs).tolist()})
    return found


def parse_layers(text: str, n_layers: int) -> list[int]:
    """`0,2-4` to [0, 2, 3, 4]. Raises Failure for anything that is not layers of this model."""
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else not last)):
            raise Failure(f"{part.strip()!r} in --layers {text} is not a layer or a range", "Write for example 0,2-4.")
        low, high = int(first), int(last) if dash else int(first)
        if low > high or high >= n_layers:
            raise Failure(
                f"--layers {text}: {part.strip()} is out of range",
                f"The layers are 0 to {n_layers - 1}, low before high.",
            )
        chosen.update(range(low, high + 1))
    return sorted(chosen)
