"""Probes on other libraries' models, end to end: a circuit that is known, in GPT-NeoX of transformers and in a bridge of TransformerLens.

The shipped induction circuit has rotary attention between layer norms and no MLP; GPT-NeoX with MLPs of zero computes the same. So what
the probes must find is known: previous-token heads in layer 0, induction and retrieval heads in layer 1, and which feeds which.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from models.decoder import Decoder
from models.interop.subject import NotASubject, TransformersSubject, hooked
from probes.battery import NoAnswer, run_probes
from probes.heads import head_scores
from probes.retrieval import feeders, masking_curve, needle_grid, needle_recall, retrieval_scores
from probes.sinks import find_sinks
from probes.statistics import attention_statistics
from tests.models.pretrained.reference import CASES, largest, write
from workbench import Ablate, BlockEdge
from workbench.instrument.errors import RefusedByPattern
from workbench.lab.tasks import make_task


def as_gpt_neox(circuit: Any) -> Any:
    """The circuit's weights in transformers' GPT-NeoX; its MLPs, and the biases that ours lacks, are zero."""
    import transformers

    config = transformers.GPTNeoXConfig(
        vocab_size=256, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=8,
        max_position_embeddings=512, rotary_pct=1.0, use_parallel_residual=True, layer_norm_eps=1e-5, tie_word_embeddings=False,
    )  # fmt: skip
    theirs = transformers.GPTNeoXForCausalLM(config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "mlp" in name or name.endswith("bias"):
                parameter.zero_()
        theirs.gpt_neox.embed_in.weight.copy_(circuit.W_E)
        theirs.get_output_embeddings().weight.copy_(circuit.W_U.T)
        norms = [(theirs.gpt_neox.final_layer_norm, circuit.ln_final)]
        for block, layer in zip(circuit.blocks, theirs.gpt_neox.layers, strict=True):
            norms.append((layer.input_layernorm, block.ln1))
            fused = torch.stack(
                [getattr(block.attn, part).weight.view(4, 32, 128) for part in ("query", "key", "value")], 1
            )
            layer.attention.query_key_value.weight.copy_(fused.flatten(0, 2))  # head by head: its query, key and value
            layer.attention.dense.weight.copy_(block.attn.output.weight)
        for norm, own in norms:
            norm.weight.copy_(own.w)
            norm.bias.copy_(own.b)
    return theirs.eval()


@pytest.fixture(scope="module")
def circuit() -> Decoder:
    return models.load("induction-circuit")


@pytest.fixture(scope="module", params=["transformers", "bridge"])
def subject(request: pytest.FixtureRequest, circuit: Decoder) -> TransformersSubject:
    theirs = as_gpt_neox(circuit)
    if request.param == "transformers":
        return hooked(theirs)
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    return hooked(build_bridge_from_module(theirs, type(theirs).__name__, hf_config=theirs.config))


@pytest.fixture(scope="module")
def batch() -> Any:
    return make_task("induction", vocab_size=128, length=97, min_period=4, max_period=20, seed=7).batch(
        8, 3, "validation"
    )


def test_it_computes_the_circuit(subject: TransformersSubject, circuit: Decoder, batch: Any) -> None:
    with torch.no_grad():
        logits, cache = subject.run_with_cache(batch.tokens)
        expected, wanted = circuit.run_with_cache(batch.tokens)
    assert largest(logits - expected) < 1e-3 * largest(expected)
    for layer in (0, 1):
        assert largest(cache["pattern", layer] - wanted["pattern", layer]) < 1e-4
        assert subject._by_module and largest(cache["z", layer]) > 0.01


def test_the_textbook_heads(subject: TransformersSubject, circuit: Decoder, batch: Any) -> None:
    scores = head_scores(subject, batch, ("previous_token", "induction"))
    previous, induction = scores["previous_token"], scores["induction"]
    assert previous[0].max() > 0.8 and previous[1].max() < 0.1
    assert induction[1].max() > 0.5 and induction[0].max() < 0.1
    assert np.allclose(induction, head_scores(circuit, batch, "induction")["induction"], atol=1e-4)


def test_both_halves_are_needed(subject: TransformersSubject, batch: Any) -> None:
    """Edits of outputs and of patterns: without either half, or without what the first half reads, nothing is retrieved."""
    scores = head_scores(subject, batch, ("previous_token", "induction"))
    previous = [head for head in range(4) if scores["previous_token"][0, head] > 0.5]
    readers = [head for head in range(4) if scores["induction"][1, head] > 0.2]
    rows = list(range(1, batch.tokens.shape[1] - 1))

    def accuracy(hooks: list[Any]) -> float:
        with torch.no_grad():
            guess = subject.run_with_hooks(batch.tokens[:, :-1], hooks=hooks).argmax(-1)
        counted = batch.loss_mask[:, 1:]
        return float(((guess == batch.tokens[:, 1:]) & counted).sum() / counted.sum())

    def cut(back: int) -> list[Any]:
        """Those heads read nothing of the token `back` places before."""
        return [BlockEdge(layer=0, heads=previous, queries=[row], keys=[row - back]) for row in rows if row - back >= 0]

    assert accuracy([]) > 0.98
    assert accuracy([Ablate("blocks.0.attn.hook_z", heads=previous)]) < 0.2
    assert accuracy([Ablate("blocks.1.attn.hook_z", heads=readers)]) < 0.2
    assert accuracy(cut(1)) < 0.2 and accuracy(cut(3)) > 0.9


def test_retrieval_heads_and_what_feeds_them(subject: TransformersSubject, circuit: Decoder) -> None:
    runs = needle_grid(128, (40,), (0.2, 0.8), needle_length=5, repeats=4, seed=3)
    with pytest.raises(RefusedByPattern, match="whole_patterns=True"):
        retrieval_scores(subject, runs)
    found, expected = retrieval_scores(subject, runs, whole_patterns=True), retrieval_scores(circuit, runs)
    assert np.allclose(found.scores, expected.scores, atol=1e-6) and np.allclose(found.recall, expected.recall)
    assert found.best(1)[0][0] == 1 and found.best(1)[0][2] > 0.5 and found.scores[0].max() < 0.1
    layer, head, _ = found.best(1)[0]
    fed, wanted = (feeders(model, runs, (int(layer), head)) for model in (subject, circuit))  # type: ignore[arg-type]
    assert fed == pytest.approx(wanted, abs=1e-4) and list(fed)[1][0] == 0
    assert (
        needle_recall(subject, runs).mean() > 0.8 > 0.3 > needle_recall(subject, runs, found.retrieval_heads()).mean()
    )
    curve, own = (masking_curve(model, runs, found, (1, 4), controls=2) for model in (subject, circuit))
    assert curve == own and curve["top"][1] < 0.3 < 0.8 < curve["plain"]


def test_sinks_and_statistics(subject: TransformersSubject, circuit: Decoder, batch: Any) -> None:
    """The circuit has no sinks at the published threshold; below it, the same tokens of the same heads."""
    mine, theirs = (find_sinks(m, batch.tokens, threshold=0.03, whole_patterns=True) for m in (subject, circuit))
    for name in ("first_mass", "sink_rate", "sink_mass", "value_ratio", "residual_ratio"):
        assert np.allclose(getattr(mine, name), getattr(theirs, name), atol=1e-3, equal_nan=True), name
    places = [{(s.layer, s.head, s.sequence, s.position) for s in report.sinks} for report in (mine, theirs)]
    assert len(places[0] ^ places[1]) <= 2 and len(places[0]) > 10, "rounding may move one across the threshold"
    first = attention_statistics(subject, batch.tokens, layers=0, statistics=["entropy"], whole_patterns=True)
    assert list(first) == [0], "one layer by itself: the run stops behind it"
    expected = attention_statistics(circuit, batch.tokens, layers=0, statistics=["entropy"])
    assert largest(first[0].entropy - expected[0].entropy) < 1e-3


def test_the_battery(subject: TransformersSubject, circuit: Decoder) -> None:
    """Every probe answers as on our own model, or says what it would need."""
    options: dict[str, Any] = {"vocab": 128, "length": 64, "sequences": 4, "compare": False}
    found = run_probes(subject, whole_patterns=True, **options)
    expected = run_probes(circuit, **options)
    refused = {name: str(answer) for name, answer in found.items() if isinstance(answer, NoAnswer)}
    assert set(refused) == {"local"} and "keys" in refused["local"], refused
    for name in ("induction", "census"):
        for score, values in expected[name].scores.items():
            assert np.allclose(found[name].scores[score], values, atol=1e-3, equal_nan=True), (name, score)
    assert np.allclose(found["retrieval"].scores, expected["retrieval"].scores, atol=1e-6)
    assert np.allclose(found["basin"].scores, expected["basin"].scores, atol=1e-3, equal_nan=True)
    bare = run_probes(subject, probes=("sinks", "retrieval"), **options)
    assert all(isinstance(answer, NoAnswer) and "whole_patterns=True" in str(answer) for answer in bare.values())


@pytest.mark.parametrize("name", ["falcon", "bloom", "gpt_neo", "gptj"])
def test_classes_that_would_be_measured_in_vain_are_refused(name: str, tmp_path: Path) -> None:
    """And the way that their message names leads to a model on which the probe answers."""
    theirs = write(CASES[name], tmp_path)
    with pytest.raises(NotASubject, match=rf"{type(theirs).__name__} never asks.*models\.load\(folder\)"):
        hooked(theirs)
    runs = needle_grid(60, (20,), (0.5,), needle_length=3, repeats=2)
    assert retrieval_scores(models.load(tmp_path), runs, success=-1).scores.shape[0] == 3
