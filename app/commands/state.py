"""`workbench state`: what one layer's memory keeps of a text, token by token, and what an edit of it changes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.commands._console import Failure, add_row, four_digits, new_table, note, print_json, read_text, stdout
from app.commands._options import AnyModel, AsJson, TextFile, Words, open_model

if TYPE_CHECKING:
    from probes.state_report import MemoryReport

PANEL = "Look inside"
MOST_TOKENS = 2000
"""The retention matrix asks the state after every token for every key."""
AGES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def command(
    model: AnyModel,
    text: Words = None,
    file: TextFile = None,
    layer: Annotated[
        int | None, typer.Option(help="Layer; the first one with a state when not given.", show_default=False)
    ] = None,
    do: Annotated[
        list[str] | None,
        typer.Option(
            help="An edit, such as 'reset state 1 after 8'; `workbench intervene --list` has all.", show_default=False
        ),
    ] = None,
    erase_key: Annotated[
        int | None, typer.Option(help="Erase what answers this token's key, after --after.", show_default=False)
    ] = None,
    implant: Annotated[
        str | None,
        typer.Option(
            help="KEY:VALUE, two tokens: answer the key of one with the value of the other, after --after.",
            show_default=False,
        ),
    ] = None,
    after: Annotated[
        int | None, typer.Option(help="The token after which --erase-key and --implant act.", show_default=False)
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(
            help="Write the retention matrix of every head as a page (.html) or a figure (.json).", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what one layer's memory keeps of a text: gates and writes, what it still remembers, how many directions it uses.

    Edits are those of `workbench intervene`, and two more that need keys: --erase-key and --implant.

    Examples: `workbench state gated-deltanet-random "one two one"`, or
    `workbench state retnet-english "one two one" --implant 0:4 --after 7 --json`
    """
    content = read_text(text, file)
    if figure is not None and figure.suffix not in (".html", ".json"):
        raise Failure(f"--figure {figure} has no known ending", "Write a file that ends in .html or .json.")

    from probes.state_report import first_with_state, memory_report

    loaded = open_model(model)
    tokens = loaded.to_tokens(content)
    if tokens.shape[1] > MOST_TOKENS:
        raise Failure(
            f"the text has {tokens.shape[1]:,} tokens",
            f"The command reads at most {MOST_TOKENS:,}; `workbench trace` reads more.",
        )
    number = first_with_state(loaded) if layer is None else layer
    if not -loaded.n_layers <= number < loaded.n_layers:
        raise Failure(f"there is no layer {number}", f"The layers are 0 to {loaded.n_layers - 1}.")
    number %= loaded.n_layers
    hooks = edits(loaded, tokens, number, do or [], erase_key, implant, after)
    report = memory_report(loaded, tokens, number, hooks=hooks, positions=_spectrum_places(tokens.shape[1]))
    strings = (
        [str(i) for i in tokens[0].tolist()]
        if loaded.tokenizer is None
        else loaded.tokenizer.token_strings(tokens[0].tolist())
    )
    said = [each.in_words() for each in hooks if hasattr(each, "in_words")]
    if figure is not None:
        write_figure(report, strings, figure)
    if as_json:
        print_json({"model": model, "strings": strings, "edits": said, **report.to_json()})
        return
    show(report, strings)
    for words in said:
        note(f"Edit: {words}")
    if figure is not None:
        note(f"The retention matrix is in {figure}.")


