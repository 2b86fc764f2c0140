"""`workbench bdh`: synapses, sparsity, neuron graph, concepts and merges of a Dragon Hatchling, as the dashboard's pages measure them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from app.commands._bdh_synapses import reads_command, synapses_command, who_command
from app.commands._console import Failure, note, read_text
from app.commands._measure import Figure, Model, measure, report
from app.commands._options import AsJson, Out, TextFile, Words, complete_models, existing_file, existing_folder
from app.view_state import ViewState

PANEL = "Look inside"
GRAPHS = ("x", "y", "state", "coactivation")

group = typer.Typer(
    help="Look inside a BDH: synapses, sparsity, neuron graph, concepts, merges. Edits of its memory: `workbench intervene`.",
    rich_markup_mode="markdown",
    no_args_is_help=True,
)
group.command("synapses")(synapses_command)
group.command("who")(who_command)
group.command("reads")(reads_command)


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
    from app.measure.sparsity import start_sparsity
    from app.panels.sparsity import PANELS

    services, run = measure(
        lambda services: start_sparsity(services, model, content), out, (model,), f"sparsity of {model}"
    )
    report(
        services, ViewState(page="sparsity"), run, [*PANELS[1:5], PANELS[0], PANELS[5]], as_json=as_json, figure=figure
    )


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
    positive: Annotated[Path | None, existing_file("Or sentences of your own, one a line (group | sentence).")] = None,
    negative: Annotated[Path | None, existing_file("And those without the concept.")] = None,
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
        Path | None, existing_folder("A folder of `workbench features`: its best feature is one more rival.")
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
