"""`workbench bdh`: every command beside the probe that it stands for, as JSON, for people and as a figure; what is typed wrongly."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import models
from app.commands import _measure
from models.bdh.merge import merge
from probes import bdh
from probes.features import FeatureTraining, TopK
from probes.features.study import find_features
from workbench.lab.runs import RunStore

MODEL = "bdh-random"
TEXT = "the cat sat on the mat, and the dog sat on the log; then the cat and the dog ran."
Command = Callable[..., object]


def rows(done: object, panel: str) -> list[list]:
    assert done.code == 0, done.err  # type: ignore[attr-defined]
    return done.json["panels"][panel]["rows"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ([], lambda model: bdh.strongest_synapses(model, TEXT, model.n_layers - 1, at=-1, k=50)),
        (["--layer", 1, "--at", 30], lambda model: bdh.strongest_synapses(model, TEXT, 1, at=30, k=50)),
        (["--by", "change", "--since", 9], lambda model: bdh.most_changed_synapses(model, TEXT, 2, span=(9, 80), k=50)),
        (
            ["--by", "read", "--logit", "t"],
            lambda model: bdh.most_read_synapses(model, TEXT, 2, logit=116, at=-1, k=50),
        ),
    ],
    ids=["strength", "earlier", "change", "read"],
)
def test_the_search_is_the_probes(workbench: Command, tmp_path: Path, options: list, call: Callable) -> None:
    done = workbench("bdh", "synapses", MODEL, TEXT, *options, "--out", tmp_path, "--json")
    expected = call(models.load(MODEL))
    found = rows(done, "top-synapses")
    np.testing.assert_allclose([row[-1] for row in found], expected.scores.numpy(), rtol=1e-6)
    first = expected.synapses[0]
    assert [int(cell) for cell in found[0][:-1]] == [
        first.source_layer,
        *first.source,
        first.target_layer,
        *first.target,
    ]
    assert [entry.kind for entry in RunStore(tmp_path).list()] == ["bdh-synapses", "trace"]


def test_who_wrote_a_synapse_at_a_token(workbench: Command, tmp_path: Path) -> None:
    model = models.load(MODEL)
    synapse = bdh.strongest_synapses(model, TEXT, 1, at=40, k=9).synapses[8]
    name = "0.{}.{}-1.{}.{}".format(*synapse.source, *synapse.target)
    done = workbench("bdh", "who", MODEL, name, TEXT, "--at", 40, "--out", tmp_path, "--json")
    expected = bdh.who_wrote_synapse(bdh.attribute_state(model, TEXT, 1, at=40), synapse, k=12)
    found = rows(done, "synapse-authors")
    assert [int(row[0]) for row in found] == [write.position for write in expected.writes]
    np.testing.assert_allclose([row[2] for row in found], [write.value for write in expected.writes], rtol=1e-5)
    strength = bdh.trace_synapses(model, TEXT, synapse).strength[0, :, 0].numpy()
    np.testing.assert_allclose([row[1] for row in rows(done, "synapse-strength")], strength, rtol=2e-3, atol=1e-4)


def test_what_a_token_reads(workbench: Command, tmp_path: Path) -> None:
    stored = ("--out", tmp_path / "runs")
    model = models.load(MODEL)
    circuit = bdh.read_circuit(model, TEXT, logit=ord("c"), at=30)
    done = workbench("bdh", "reads", MODEL, TEXT, "--logit", "c", "--at", 30, "--show", 5, "--json", *stored)
    assert done.code == 0, done.err  # type: ignore[attr-defined]
    found = done.json["readings"]  # type: ignore[attr-defined]
    assert [(r["layer"], r["head"], r["token"]) for r in found] == [place[:3] for place in circuit.top(5)]
    np.testing.assert_allclose([r["contribution"] for r in found], [place[3] for place in circuit.top(5)], rtol=1e-6)
    assert done.json["score"] == pytest.approx(found[0]["score"], rel=1e-4)  # type: ignore[attr-defined]
    every = workbench("bdh", "reads", MODEL, TEXT, "--at", 30, "--show", 99, "--json", *stored).json  # type: ignore[attr-defined]
    assert sum(pair["score"] for pair in every["pairs"]) == pytest.approx(every["score"], rel=1e-6)
    page = tmp_path / "reads.html"
    shown = workbench("bdh", "reads", MODEL, TEXT, "--figure", page, *stored)
    assert page.read_text("utf-8").count('class="plotly-graph-div"') == 3
    assert [entry.kind for entry in RunStore(tmp_path / "runs").list()].count("bdh-reads") == 3
    assert shown.code == 0 and "adds to the logit" in shown.out and "‘.’" in shown.err  # type: ignore[attr-defined]


def test_sparsity_and_its_figure(workbench: Command, tmp_path: Path) -> None:
    page = tmp_path / "sparsity.html"
    done = workbench("bdh", "sparsity", MODEL, TEXT, "--out", tmp_path / "runs", "--figure", page, "--json")
    expected = bdh.measure_sparsity(models.load(MODEL), TEXT)
    shares = {(row[0], int(row[1]), int(row[2])): row[3] for row in rows(done, "sparsity-layers")}
    for name in ("x", "gate", "y"):
        for (layer, head), share in np.ndenumerate(expected.mean(name).numpy()):
            assert shares[name, layer, head] == pytest.approx(share, rel=1e-5)
    drawn = page.read_text("utf-8")
    assert (
        drawn.count('class="plotly-graph-div"') == 5
        and drawn.count("data:image/png;base64,") == 1
        and "/img/" not in drawn
    )
    assert "http" not in drawn.partition("<body>")[0]
    assert not list(tmp_path.glob(".*"))
    again = workbench("bdh", "sparsity", MODEL, TEXT, "--out", tmp_path / "runs", "--figure", page)
    assert again.code == 1 and "is there already" in again.err and page.read_text("utf-8") == drawn  # type: ignore[attr-defined]
    shown = workbench("bdh", "sparsity", MODEL, TEXT, "--out", tmp_path / "runs")
    assert "Does surprise come with activity?" in shown.out and "layers beyond chance" in shown.err  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "call"),
    [
        (["--edges", 40], lambda model: bdh.parameter_graph(model, edges=40)),
        (["--noise-quantile", 0.8, "--graph", "y", "--target-head", 1],
         lambda model: bdh.parameter_graph(model, 0, 1, "y", noise_quantile=0.8)),
        ([TEXT, "--graph", "state", "--edges", 40], lambda model: bdh.state_graph(model, TEXT, 1, edges=40)),
    ],
    ids=["edges", "noise", "state"],
)  # fmt: skip
def test_graphs(workbench: Command, tmp_path: Path, options: list, call: Callable) -> None:
    done = workbench("bdh", "graph", MODEL, *options, "--draws", 2, "--out", tmp_path, "--json")
    expected = call(models.load(MODEL))
    found = rows(done, "graph-edges")
    assert len(found) == expected.n_edges > 10
    np.testing.assert_allclose([row[2] for row in found], expected.weight, rtol=1e-6)
    assert done.json["results"]["noise_edges"] == expected.noise_edges()  # type: ignore[attr-defined]
    assert {row[0] for row in rows(done, "graph-modularity")} >= {"this graph", "random", "low rank", "rewired"}


def test_concepts_of_own_sentences_beside_a_dictionary(workbench: Command, tmp_path: Path) -> None:
    model = models.load(MODEL)
    sets = {name: [f"{start} a {word} here" for word in words for start in ("we have", "he sees")] for name, words in
            {"positive": ("cat", "dog", "hen", "cow"), "negative": ("saw", "axe", "nut", "jug")}.items()}  # fmt: skip
    for name, lines in sets.items():
        (tmp_path / name).write_text("\n".join(lines))
    quick = FeatureTraining(steps=4, batch_size=32, warmup=1, report_every=4)
    find_features(model, "blocks.1.hook_y", TEXT.encode() * 6, TopK(12, k=2), tmp_path / "dictionary", training=quick, context=32,
                  n_features=1)  # fmt: skip
    given = {name: tmp_path / name for name in (*sets, "dictionary")}
    done = workbench("bdh", "concepts", MODEL, "--positive", given["positive"], "--negative", given["negative"], "--layer", 1,
                     "--shuffles", 0, "--draws", 0, "--features", given["dictionary"], "--out", tmp_path / "runs", "--json")  # fmt: skip
    expected = bdh.find_concept_synapses(
        model, sets["positive"], sets["negative"], layers=[(0, 1)], k=50, n_shuffles=0, n_bootstrap=500,
        features=bdh.stored_features(model, tmp_path / "dictionary"),
    )  # fmt: skip
    np.testing.assert_allclose(
        [row[3] for row in rows(done, "concept-rivals")], [score.auc for score in expected.scores]
    )
    assert rows(done, "concept-rivals")[-1][0] == "dictionary feature, blocks.1.hook_y"
    assert [row[0] for row in rows(done, "concept-candidates")] == [str(each.synapse) for each in expected.candidates]


def test_a_merge_is_measured_and_kept(workbench: Command, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    done = workbench(
        "bdh", "merge", MODEL, f"initial:{MODEL}", TEXT, "--save", merged, "--out", tmp_path / "runs", "--json"
    )
    assert done.code == 0, done.err  # type: ignore[attr-defined]
    model = models.load(MODEL)
    other = bdh.initial_weights(model, seed=model.config.seed + 1).model
    expected, _ = merge([model, other], names=["first", "second"])
    tokens = model.to_tokens(TEXT)
    with torch.no_grad():
        loss = -expected(tokens)[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        assert torch.equal(models.load(merged)(tokens), expected(tokens))
    np.testing.assert_allclose([row[3] for row in rows(done, "merge-losses")][1:], loss.numpy(), rtol=1e-4)
    kept = workbench("bdh", "sparsity", merged, TEXT, "--out", tmp_path / "runs", "--json")  # a folder is a model too
    assert kept.json["results"]["neurons"] == 2 * model.config.n_neurons // model.config.n_heads  # type: ignore[attr-defined]


def test_a_stop_stores_nothing(workbench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def stopped() -> Iterator[threading.Event]:
        event = threading.Event()
        event.set()
        yield event

    monkeypatch.setattr(_measure, "interruptible", stopped)
    done = workbench("bdh", "graph", MODEL, "--edges", 40, "--out", tmp_path)
    assert done.code == 1 and "stopped before the end" in done.err and RunStore(tmp_path).list() == []  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["synapses", "bdh-randon", TEXT], 1, "Did you mean 'bdh-random'"),
        (["synapses", "gpt2-random", TEXT], 1, "no BDH called"),
        (["synapses", MODEL, TEXT, "--by", "strenght"], 1, "Did you mean 'strength'"),
        (["synapses", MODEL, TEXT, "--by", "read"], 2, "needs --logit"),
        (["synapses", MODEL, TEXT, "--since", 3], 2, "goes with --by change"),
        (["synapses", MODEL, TEXT, "--at", 500], 1, "the text has 81 tokens"),
        (["reads", MODEL, TEXT, "--at", 0], 1, "the first reads nothing"),
        (["reads", MODEL, TEXT, "--logit", "é"], 2, "one byte"),
        (["who", MODEL, "1.0.2", TEXT], 2, "is no synapse"),
        (["who", MODEL, "0.0.99-1.0.0", TEXT], 1, "neuron 99"),
        (["sparsity", MODEL, "abc"], 1, "at least 4"),
        (["sparsity", "gpt2-random", TEXT], 1, "no BDH called"),
        (["graph", MODEL, "--edges", 3], 1, "from 20"),
        (["graph", MODEL, "--edges", 30, "--noise-quantile", 0.9], 2, "one of --edges"),
        (["graph", MODEL, "--noise-quantile", 1.5], 1, "less than 1"),
        (["graph", MODEL, TEXT], 2, "do nothing for"),
        (["graph", MODEL, "--graph", "stat"], 1, "Did you mean 'state'"),
        (["concepts", MODEL], 2, "give either --concept"),
        (["concepts", MODEL, "--concept", "anmal"], 1, "Did you mean 'animal'"),
        (["merge", MODEL, "bdh-randon", TEXT], 1, "Did you mean 'bdh-random'"),
    ],
)  # fmt: skip
def test_what_is_typed_wrongly_is_named(
    workbench: Command, tmp_path: Path, options: list, code: int, words: str
) -> None:
    done = workbench("bdh", *options, "--out", tmp_path / "runs")
    assert done.code == code and words in " ".join(done.err.split()), done.err  # type: ignore[attr-defined]
    assert done.out == "" and not [e for e in RunStore(tmp_path / "runs").list() if e.kind != "trace"]  # type: ignore[attr-defined]
