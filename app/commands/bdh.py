"""`workbench bdh`: synapses, sparsity, neuron graph, concepts and merges of a Dragon Hatchling, as the dashboard's pages measure them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from app.commands._console import Failure, note, read_text
from app.commands._options import RUNS_HELP, AsJson, TextFile, complete_models
from app.view_state import ViewState

PANEL = "Look inside"
MEASURES = ("strength", "change", "read")
GRAPHS = ("x", "y", "state", "coactivation")

group = typer.Typer(
    help="Look inside a BDH: synapses, sparsity, neuron graph, concepts, merges. Edits of its memory: `workbench intervene`.",
    rich_markup_mode="markdown",
    no_args_is_help=True,
)
Model = Annotated[
    str, typer.Argument(help="A BDH, from `workbench models`, or a folder of one.", autocompletion=complete_models)
]
Words = Annotated[str | None, typer.Argument(help="The text to read; - reads standard input.", show_default=False)]
Out = Annotated[Path | None, typer.Option("--out", "--runs", help=RUNS_HELP, file_okay=False, show_default=False)]
Figure = Annotated[
    Path | None, typer.Option(help="Also draw it, as one HTML file.", dir_okay=False, show_default=False)
]
At = Annotated[int | None, typer.Option(help="After which token; the last when not given.", min=0, show_default=False)]


# ---- synapses --------------------------------------------------------------------------------------------------------


@group.command("synapses")
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


@group.command("who")
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
    from app.commands._measure import measure, report
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


# ---- sparsity --------------------------------------------------------------------------------------------------------


@group.command("sparsity")
def sparsity_command(
    model: Model,
    text: Words = None,
    file: TextFile = None,
    figure: Figure = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Which share of neurons is active: by layer, head, token and time scale, and its correlation with surprisal.

    Example: `workbench bdh sparsity bdh-english --file story.txt --figure sparsity.html`
    """
    content = read_text(text, file)
    from app.commands._measure import measure, report
    from app.measure.sparsity import start_sparsity
    from app.panels.sparsity import PANELS

    services, run = measure(
        lambda services: start_sparsity(services, model, content), out, (model,), f"sparsity of {model}"
    )
    order = {"sparsity-layers": 0, "sparsity-surprise": 1, "sparsity-octiles": 2, "sparsity-tokens": 3}
    panels = sorted(PANELS, key=lambda panel: order[panel.id])
    report(services, ViewState(page="sparsity"), run, panels, as_json=as_json, figure=figure)


# ---- neuron graph ----------------------------------------------------------------------------------------------------


