"""Runs of models that read another text (the pattern over its tokens), and of encoders (what stands here); names of predicted tokens."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from workbench import Ablate
from workbench.lab.dense_layers import not_stored
from workbench.lab.factors import FactorError, LayerFactors
from workbench.lab.row_statistics import row_statistics
from workbench.lab.run_format import RunError, check_manifest
from workbench.lab.runs import RunStore
from workbench.lab.trace import trace_run

SOURCE, TEXT = "eine kleine Katze", "a cat"


def lively(name: str, **changes: object) -> Any:
    model = models.build(name, **changes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path)


def test_the_pattern_over_the_source_is_stored(store: RunStore) -> None:
    """Whole and with its summaries, against the model's own pattern by plain numpy."""
    model = lively("t5").with_source(SOURCE)
    run = trace_run(model, TEXT, store)
    kept = run.manifest["source"]
    assert kept["text"] == SOURCE and kept["ids"] == list(SOURCE.encode()) and len(kept["strings"]) == len(SOURCE)
    expected = {layer: pattern.values[0].detach().numpy() for layer, pattern in model.patterns(TEXT).items()}
    for layer in (1, 3):
        record, whole = run.layer(layer), expected[layer]
        assert (record["kind"], record["form"], record["n_columns"]) == ("cross_attention", "dense", len(SOURCE))
        assert record["pattern"]["columns"] == "source tokens" and not record.get("not_stored")
        factors = LayerFactors.from_run(run, layer)
        assert (factors.length, factors.columns) == (len(TEXT), len(SOURCE)) and factors.visible().all()
        for head in range(record["n_heads"]):
            assert np.allclose(factors.pattern(head), whole[head], atol=1e-6)
            assert np.allclose(factors.pattern(head, [4, 1], slice(3, 16)), whole[head][[4, 1], 3:16], atol=1e-6)
            assert np.allclose(factors.row(head, 2), whole[head, 2], atol=1e-6)
            assert np.allclose(factors.received(head), whole[head].mean(0), atol=1e-6)
            assert np.allclose(factors.entropy(head), -(whole[head] * np.log(whole[head])).sum(-1), atol=1e-5)
            columns = np.add.reduceat(whole[head], [0, 4, 8, 12], axis=1)
            assert np.allclose(factors.overview(head, (5, 4), kind="sum")[:, 0], columns[:, 0], atol=1e-6)
        assert np.allclose(run.array(f"received.{layer}"), whole.mean(1), atol=1e-6)
        assert run.array(f"overview.{layer}").shape == (record["n_heads"], len(TEXT), len(SOURCE))
        assert np.ptp(whole, axis=-1).max() > 0.02, "not everything alike"
    assert "n_columns" not in run.layer(0) and run.array("layer.0.pattern").shape[1:] == (len(TEXT), len(TEXT))


def test_questions_that_make_no_sense_between_two_texts(store: RunStore) -> None:
    run = trace_run(lively("t5").with_source(SOURCE), TEXT, store)
    factors = LayerFactors.from_run(run, 1)
    with pytest.raises(FactorError, match="no distance between its rows and columns"):
        factors.offset_profile(0)
    with pytest.raises(FactorError, match="no token is the reader's own"):
        row_statistics(factors, 0)
    with pytest.raises(FactorError, match="the source has 17 tokens"):
        factors.value(0, 0, 17)
    with pytest.raises(FactorError, match="the run has 5 tokens"):
        factors.value(0, 5, 0)


@pytest.mark.parametrize("how", ["config", "ids", "read already"])
def test_where_a_source_comes_from(store: RunStore, how: str) -> None:
    """The preset's own, token ids, or what the encoder gave, whose ids nobody knows any more."""
    model = lively("t5")
    source = {"config": None, "ids": torch.tensor([5, 6, 7]), "read already": model.encode(SOURCE)}[how]
    run = trace_run(model if source is None else model.with_source(source), TEXT, store)
    kept = run.manifest["source"]
    wanted = {"config": list(b"A source."), "ids": [5, 6, 7], "read already": [-1] * len(SOURCE)}[how]
    assert kept["ids"] == wanted and run.layer(1)["n_columns"] == len(wanted)
    assert kept["text"] == {"config": "A source.", "ids": "\x05\x06\x07", "read already": None}[how]


def test_a_source_is_asked_for(store: RunStore) -> None:
    config = lively("t5").config
    model = models.build("t5", config=models.architecture("t5").config(**{**vars(config), "source": None}))
    with pytest.raises(ValueError, match=r"reads a source besides the text.*with_source"):
        trace_run(model, TEXT, store)
    with pytest.raises(ValueError, match="a batch of 2 sources"):
        trace_run(model.with_source(torch.zeros(2, 4, dtype=torch.long)), TEXT, store)
    assert store.list() == []


