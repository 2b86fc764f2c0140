"""What the shipped models show: concept synapses and their rivals, wiring, sparsity, and what the state is made of.

One model each, so that spread is over concepts, pairs of heads or windows of text and not over training seeds. Sentences are generated
anew; they come from the distribution that `bdh-concepts` was trained on. The models are small, and every number is about them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import models
from case_studies.harness.context import Context
from case_studies.harness.evidence import Sample
from models.bdh.model import BDH
from probes.bdh import (
    ConceptSynapses,
    Synapse,
    causal_check,
    concept_transfer,
    degree_tails,
    explained_by_paper,
    find_concept_synapses,
    head_census,
    measure_sparsity,
    modularity_curve,
    parameter_graph,
    trace_synapses,
)
from workbench.lab.batches import TextBatches
from workbench.lab.concept_corpus import LabelledSentence, sentences

LAYERS = (1, 2)  # y of the second layer to x of the third: the middle, as in figure 13
CANDIDATES, MUTED = 20, 5
SENTENCE_SEED = 5
PROBES = ("linear probe, residual stream", "linear probe, neurons")
NEURONS = ("best neuron y", "best neuron x")


def only_once(context: Context) -> bool:
    """True for the first seed: a shipped model does not depend on it."""
    return context.seed == context.seeds[0]


def shipped(name: str) -> BDH:
    """A shipped model; "tiny" is an untrained one of as many layers, which checks that everything runs."""
    return models.build("bdh", "tiny", n_layers=4) if name == "tiny" else models.load(name)  # type: ignore[return-value]


# ---- concepts --------------------------------------------------------------------------------------------------------


def about(concept: str, language: str, number: int) -> tuple[list[LabelledSentence], list[LabelledSentence]]:
    """`number` sentences in which a word of the concept occurs, and as many in which none does."""
    inside: list[LabelledSentence] = []
    outside: list[LabelledSentence] = []
    for sentence in sentences("train", SENTENCE_SEED, language):
        (inside if concept in sentence.concepts else outside).append(sentence)
        if min(len(inside), len(outside)) >= number:
            break
    return inside[:number], outside[:number]


def concepts(context: Context) -> dict[str, Any]:
    """Search, rivals, transfer and cause for every concept of the settings."""
    if not only_once(context):
        return {"skipped": True}
    settings = context.settings
    model, names = shipped(settings["concept_model"]), settings["concepts"]
    exact = copy.deepcopy(model).double()  # a few of millions of synapses change predictions by less than float32 shows
    rows, traces = [], {}
    for number, concept in enumerate(names):
        context.progress(number / len(names), f"synapses of {concept}")
        texts = {
            language: tuple([s.text for s in half] for half in about(concept, language, settings["sentences"]))
            for language in ("en", "fr")
        }
        found = find_concept_synapses(
            model, *texts["en"], layers=[LAYERS], k=CANDIDATES, n_shuffles=settings["shuffles"], n_bootstrap=100,
            cancel=context.cancel,
        )  # fmt: skip
        context.progress((number + 0.5) / len(names), f"{concept} in the other language")
        moved = concept_transfer(
            model, texts["en"][0] + texts["fr"][0], texts["en"][1] + texts["fr"][1],
            positive_groups=["en"] * len(texts["en"][0]) + ["fr"] * len(texts["fr"][0]),
            negative_groups=["en"] * len(texts["en"][1]) + ["fr"] * len(texts["fr"][1]),
            layers=[LAYERS], k=CANDIDATES, cancel=context.cancel,
        )  # fmt: skip
        held_out = [text for text, seen in zip(texts["en"][0], found.discovery, strict=False) if not seen]
        cause = causal_check(
            exact, found.synapses[:MUTED], held_out, n_matched=settings["matched"], pool=1000, n_bootstrap=100,
            cancel=context.cancel,
        )  # fmt: skip
        across = {name: moved.mean_across(name) for name in ("best synapse", *NEURONS)}
        rows.append(
            {
                **compared(found),
                "transfer": across["best synapse"],
                "transfer_over_neuron": across["best synapse"] - np.mean([across[name] for name in NEURONS]),
                "cause": cause.difference,
                "cause_alone": cause.mean,
            }
        )
        traces[concept] = traced(model, found.synapses[0], {language: texts[language][0][0] for language in texts})
    results: dict[str, Any] = {name: Sample([float(row[name]) for row in rows], over="concepts") for name in rows[0]}
    return results | {"concept_names": list(names), "concept_rows": jsonable(rows), "traces": traces}


def compared(found: ConceptSynapses) -> dict[str, float]:
    """The best synapse on held-out sentences: its r, what it is ahead of shuffles, and its AUC minus that of rivals.

    Two single neurons are chosen as the synapse is, one by y and one by x; their mean is what a neuron reaches.
    """
    auc = {scored.name.split(":")[0]: scored.auc for scored in found.scores}
    synapse = auc["best synapse"]
    return {
        "concept_r": found.shuffles.observed_first,
        "concept_over_shuffles": found.shuffles.observed_first - float(found.shuffles.first.mean()),
        "shuffled_r": float(found.shuffles.first.mean()),
        "shuffle_p": found.shuffles.p_first,
        "significant": len(found.significant()),
        "synapse_over_neuron": synapse - float(np.mean([auc[name] for name in NEURONS])),
        "synapse_over_probe": synapse - float(np.mean([auc[name] for name in PROBES])),
        "synapse_auc": synapse,
        **{f"{name.rsplit(' ', 1)[-1]}_neuron_auc": auc[name] for name in NEURONS},
        "stream_probe_auc": auc[PROBES[0]],
        "neuron_probe_auc": auc[PROBES[1]],
    }


def traced(model: BDH, synapse: Synapse, texts: Mapping[str, str]) -> dict[str, Any]:
    """The strength of a synapse over the bytes of one sentence per language."""
    found = {
        language: {
            "text": text,
            "strength": trace_synapses(model, model.to_tokens(text), [synapse]).strength[0, :, 0].tolist(),
        }
        for language, text in texts.items()
    }
    return {"synapse": str(synapse), **found}


def jsonable(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    return [{name: float(value) for name, value in row.items()} for row in rows]


# ---- wiring ----------------------------------------------------------------------------------------------------------


def wiring(context: Context) -> dict[str, Any]:
    """Communities, degrees and tails of E D_x between every two heads of the shipped English model."""
    if not only_once(context):
        return {"skipped": True}
    settings = context.settings
    model = shipped(settings["text_model"])
    heads, neurons = range(model.config.n_heads), model.config.n_neurons // model.config.n_heads
    pairs = [(a, b) for a in heads for b in heads][: settings["pairs"]]
    excess, tails, ccdf = [], [], {}
    for number, (a, b) in enumerate(pairs):
        context.progress(0.7 * number / len(pairs), f"graph from head {a} to head {b}")
        dense = modularity_curve(model, a, b, edges=[neurons * settings["dense_degree"]], draws=1, seeds=2).points[0]
        excess.append(dense.observed.q - max(dense.mean(name) for name in dense.baselines))
        for way, tail in degree_tails(parameter_graph(model, a, b, mean_degree=settings["tail_degree"])).items():
            tails.append(
                {"way": way, "verdict": tail.verdict, "alpha": tail.alpha, "p": tail.p, "source": a, "target": b}
            )
            if a == b == 0:
                ccdf[way] = {"ccdf": tail.ccdf.tolist(), "fitted": tail.fitted.tolist(), "alpha": tail.alpha}
    context.progress(0.75, "modularity over numbers of edges")
    edges = [round(neurons * degree) for degree in settings["curve_degrees"]]
    curve = modularity_curve(model, 0, 0, edges=edges, draws=settings["graph_draws"], seeds=2, cancel=context.cancel)
    census = [
        float(pair.has_positive_tail)
        for name in dict.fromkeys([settings["text_model"], settings["concept_model"]])
        for pair in head_census(shipped(name))
    ]
    return {
        "modularity_excess": Sample(excess, over="pairs of heads"),
        "power_laws": Sample([float(tail["verdict"] == "power law") for tail in tails], over="degree distributions"),
        "log_normals": Sample([float(tail["verdict"] == "log-normal") for tail in tails], over="degree distributions"),
        "positive_tails": Sample(census, over="pairs of heads"),
        "tails": tails,
        "ccdf": ccdf,
        "curve": curve.to_json(),
    }


# ---- activity and state ----------------------------------------------------------------------------------------------


def reading(context: Context) -> dict[str, Any]:
    """Sparsity of the shipped models on held-out text, its tie to surprisal, and how much of the state the paper's σ explains."""
    if not only_once(context):
        return {"skipped": True}
    settings = context.settings
    x, y, tie, share, cosine = [], [], [], [], []
    for name, corpus in ((settings["text_model"], settings["text_corpus"]), (settings["concept_model"], "concepts")):
        model = shipped(name)
        windows = TextBatches(corpus, settings["window"], 1, validation_windows=settings["windows"])
        for number, (tokens, _) in enumerate(windows.validation_batches()):
            context.progress(number / settings["windows"], f"reading with {name}")
            activity = measure_sparsity(model, tokens)
            x.append(float(activity.mean("x").mean()))
            y.append(float(activity.mean("y").mean()))
            tie.append(float(activity.correlation("y").value.mean()))
            if number < settings["state_windows"]:
                parts = explained_by_paper(model, tokens)
                share.append([float(part.share.mean()) for part in parts])
                cosine.append([float(part.cosine.mean()) for part in parts])
    return {
        "shipped_y": Sample(y, over="windows of text"),
        "shipped_x": Sample(x, over="windows of text"),
        "surprisal_correlation": Sample(tie, over="windows of text"),
        "sigma_share": Sample([float(np.mean(row)) for row in share], over="windows of text"),
        "sigma_cosine": Sample([float(np.mean(row)) for row in cosine], over="windows of text"),
        "share_by_layer": np.array(share),
        "cosine_by_layer": np.array(cosine),
    }