@group.command("graph")
def graph_command(
    model: Model,
    text: Words = None,
    file: TextFile = None,
    graph: Annotated[
        str, typer.Option(help="x or y: the weights E D_x, E D_y; state or coactivation: of a text.")
    ] = "x",
    source_head: Annotated[int, typer.Option(help="Head that the edges leave.", min=0)] = 0,
    target_head: Annotated[int, typer.Option(help="Head that the edges reach.", min=0)] = 0,
    edges: Annotated[int | None, typer.Option(help="How many edges: 1024 when not given.", show_default=False)] = None,
    noise_quantile: Annotated[
        float | None,
        typer.Option(help="Instead: edges above this share of the noise, such as 0.999.", show_default=False),
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Graphs of a text: the layer, 1 when not given.", min=0, show_default=False)
    ] = None,
    draws: Annotated[int, typer.Option(help="Graphs of each baseline.", min=2, max=50)] = 3,
    figure: Figure = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Communities, degrees and hubs of a graph of neurons, beside baselines of as many edges.

    Examples: `workbench bdh graph bdh-english --edges 3072`, `workbench bdh graph bdh-english --noise-quantile 0.999 --figure graph.html`,
    `workbench bdh graph bdh-english "the cat sat on the mat" --graph state --layer 2`
    """
    if edges is not None and noise_quantile is not None:
        raise typer.BadParameter("give one of --edges and --noise-quantile")
    of_text = graph in GRAPHS[2:]
    if not of_text and (text is not None or file is not None or layer is not None):
        raise typer.BadParameter(f"a text and --layer do nothing for --graph {graph}, which is made of weights")
    content = read_text(text, file) if of_text else ""
    from app.commands._measure import measure, report
    from app.measure.graph import start_graph
    from app.panels.graph import PANELS

    threshold = "edges" if noise_quantile is None else "noise_quantile"
    asked: tuple[Any, ...] = (model, graph, source_head, target_head, 1024 if edges is None else edges, content,
                              1 if layer is None else layer, draws, threshold, noise_quantile)  # fmt: skip
    services, run = measure(lambda services: start_graph(services, *asked), out, (model,), f"graph of {model}")
    report(services, ViewState(page="graph"), run, PANELS[1:] + PANELS[:1], as_json=as_json, figure=figure)


# ---- concepts --------------------------------------------------------------------------------------------------------


@group.command("concepts")
def concepts_command(
    model: Model,
    concept: Annotated[
        str | None, typer.Option(help="A labelled concept, such as animal or currency.", show_default=False)
    ] = None,
    positive: Annotated[
        Path | None,
        typer.Option(
            help="Or sentences of your own, one a line (group | sentence).",
            exists=True,
            dir_okay=False,
            show_default=False,
        ),
    ] = None,
    negative: Annotated[
        Path | None,
        typer.Option(help="And those without the concept.", exists=True, dir_okay=False, show_default=False),
    ] = None,
    sentences: Annotated[
        int | None,
        typer.Option(help="Labelled concepts: sentences of each set, 64 when not given.", min=8, show_default=False),
    ] = None,
    statistic: Annotated[str, typer.Option(help="strength, mean_strength or count.")] = "strength",
    layer: Annotated[
        int | None, typer.Option(help="Target layer; all when not given.", min=1, show_default=False)
    ] = None,
    head: Annotated[
        int | None, typer.Option(help="Target head; all when not given.", min=0, show_default=False)
    ] = None,
    shuffles: Annotated[int, typer.Option(help="Labellings in the control.", min=0)] = 9,
    draws: Annotated[int, typer.Option(help="Matched synapses in the causal check, 0 for none.", min=0)] = 5,
    features: Annotated[
        Path | None,
        typer.Option(
            help="A folder of `workbench features`: its best feature is one more rival.",
            file_okay=False,
            exists=True,
            show_default=False,
        ),
    ] = None,
    figure: Figure = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Synapses that tell two sets of sentences apart, beside neurons, probes, shuffled labels and a causal check.

    Examples: `workbench bdh concepts bdh-concepts --concept animal --layer 2`,
    `workbench bdh concepts bdh-english --positive cats.txt --negative tools.txt --shuffles 19 --json`
    """
    own = positive is not None or negative is not None
    if own == (concept is not None) or (own and (positive is None or negative is None)):
        raise typer.BadParameter("give either --concept, or both --positive and --negative")
    if own and sentences is not None:
        raise typer.BadParameter("--sentences goes with --concept: your own sentences are all used")
    inside, outside = (read_text(None, path) if path is not None else "" for path in (positive, negative))
    from app.commands._measure import measure, report
    from app.measure.concepts import NO_DICTIONARY, OWN, start_finding
    from app.panels.concepts import PANELS

    def start(services: Any) -> Any:
        return start_finding(
            services, model, concept or OWN, inside, outside, 64 if sentences is None else sentences, statistic, layer, head, shuffles,
            draws, features if features is not None else NO_DICTIONARY,
        )  # fmt: skip

    services, run = measure(start, out, (model,), f"concepts of {model}")
    report(services, ViewState(page="concepts"), run, PANELS, as_json=as_json, figure=figure)


# ---- merging ---------------------------------------------------------------------------------------------------------


@group.command("merge")
def merge_command(
    first: Model,
    second: Annotated[
        str,
        typer.Argument(
            help="Another BDH of the same depth, width and heads; initial:NAME is one with new weights.",
            autocompletion=complete_models,
        ),
    ],
    text: Words = None,
    file: TextFile = None,
    save: Annotated[
        Path | None,
        typer.Option(help="Also keep the merged model in this new folder.", file_okay=False, show_default=False),
    ] = None,
    figure: Figure = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Two models side by side in one, without training: losses, whose neurons work, and how exact a self-merge is.

    Example: `workbench bdh merge bdh-english initial:bdh-english "the cat sat on the mat" --save merged`
    """
    content = read_text(text, file)
    if save is not None and save.exists():
        raise Failure(f"{save} is there already", "Name a new folder.")
    from app.commands._measure import measure, report
    from app.measure.merging import open_parent, start_merging
    from app.panels.merging import PANELS

    services, run = measure(
        lambda services: start_merging(services, first, second, content),
        out,
        (first, second),
        f"merge of {first} and {second}",
    )
    if save is not None:
        import models
        from models.bdh.merge import merge

        merged, _ = merge([open_parent(services, name) for name in (first, second)], names=["first", "second"])
        models.save(merged, save)
    report(services, ViewState(page="merge"), run, PANELS, as_json=as_json, figure=figure)
    plain, exact = run.manifest["results"]["self_merge"]
    if not as_json:
        note(
            f"  Merged with itself, the first parent's logits change by {exact:.1e} of their size with ε → 0 in float64, "
            f"and by {plain:.1e} as it is."
        )
        if save is not None:
            note(f"  The merged model is in {save}.")
