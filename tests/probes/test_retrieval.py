"""Retrieval heads: planted heads and decoys by hand, and the shipped induction circuit with its readers and feeders."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from models.decoder import Decoder
from probes.retrieval import (
    NeedleRun,
    continuations,
    copy_scores,
    feeders,
    masking_curve,
    needle_grid,
    retrieval_scores,
)


def test_needles_are_unique_and_where_they_are_said_to_be() -> None:
    runs = needle_grid(50, (20, 33), (0.0, 0.4, 1.0), needle_length=4, repeats=3, seed=1)
    assert len(runs) == 2 * 3 * 3
    for run in runs:
        ids = run.tokens.tolist()
        assert len(ids) == run.length and ids[-1] == ids[run.start - 1] and ids.count(ids[-1]) == 2
        assert len(set(run.answer.tolist())) == 4 and all(ids.count(token) == 1 for token in run.answer.tolist())
        if run.depth == 0:
            assert run.start == 1
        if run.depth == 1:
            assert run.stop == run.length - 1
    again = needle_grid(50, (20, 33), (0.0, 0.4, 1.0), needle_length=4, repeats=3, seed=1)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(runs, again, strict=True))


def planted(run: NeedleRun) -> tuple[Tensor, Tensor]:
    """What six heads read while the needle is repeated right, [head, step], and the tokens emitted."""
    steps = torch.arange(run.stop - run.start)
    right = run.start + steps
    query = run.length - 1 + steps
    reads = torch.stack(
        [
            right,  # the retrieval head
            query - 3,  # a fixed distance back
            torch.zeros_like(steps),  # a sink
            run.start + (steps + 1) % len(steps),  # in the needle, at the wrong token
            query,  # itself
            torch.where(steps % 2 == 0, right, 0),  # half of the time
        ]
    )
    return reads, run.answer


@pytest.mark.parametrize("mode", ["paper", "official"])
def test_planted_heads_and_decoys(mode: str) -> None:
    """Precision and recall 1: the planted head scores 1, every decoy 0, the half-time head one half."""
    for run in needle_grid(60, (30, 50), (0.0, 0.5, 0.8), needle_length=6, repeats=2):
        reads, emitted = planted(run)
        assert copy_scores(reads, run, emitted, mode).tolist() == [1.0, 0.0, 0.0, 0.0, 0.0, 0.5]


def test_paper_and_official_differ_where_they_should() -> None:
    """Copying one token again and again: the published code counts every time, the paper once."""
    run = needle_grid(60, (30,), (0.5,), needle_length=4, repeats=1)[0]
    emitted = run.answer[:1].repeat(8)
    reads = torch.full((1, 8), run.start)
    assert copy_scores(reads, run, emitted, "paper").tolist() == [0.25]
    assert copy_scores(reads, run, emitted, "official").tolist() == [2.0]
    wrong = emitted.clone()
    wrong[:] = run.tokens[-1]
    assert copy_scores(reads, run, wrong, "paper").tolist() == [0.0]


@pytest.fixture(scope="module")
def circuit() -> Decoder:
    return models.load("induction-circuit")


@pytest.fixture(scope="module")
def runs() -> list[NeedleRun]:
    return needle_grid(128, (40, 64), (0.2, 0.5, 0.8), needle_length=5, repeats=4, seed=3)


def test_the_shipped_circuit_retrieves_with_layer_1(circuit: Decoder, runs: list[NeedleRun]) -> None:
    found = retrieval_scores(circuit, runs)
    assert found.counted.mean() > 0.8
    assert found.best(1)[0][0] == 1 and found.best(1)[0][2] > 0.5
    assert found.scores[0].max() < 0.1  # no head of layer 0 reads the needle
    assert {layer for layer, _ in found.retrieval_heads()} == {1}
    assert found.stability("depth") > 0.8 and found.stability("length") > 0.8
    assert set(found.over("depth")) == {0.2, 0.5, 0.8}
    assert found.to_json()["best"][0][0] == 1


def test_order_of_the_runs_does_not_matter(circuit: Decoder, runs: list[NeedleRun]) -> None:
    some = runs[:8]
    a, b = retrieval_scores(circuit, some), retrieval_scores(circuit, some[::-1])
    assert np.allclose(a.scores, b.scores) and np.allclose(a.by_run, b.by_run[::-1])


def test_masking_and_feeding(circuit: Decoder, runs: list[NeedleRun]) -> None:
    """Without the top heads the needle is lost sooner than without others of their layer; the feeder is a previous-token head."""
    from probes.heads import head_scores
    from workbench.lab.tasks import make_task

    some = [run for run in runs if run.length == 40][:8]
    found = retrieval_scores(circuit, some)
    curve = masking_curve(circuit, some, found, (1, 2), controls=2)
    assert curve["plain"] > 0.8 and curve["top"][1] < curve["control"][1]
    assert curve["control_size"] == [1, 2]
    layer, head, _ = found.best(1)[0]
    assert isinstance(layer, int)
    fed = feeders(circuit, some, (layer, head))
    strongest = next(place for place in fed if place != (layer, head))
    batch = make_task("induction", vocab_size=128, length=96, seed=7).batch(8)
    previous = head_scores(circuit, batch, "previous_token")["previous_token"]
    assert strongest[0] == 0 and previous[0, strongest[1]] > 0.5
    assert fed[strongest] > 0.3 * fed[layer, head]
    assert found.scores[0, strongest[1]] < 0.1  # the feeder itself is no retrieval head


def planted_reads(run: NeedleRun, length: int) -> list[Tensor]:
    """Which position each token reads, [pos], for the retrieval head and three decoys; before the answer all read the first token."""
    steps = torch.arange(length - run.length + 1)
    reads = torch.zeros(4, length, dtype=torch.long)
    reads[0, run.length - 1 :] = run.start + steps
    reads[1] = (torch.arange(length) - 3).clamp(min=0)
    reads[3, run.length - 1 :] = run.start + (steps + 1) % (run.stop - run.start)  # in the needle, at the wrong token
    return list(reads)


@contextmanager
def effective_heads(model: Any, run: NeedleRun) -> Iterator[tuple[int, int]]:
    """The model emits the needle, one head's effective pattern reads it, and every other head is a decoy. Yields the head.

    Keys are unit vectors, one per position, and each query is the key of the position to be read, so that the factors of any linear
    mixer (with decays and the delta rule, too) give a row with one entry.
    """
    reader, emitted = (model.n_layers - 1, 0), iter(run.answer.tolist())

    def factor(layer: int, name: str) -> Any:
        def write(x: Tensor, hook: Any) -> Tensor | None:
            axes = dict(zip(hook.axes, x.shape, strict=True))
            length = axes["pos"]
            if length < run.length:  # a step of generation
                return None
            reads = planted_reads(run, length)
            new = torch.zeros(axes["head"], length, x.shape[-1], dtype=x.dtype)
            for head in range(axes["head"]):
                kind = head if layer == reader[0] else 1 + head % 3
                at = torch.arange(length) if name == "key" else reads[kind]
                new[head, torch.arange(length), at] = 1
            return (new if hook.axes.index("head") == 1 else new.transpose(0, 1))[None].expand_as(x)

        return write

    def say(logits: Tensor, hook: Any) -> Tensor | None:
        token = next(emitted, None)
        if token is None:
            return None
        out = torch.zeros_like(logits)
        out[:, -1, token] = 1
        return out

    hooks: list[Any] = [(point.name, say) for point in model.hook_points.points.values() if point.role == "logits"]
    for layer, mixer in enumerate(model.mixers):
        hooks += [(mixer.factor_points[name].name, factor(layer, name)) for name in ("query", "key")]
    with model.hooks(hooks):
        yield reader


@pytest.mark.parametrize("name", ["retnet", "gated-deltanet", "kda", "bdh", "bdh-decay"])
def test_planted_heads_in_effective_patterns(name: str) -> None:
    """Precision and recall 1 among the effective patterns of every layer, decoys 0, wherever the needle lies."""
    model = models.build(name, "demo").eval()
    for run in needle_grid(256, (20,), (0.1, 0.6, 1.0), needle_length=5, repeats=1):
        with effective_heads(model, run) as reader:
            found = retrieval_scores(model, [run])
        assert found.recall.tolist() == [1.0] and found.retrieval_heads() == [reader]
        decoys = np.delete(found.scores.ravel(), reader[0] * found.scores.shape[1] + reader[1])
        assert found.scores[reader] == 1 and (decoys == 0).all()


@pytest.mark.parametrize("name", ["retnet", "bdh", "mamba2"])
def test_effective_patterns_can_be_scored(name: str) -> None:
    """A random model succeeds nowhere and is refused; counted all the same, its scores are finite and at most 1."""
    model, runs = models.build(name), needle_grid(256, (24,), (0.5,), needle_length=4, repeats=2)
    with pytest.raises(ValueError, match="nothing is retrieved"):
        retrieval_scores(model, runs)
    found = retrieval_scores(model, runs, success=-1)
    assert np.isfinite(found.scores).all() and found.scores.max() <= 1 and found.counted.all()
    assert len(continuations(model, runs)[0]) == 4


def test_mistakes_are_named(circuit: Decoder, runs: list[NeedleRun]) -> None:
    with pytest.raises(ValueError, match=r"Unknown mode 'papr'. Did you mean 'paper'"):
        retrieval_scores(circuit, runs, "papr")
    with pytest.raises(ValueError, match="No runs given"):
        retrieval_scores(circuit, [])
    with pytest.raises(ValueError, match="do not hold a needle"):
        needle_grid(50, (6,), needle_length=4)
    with pytest.raises(ValueError, match="vocab_size"):
        needle_grid(5, (30,), needle_length=4)
    with pytest.raises(ValueError, match="nothing feeds the first"):
        feeders(circuit, runs, (0, 1))
    with pytest.raises(ValueError, match="runs of one length"):
        feeders(circuit, runs, (1, 1))
