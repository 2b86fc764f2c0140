"""The commands of `workbench bdh` that ask about the synapses of one text: the strongest, who wrote one, what a token reads."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer

from app.commands._console import Failure, add_row, new_table, note, print_json, read_text, stdout
from app.commands._measure import At, Figure, Model, Named, measure, report
from app.commands._options import AsJson, Out, TextFile, Words
from app.view_state import ViewState


def synapses_command(
    model: Model,
    text: Words = None,
    file: TextFile = None,
    by: Annotated[
        str, typer.Option(help="strength, change (since --since), or read: contribution to the logit of --logit.")
    ] = "strength",
    layer: Annotated[
        int | None, typer.Option(help="Into which layer; the last when not given.", min=1, show_default=False)
    ] = None,
    at: At = None,
    since: Annotated[
        int | None, typer.Option(help="--by change: the span begins after this token.", min=0, show_default=False)
    ] = None,
    logit: Annotated[str | None, typer.Option(help="--by read: one character.", show_default=False)] = None,
    figure: Figure = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """The strongest, most changed or most read synapses into a layer, and who wrote the first.

    Examples: `workbench bdh synapses bdh-english "the cat sat on the mat; the cat" --layer 2`,
    `workbench bdh synapses bdh-english "the cat sat on the mat; the ca" --by read --logit t --json`
    """
    for option, kind, value in (("--since", "change", since), ("--logit", "read", logit)):
        if value is not None and by != kind:
            raise typer.BadParameter(f"{option} goes with --by {kind}")
        if value is None and by == kind:
            raise typer.BadParameter(f"--by {kind} needs {option}")
    content = read_text(text, file)

    def start(services: Any, scene: Any) -> Any:
        from app.measure.synapses import start_search

        return start_search(services, scene, by, _layers(scene) - 1 if layer is None else layer, since, logit)

    _search(model, content, start, at, (), figure, out, as_json, ("top-synapses", "synapse-authors"))


def who_command(
    model: Model,
    synapse: Annotated[
        str, typer.Argument(help="layer.head.neuron-layer.head.neuron: from a neuron's y to a neuron's x above it.")
    ],
    text: Words = None,
    file: TextFile = None,
    at: At = None,
    figure: Figure = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Which tokens wrote a synapse, exactly, and how it grew.

    Example: `workbench bdh who bdh-english 1.0.210-2.2.190 "the cat sat on the mat; the cat"`
    """

    followed = ViewState.from_url("/", f"syn={synapse}").synapses
    if len(followed) != 1:
        raise typer.BadParameter(
            f"{synapse!r} is no synapse. Expected layer.head.neuron-layer.head.neuron, such as 1.0.210-2.2.190, from a lower to a "
            "higher layer."
        )
    content = read_text(text, file)

    def start(services: Any, scene: Any) -> Any:
        from app.measure.common import FormError
        from app.measure.synapses import start_search
        from workbench.lab.run_synapses import RunSynapses

        (ends,) = followed
        try:
            RunSynapses(scene.opened()).check((ends[:3], ends[3:]))
        except ValueError as error:
            raise FormError(f"{synapse}: {error}.") from None
        return start_search(services, scene, "strength", ends[3])

    shown = ("synapse-authors", "synapse-strength", "synapse-fixed", "synapse-current", "synapse-count")
    _search(model, content, start, at, followed, figure, out, as_json, shown)


def _layers(scene: Any) -> int:
    return len(scene.layers)


def _search(
    model: str, text: str, start: Any, at: int | None, followed: tuple[Any, ...], figure: Path | None, out: Path | None,
    as_json: bool, shown: tuple[str, ...],
) -> None:  # fmt: skip
    """Trace the text, then what `start(services, scene)` submits over that run."""
    from app.measure.common import checked_model
    from app.panels.synapses import PANELS
    from workbench.lab.trace import trace_run

    traced: list[Any] = []

    def both(services: Any) -> Any:
        loaded = services.models.load(checked_model(services, model))
        length = loaded.to_tokens(text).shape[1]
        if at is not None and at >= length:
            raise Failure(f"--at {at}: the text has {length} tokens", f"Give 0 to {length - 1}.")
        traced.append(trace_run(loaded, text, services.store, progress=services.jobs.report))
        services.models.names = (*services.models.names, traced[0].model["name"])
        return start(services, services.scene(ViewState(run=traced[0].id, query=at, synapses=followed)))

    services, run = measure(both, out, (model,), f"synapses of {model}")
    panels = {panel.id: panel for panel in PANELS}
    view = ViewState(page="synapses", run=traced[0].id, query=at, synapses=followed)
    report(services, view, run, [panels[name] for name in shown], as_json=as_json, figure=figure)