def test_an_edited_run_keeps_the_edited_pattern(store: RunStore) -> None:
    model = lively("t5").with_source(SOURCE)
    uniform = torch.full((len(TEXT), len(SOURCE)), 1 / len(SOURCE))
    from workbench import EditPattern

    edit = EditPattern(layer=1, heads=2, value=uniform)
    run = trace_run(model, TEXT, store, interventions=[edit, Ablate("blocks.0.hook_attn_out")])
    assert run.layer(1)["overwritten"] == ["pattern"]
    assert np.allclose(LayerFactors.from_run(run, 1).pattern(2), uniform.numpy())


def test_longer_than_stored_whole(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    import workbench.lab.trace as trace

    monkeypatch.setattr(trace, "LARGEST_PATTERN", 4 * 5 * 16)
    monkeypatch.setattr(trace, "STORED_ROWS", 2)
    model = lively("t5").with_source(SOURCE)
    run = trace_run(model, TEXT, store)
    whole = model.patterns(TEXT)[1].values[0].detach().numpy()
    assert run.array("layer.1.pattern_rows").shape == (4, 2, 17)
    factors = LayerFactors.from_run(run, 1)
    assert not factors.whole and (factors.length, factors.columns) == (5, 17)
    assert np.allclose(factors.row(1, 4), whole[1, 4], atol=1e-6)
    assert not run.has("layer.1.pattern") and run.has("layer.0.pattern"), "the text's own pattern is smaller"
    assert "2 of its 5 rows" in run.layer(1)["not_stored"][0]
    assert "4 × 5 × 17" in not_stored({"n_heads": 4}, "none", 0, 5, (), 17)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["layers"][1].update(n_columns=16), "layer 1 has 16 columns, expected the source's 17 tokens"),
        (lambda m: m["layers"][1].update(n_columns=0), "n_columns is 0, expected a positive number"),
        (lambda m: m.update(source=None), "layer 1 has 17 columns"),
        (lambda m: m["source"].update(ids=[1]), "source has 1 ids but 17 strings"),
        (lambda m: m["arrays"]["layer.1.pattern"].update(shape=[4, 5, 5]), r"'layer.1.pattern' has shape \[4, 5, 5\]"),
        (lambda m: m["arrays"]["received.1"].update(shape=[4, 5]), r"'received.1' has shape \[4, 5\]"),
        (lambda m: m["tokens"].update(predicted={"3": 4}), "predicted is not an object of texts"),
    ],
)
def test_a_manifest_that_contradicts_itself(store: RunStore, change: Callable[[dict], object], message: str) -> None:
    manifest = deepcopy(trace_run(lively("t5").with_source(SOURCE), TEXT, store).manifest)
    check_manifest(manifest)
    change(manifest)
    with pytest.raises(RunError, match=message):
        check_manifest(manifest)


def test_an_encoder_with_a_head_says_what_stands_here(store: RunStore) -> None:
    model = lively("bert", masked_head="gelu")
    run = trace_run(model, TEXT, store)
    best = model(TEXT).log_softmax(-1)[0].topk(10, dim=-1)
    assert run.array("here.ids").tolist() == best.indices.tolist()
    assert np.allclose(run.array("here.log_probs"), best.values.detach().numpy(), atol=1e-5)
    assert not (run.has("loss") or run.has("next.ids")), "nothing is said of what comes next"
    bare = trace_run(lively("bert"), TEXT, store)
    assert not any(bare.has(name) for name in ("loss", "next.ids", "here.ids"))


def test_predicted_tokens_have_names(store: RunStore) -> None:
    """Of tokenizers whose ids say nothing by themselves, also for tokens that the text does not hold."""

    class Letters:
        name, vocab_size = "letters", 256

        def encode(self, text: str) -> list[int]:
            return [ord(letter) - 97 for letter in text]

        def decode(self, ids: list[int]) -> str:
            return "".join(chr(97 + i) for i in ids)

        def token_strings(self, ids: list[int]) -> list[str]:
            return [f"«{i}»" for i in ids]

    model = lively("gpt2")
    model.tokenizer = Letters()
    run = trace_run(model, "abc", store)
    named = run.manifest["tokens"]["predicted"]
    assert named == {str(i): f"«{i}»" for i in sorted(set(run.array("next.ids").ravel().tolist()))}
    assert "predicted" not in trace_run(lively("gpt2"), "abc", store).manifest["tokens"], "bytes need no table"
