"""The commands of `workbench bdh` that ask about the synapses of one text: the strongest, who wrote one, what a token reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from app.commands._console import Failure, add_row, new_table, note, print_json, read_text, stdout
from app.commands._measure import At, Figure, Model, drawn, measure, report, write_figures
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
    from app.panels.synapses import PANELS

    services, run, view = _over_a_trace(model, text, start, at, followed, out)
    panels = {panel.id: panel for panel in PANELS}
    report(
        services, view.change(page="synapses"), run, [panels[name] for name in shown], as_json=as_json, figure=figure
    )


def _over_a_trace(
    model: str, text: str, start: Any, at: int | None, followed: tuple[Any, ...], out: Path | None
) -> tuple[Any, Any, ViewState]:
    """Trace the text, then run what `start(services, scene)` submits over that trace: services, what came out, the view of the trace."""
    from app.measure.common import checked_model
    from workbench.lab.trace import trace_run

    view = ViewState(query=at, synapses=followed)

    def both(services: Any) -> Any:
        nonlocal view
        loaded = services.models.load(checked_model(services, model))
        length = loaded.to_tokens(text).shape[1]
        if at is not None and at >= length:
            raise Failure(f"--at {at}: the text has {length} tokens", f"Give 0 to {length - 1}.")
        traced = trace_run(loaded, text, services.store, progress=services.jobs.report)
        services.models.names = (*services.models.names, traced.model["name"])
        view = view.change(run=traced.id)
        return start(services, services.scene(view))

    services, run = measure(both, out, (model,), f"synapses of {model}")
    return services, run, view


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
    figure: Figure = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """What a token reads: from a logit to layer, head and past token, and to the pairs of neurons that match.

    Example: `workbench bdh reads bdh-english "the cat sat on the mat; the ca" --logit t`
    """
    content = read_text(text, file)
    if logit is not None and len(logit.encode()) != 1:
        raise typer.BadParameter(f"--logit {logit!r} is not one character of one byte")
    if at == 0 or (at is None and len(content) < 2):
        raise Failure("token 0 cannot be asked about", "Give a later one: the first reads nothing.")

    def start(services: Any, scene: Any) -> Any:
        from app.measure.reads import start_reads

        return start_reads(services, scene, logit)

    services, run, view = _over_a_trace(model, content, start, at, (), out)
    from app.panels.reads import PAIRS, PANELS, TOP

    scene = services.scene(view.change(page="reads", result=run.id))
    if figure is not None:
        write_figures(figure, run.title, [drawn(panel, scene) for panel in PANELS])
    scores, names, place = run.array("scores"), scene.tokens, run.manifest["settings"]["at"]
    readings = [
        {
            "layer": layer,
            "head": head,
            "token": past,
            "text": names[past],
            "contribution": float(TOP.contributions(scene)[layer, head, past]),
            "score": float(scores[layer, head, past]),
        }
        for layer, head, past in TOP.best(scene, show)
    ]
    if not readings:
        raise Failure("nothing was read", "No reading of this token changes this logit.")
    first, pairs = readings[0], PAIRS.pairs(scene)
    matched = [
        {"pair": pair, **{name: float(pairs[name][pair]) for name in pairs}}
        for pair in PAIRS.order(scene, show).tolist()
    ]
    whole, asked = float(pairs["score"].sum()), run.manifest["results"]["symbol"]
    if as_json:
        print_json(
            {
                "id": run.id,
                "path": run.path,
                "token": place,
                "text": names[place],
                "logit": asked,
                "readings": readings,
                "score": whole,
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
        f"of {whole:.4g} in all."
    )
    note(f"Stored as {run.id} in {services.store.root}; `workbench serve` shows it.")