def edits(
    model: Any, tokens: Any, layer: int, lines: list[str], erased: int | None, implanted: str | None, after: int | None
) -> list[Any]:
    """The interventions of the options, in their order. Failure for options that do not fit."""
    from probes.interventions import parse
    from probes.interventions.executor import Executor
    from probes.state_tools import keys_and_values
    from probes.state_tools_edits import erase_key, implant

    if (erased is not None or implanted is not None) and after is None:
        raise Failure("--erase-key and --implant act after a token", "Say which: --after 8.")
    if after is not None and erased is None and implanted is None:
        raise Failure(
            "--after does nothing without --erase-key or --implant", "In --do, write 'reset state 1 after 8'."
        )
    chosen = Executor(model, [tokens]).hooks(parse(lines, tokens.shape[1]), 0) if lines else []
    for option, token in (("--erase-key", erased), ("--after", after)):
        if token is not None:
            _check_token(option, token, tokens.shape[1])
    if erased is not None:
        keys, _ = keys_and_values(model, tokens, layer)
        chosen += erase_key(model, layer, keys[0, :, erased], after=after)
    if implanted is not None:
        key, colon, value = implanted.partition(":")
        if not (colon and key.strip().isdecimal() and value.strip().isdecimal()):
            raise Failure(
                f"--implant {implanted!r} is not understood", "Write KEY:VALUE, two tokens by number, such as 3:9."
            )
        for token in (int(key), int(value)):
            _check_token("--implant", token, tokens.shape[1])
        keys, values = keys_and_values(model, tokens, layer)
        chosen += implant(model, layer, keys[0, :, int(key)], values[0, :, int(value)], after=after)
    return chosen


def _check_token(option: str, token: int, length: int) -> None:
    if not 0 <= token < length:
        raise Failure(f"{option}: there is no token {token}", f"The text has {length} tokens, counted from 0.")


def _spectrum_places(length: int) -> list[int]:
    """The ends of the quarters of the text."""
    return sorted({max(0, length * quarter // 4 - 1) for quarter in (1, 2, 3, 4)})


def show(report: MemoryReport, strings: list[str]) -> None:
    """Three tables: tokens (means over heads), the forgetting curve by head, the spectrum by head."""
    columns = {name: column[0].mean(0).tolist() for name, column in report.table.items()}
    columns["loss"] = report.loss.tolist()
    if report.divergence is not None:
        columns["divergence"] = report.divergence.tolist()
    title = f"layer {report.layer} ({report.kind})"
    table = new_table(title, "token", *columns, numbers=tuple(columns))
    for place, string in enumerate(strings):
        add_row(table, place, repr(string)[1:-1], *(four_digits(column[place]) for column in columns.values()))
    stdout().print(table)
    if report.forgetting is None:
        note(report.no_retention)
    else:
        ages = [age for age in AGES if age < len(strings)]
        headers = [f"{age} ago" if age else "at once" for age in ages]
        table = new_table("what is remembered (cosine)", *headers, numbers=headers)
        for head, curve in enumerate(report.forgetting):
            add_row(table, f"head {head}", *(f"{curve[age]:.2f}" for age in ages))
        stdout().print(table)
    if report.spectrum is not None:
        headers = [f"after {place}" for place in report.spectrum.positions]
        table = new_table("effective rank", *headers, numbers=headers)
        ranks = report.spectrum.effective_rank[0].reshape(
            len(headers), -1
        )  # a row for each head, or head and level, or the one state
        for row in range(ranks.shape[1]):
            add_row(table, f"state {row}", *(f"{rank:.2f}" for rank in ranks[:, row]))
        stdout().print(table)


def write_figure(report: MemoryReport, strings: list[str], path: Path) -> None:
    """One map per head: row = the state after a token, column = the token whose key it is asked for. Written whole or not at all."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    if report.retention is None:
        raise Failure("there is no retention matrix to draw", report.no_retention)
    cosine = report.retention.cosine[0].numpy(force=True)
    figure = make_subplots(1, len(cosine), subplot_titles=[f"head {head}" for head in range(len(cosine))])
    names = [f"{place} {string}" for place, string in enumerate(strings)]
    for head, matrix in enumerate(cosine):
        figure.add_trace(
            go.Heatmap(z=matrix, x=names, y=names, zmin=-1, zmax=1, colorscale="RdBu_r", showscale=head == 0),
            1,
            head + 1,
        )
        figure.update_xaxes(title="asked for token", col=head + 1)
    figure.update_yaxes(autorange="reversed")
    figure.update_yaxes(title="state after token", col=1)
    figure.update_layout(
        title=f"Layer {report.layer} ({report.kind}): cosine between the state's answer to a key and its value"
    )
    text = figure.to_html(include_plotlyjs=True) if path.suffix == ".html" else figure.to_json()
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
