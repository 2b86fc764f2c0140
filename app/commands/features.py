"""`workbench features`: train a dictionary of sparse features on one site of a model, measure it, and read what it found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from app.commands._console import (
    Failure,
    add_row,
    facts_table,
    interruptible,
    new_table,
    note,
    print_json,
    progress_bar,
    stdout,
)
from app.commands._options import (
    RUNS_HELP,
    AsJson,
    complete_corpora,
    complete_models,
    open_model,
    open_store,
)

PANEL = "Look inside"
KINDS = ("topk", "batch_topk", "jumprelu", "gated", "standard")


def command(
    model: Annotated[str, typer.Argument(help="Model to look inside.", autocompletion=complete_models)],
    site: Annotated[str, typer.Option(help="Hook point, such as blocks.2.hook_resid_post.")],
    out: Annotated[
        Path,
        typer.Option(help="Folder for activations and dictionary; a stopped call continues there.", file_okay=False),
    ],
    corpus: Annotated[str, typer.Option(help="Corpus name or text file.", autocompletion=complete_corpora)] = "pydoc",
    kind: Annotated[str, typer.Option(help=f"Kind of dictionary: {', '.join(KINDS)}.")] = "topk",
    features: Annotated[int, typer.Option(help="Size of the dictionary.", min=1)] = 512,
    k: Annotated[
        int | None, typer.Option(help="Active features per token (topk, batch_topk): 16.", min=1, show_default=False)
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Weight of the penalty (the other kinds).", show_default=False)
    ] = None,
    head: Annotated[int | None, typer.Option(help="Only this head of the site.", show_default=False)] = None,
    every: Annotated[int, typer.Option(help="Read every n-th position only (states).", min=1)] = 1,
    sequences: Annotated[int, typer.Option(help="Sequences to read.", min=10)] = 400,
    context: Annotated[int, typer.Option(help="Tokens per sequence.", min=2)] = 128,
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=1)] = 2000,
    learning_rate: Annotated[float, typer.Option(help="Learning rate at its peak.")] = 1e-3,
    control: Annotated[bool, typer.Option(help="Also train on the model at random weights, for comparison.")] = True,
    show: Annotated[int, typer.Option(help="Features to show.", min=0)] = 10,
    runs: Annotated[Path | None, typer.Option(help=RUNS_HELP, file_okay=False, show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Find sparse features in a model.

    Example: `workbench features gpt-english --site blocks.2.hook_resid_post --out scratch/features`

    Ctrl-C keeps what is done; the same command goes on from there.
    """
    import models
    from probes.features.dictionaries import CONFIGS
    from probes.features.record import store_features
    from probes.features.study import corpus_tokens, find_features
    from probes.features.training import FeatureTraining
    from probes.progress import MeasurementCancelled
    from workbench.instrument.errors import suggestion
    from workbench.lab.activation_store import Site

    if kind not in CONFIGS:
        raise typer.BadParameter(f"unknown kind {kind!r}.{suggestion(kind, CONFIGS)} Known: {', '.join(KINDS)}.")
    if "topk" in kind and sparsity is not None:
        raise typer.BadParameter(f"--sparsity does nothing for {kind}, whose sparsity is --k")
    if "topk" not in kind and k is not None:
        raise typer.BadParameter(f"--k does nothing for {kind}, whose sparsity is --sparsity")
    choices: dict[str, Any] = {"n_features": features}
    choices |= {"k": 16 if k is None else k} if "topk" in kind else ({} if sparsity is None else {"sparsity": sparsity})
    store = open_store(runs)
    opened = open_model(model)
    twin = models.build(opened.architecture, config=opened.config) if control else None
    with interruptible() as cancel, progress_bar("features") as progress:
        try:
            found = find_features(
                opened, Site(site, head, every), corpus_tokens(opened, corpus), CONFIGS[kind](**choices), out,
                training=FeatureTraining(steps=steps, learning_rate=learning_rate), random_twin=twin, context=context,
                sequences=sequences, n_features=max(show, 1), progress=progress, cancel=cancel,
            )  # fmt: skip
            inside = out.resolve().parent == store.root.resolve()
            asked = {"corpus": corpus, "steps": steps, "learning_rate": learning_rate, "control": control}
            run = store_features(
                store, opened, found, folder=out.name if inside else "", settings=asked, progress=progress
            )
        except MeasurementCancelled:
            raise Failure("stopped", f"What is done is in {out}; the same command goes on from there.") from None
    if as_json:
        print_json({**found.to_json(), "folder": str(out), "id": run.id})
        return
    measured = found.evaluation
    facts: dict[str, object] = {
        "rows": f"{len(found.store):,} of {found.store.width(found.site.name)} numbers",
        "active per row": f"{measured.l0:.1f}",
        "unexplained variance": f"{measured.fvu:.3f}",
        "alive": f"{measured.alive:.0%}",
    }
    if found.control is not None:
        facts["random weights"] = f"{found.control.fvu:.3f} unexplained, {found.control.alive:.0%} alive"
    if found.recovery is not None:
        facts["loss recovered"] = f"{found.recovery.ce_score:.3f} (divergence {found.recovery.kl_score:.3f})"
    stdout().print(facts_table(kind, f"{found.model} {found.site.name}", facts))
    table = new_table(
        "feature",
        "fires on",
        "promotes",
        "strongest context",
        numbers=("feature", "fires on"),
        wide=("strongest context",),
    )
    strings = opened.tokenizer.token_strings if opened.tokenizer is not None else lambda ids: [str(i) for i in ids]
    for feature in found.features[:show]:
        best = feature.top[0] if feature.top else None
        words = strings(best.tokens) if best else []
        if best:
            words[best.focus] = f"»{words[best.focus]}«"
        promoted = " ".join(
            repr(s)[1:-1] for s in strings([t for t, _ in found.directions_to_tokens.get(feature.feature, [])[:5]])
        )
        add_row(table, feature.feature, f"{feature.density:.2%}", promoted, "".join(words).replace("\n", "⏎"))
    stdout().print(table)
    note(f"Dictionary and contexts are in {out}; `probes.features.load_dictionary` opens it.")
    note(f"Stored as {run.id} in {store.root}, for the Features page.")
