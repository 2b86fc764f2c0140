"""What Does BERT Look At? (Clark et al. 2019), on a published encoder: heads that attend by place, to special tokens, along syntax.

Four stages; nothing is trained but the parser that reads attention. Heads are chosen on one part of the data and scored on another.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from case_studies.bert_looks_at import figures
from case_studies.bert_looks_at.encoder import NoEncoder, load_encoder
from case_studies.bert_looks_at.surface import surface
from case_studies.bert_looks_at.syntax import coreference, parsers, relations
from case_studies.harness.context import Context
from case_studies.harness.evidence import NotRun
from workbench.lab.corpora import MissingData, find_data

Stage = Callable[[Context, Any], dict[str, Any]]
STAGES: dict[Stage, tuple[float, float]] = {
    surface: (0.0, 0.25), relations: (0.25, 0.55), coreference: (0.55, 0.8), parsers: (0.8, 0.99),
}  # fmt: skip
TREEBANK = ("en_ewt-ud-dev.conllu", "en_ewt-ud-test.conllu")
RELATION_CLAIMS = ("det", "obj", "case", "nsubj", "amod", "nmod_poss", "aux_pass")
MEASUREMENTS = (
    "previous_heads", "next_heads", "sep_largest_layer", "special_middle", "sep_over_cls", "sink_values", "first_layer_broader",
    "cls_broad_last", "same_layer_closer", "all_accuracy", *(f"gain_{name}" for name in RELATION_CLAIMS), "over_nulls",
    "coreference_gain", "coreference_over_word", "parser", "parser_over_neighbour", "parser_over_twin",
)  # fmt: skip


def run(context: Context) -> dict[str, Any]:
    try:
        model = load_encoder(context.settings["model"])
        for name in TREEBANK:
            find_data(name)
    except (NoEncoder, MissingData) as missing:
        return dict.fromkeys(MEASUREMENTS, NotRun(str(missing)))
    context.record(encoder=repr(model))
    done: dict[str, Any] = {}
    measured: dict[str, Any] = {}
    for stage, share in STAGES.items():
        found = context.each_seed(partial(_with_model, stage, model), stage=stage.__name__, share=share)
        done[stage.__name__] = found[0]
        measured |= found.measurements()
    save(context, done)
    return {name: measured.get(name, NotRun("too few such questions")) for name in MEASUREMENTS}


def _with_model(stage: Stage, model: Any, context: Context) -> dict[str, Any]:
    return stage(context, model)


def save(context: Context, done: dict[str, Any]) -> None:
    seen, pointing = done["surface"], done["relations"]["relations"]
    context.record(**seen["facts"], relations=pointing, coreference=done["coreference"]["coreference"])
    context.record(parser=done["parsers"]["parser_scores"])
    context.save_figure("special", figures.special_tokens(seen))
    context.save_figure("neighbours", figures.neighbours(seen))
    context.save_figure("entropy", figures.entropies(seen))
    context.save_figure("relations", figures.relations(pointing))
    if done["coreference"]["coreference"]:
        context.save_figure("coreference", figures.coreference(done["coreference"]["coreference"]))
    context.save_figure("parser", figures.parser(done["parsers"]["parser_scores"]))
    context.save_figure("alike", figures.alike(seen["distance"], seen["previous"].shape[0]))
    for name in ("previous", "next", "mass_cls", "mass_sep", "mass_punctuation", "entropy", "cls_entropy"):
        context.save_array(name, seen[name], axes=("layer", "head"), unit="nats" if "entropy" in name else None)
    context.save_array("distance", seen["distance"], axes=("head", "other_head"))
    context.save_array("parser.weights", done["parsers"]["parser_weights"], axes=("direction", "layer", "head"))