def reads_command(
    model: Model,
    text: Words = None,
    file: TextFile = None,
    logit: Annotated[
        str | None,
        typer.Option(
            help="The character whose logit is asked about; what the model expects when not given.", show_default=False
        ),
    ] = None,
    at: At = None,
    show: Annotated[int, typer.Option(help="Readings, and pairs of neurons of the first.", min=1)] = 10,
    as_json: AsJson = False,
) -> None:
    """What a token reads: from a logit to layer, head and past token, and to the pairs of neurons that match.

    Example: `workbench bdh reads bdh-english "the cat sat on the mat; the ca" --logit t`
    """
    content = read_text(text, file)
    if logit is not None and len(logit.encode()) != 1:
        raise typer.BadParameter(f"--logit {logit!r} is not one character of one byte")
    from app.measure.common import checked_model
    from probes import bdh

    catalogue: Any = SimpleNamespace(models=Named(model))
    loaded = catalogue.models.load(checked_model(catalogue, model))
    tokens = loaded.to_tokens(content)
    place = tokens.shape[1] - 1 if at is None else at
    if not 1 <= place < tokens.shape[1]:
        raise Failure(
            f"token {place} cannot be asked about",
            f"The text has tokens 0 to {tokens.shape[1] - 1}; the first reads nothing.",
        )
    wanted = int(loaded(tokens)[0, place].argmax()) if logit is None else logit.encode()[0]
    circuit = bdh.read_circuit(loaded, tokens, logit=wanted, at=place)
    names = circuit.tokens[0]
    readings = [
        {
            "layer": layer,
            "head": head,
            "token": past,
            "text": names[past],
            "contribution": part,
            "score": float(circuit.scores[0, layer, head, past]),
        }
        for layer, head, past, part in circuit.top(show)
    ]
    first = readings[0]
    pairs = bdh.matching_pairs(loaded, tokens, first["layer"], first["head"], past=first["token"], at=place, k=show)
    columns = {"pair": pairs.pairs, "score": pairs.contribution, "same": pairs.same, "cross": pairs.cross}
    matched = [
        dict(zip(columns, row, strict=True))
        for row in zip(*(column.tolist() for column in columns.values()), strict=True)
    ]
    (asked,) = loaded.tokenizer.token_strings([wanted])
    if as_json:
        print_json(
            {
                "token": place,
                "text": names[place],
                "logit": asked,
                "readings": readings,
                "score": pairs.score,
                "pairs": matched,
            }
        )
        return
    table = new_table(
        "layer",
        "head",
        "past token",
        "reads with",
        "adds to the logit",
        numbers=("layer", "head", "reads with", "adds to the logit"),
    )
    for each in readings:
        add_row(
            table,
            each["layer"],
            each["head"],
            f"{each['token']} ‘{each['text']}’",
            f"{each['score']:.4g}",
            f"{each['contribution']:+.4g}",
        )
    stdout().print(table)
    parts = {"part of the score": "score", "fired alike": "same", "by rotation": "cross"}
    table = new_table("neurons", *parts, numbers=parts)
    for each in matched:
        pair = f"{first['head']}·{2 * each['pair']}, {2 * each['pair'] + 1}"
        add_row(table, pair, *(f"{each[key]:+.4g}" for key in parts.values()))
    stdout().print(table)
    note(
        f"Token {place} ‘{names[place]}’, logit of ‘{asked}’. Below: the pairs of neurons behind the first line, "
        f"of {pairs.score:.4g} in all."
    )
