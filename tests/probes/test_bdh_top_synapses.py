"""Streaming search against the full n × n matrix, and its memory."""

import time

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import models
from models.bdh.model import BDH
from probes.bdh import top_synapses as searching
from probes.bdh.capture import Synapse, capture_writes
from probes.bdh.reading import reading_gradient
from probes.bdh.synapses import trace_synapses
from probes.bdh.top_synapses import most_changed_synapses, most_read_synapses, search_cost, strongest_synapses
from tests.probes.bdh_naive import EXACT, LENGTH, largest, naive, tiny_model, tiny_tokens

HEADS, NEURONS = 2, 6


@pytest.fixture(scope="module")
def model() -> BDH:
    return tiny_model()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return tiny_tokens(batch=1)


@pytest.fixture(params=[7, 2**21], ids=["many blocks", "one block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searching, "BLOCK", request.param)


def summed(model: BDH, tokens: Tensor, source: int, target: int, span: range) -> Tensor:
    """Σ y xᵀ over the tokens of the span, [n, n], from the naive run."""
    run = naive(model, tokens[0])
    return torch.stack([torch.outer(run.y[source, t].flatten(), run.key[target, t].flatten()) for t in span]).sum(0)


def pair_strength(matrix: Tensor) -> Tensor:
    """|C| [n, pair] from a fixed-frame matrix [n, n]."""
    return matrix.view(len(matrix), -1, 2).square().sum(-1).sqrt()


@pytest.mark.parametrize("at", [3, LENGTH - 1])
def test_strongest_are_the_largest_of_the_full_matrix(model: BDH, tokens: Tensor, at: int, blocks: None) -> None:
    found = strongest_synapses(model, tokens, 2, at=at, k=10)
    full = pair_strength(summed(model, tokens, 1, 2, range(at + 1)))
    expected = full.flatten().topk(10)
    assert largest(found.scores - expected.values) < EXACT
    for synapse, place in zip(found.synapses, expected.indices.tolist(), strict=True):
        row, pair = divmod(place, HEADS * NEURONS // 2)
        assert synapse == Synapse(divmod(row, NEURONS), divmod(2 * pair, NEURONS), 2)
    traced = trace_synapses(model, tokens, found.synapses).strength[0, at]
    assert largest(traced - found.scores) < EXACT
    assert found.total == pytest.approx(float(full.sum()), rel=1e-9)


def test_most_changed_over_a_span(model: BDH, tokens: Tensor, blocks: None) -> None:
    found = most_changed_synapses(model, tokens, 2, span=(3, 6), k=10, source_layer=0, target_heads=[1])
    full = pair_strength(summed(model, tokens, 0, 2, range(4, 7)))[:, NEURONS // 2 :]
    assert largest(found.scores - full.flatten().topk(10).values) < EXACT
    assert {synapse.target[0] for synapse in found.synapses} == {1}
    assert {synapse.source_layer for synapse in found.synapses} == {0}


def test_most_read_sum_to_what_the_layer_reads(model: BDH, tokens: Tensor, blocks: None) -> None:
    """Over all sources the contributions, with the embedding's part, are exactly the last layer's share of the logit."""
    at, layer, token = 7, 2, 11
    reading = reading_gradient(model, tokens, layer, at, token)
    writes = capture_writes(model, tokens, layer)
    found = [most_read_synapses(model, tokens, layer, logit=token, at=at, k=10_000, source_layer=k) for k in (0, 1)]
    score = torch.einsum("hn,htn->ht", reading.query[0], writes.keys[0, :, :at])
    embedded = torch.einsum("ht,td,hd->", score, writes.written("embedding")[0, :at], reading.gradient[0])
    total = sum(result.total for result in found) + float(embedded)
    assert total == pytest.approx(float((reading.a * reading.gradient).sum()), abs=EXACT)
    # the last layer's u, as it is added to the stream and unembedded
    _, cache = model.run_with_cache(tokens, names=["blocks.2.ln_u.hook_normalized", "blocks.2.ln_v.hook_scale"])
    u = cache["blocks.2.ln_u.hook_normalized"][0, at] / cache["blocks.2.ln_v.hook_scale"][0, at]
    assert total == pytest.approx(float((u @ model.W_U[:, token]).detach()), abs=EXACT)
    assert abs(total) > 1e-2
    for result in found:
        assert result.total == pytest.approx(float(result.scores.sum()), abs=EXACT)


def test_read_scores_entry_by_entry(model: BDH, tokens: Tensor) -> None:
    at, token = 8, 5
    found = most_read_synapses(model, tokens, 2, logit=token, at=at, k=40)
    run = naive(model, tokens[0])
    reading = reading_gradient(model, tokens, 2, at, token)
    for synapse, score in zip(found.synapses, found.scores, strict=True):
        (a, i), (b, j) = synapse.source, synapse.target
        weights = [run.scale[2, t][1][0] * run.y[1, t][a, i] * run.key[2, t][b, j] for t in range(at)]
        row = (model.weights.E[a, i] - model.weights.E[a, i].mean()).detach()
        expected = run.key[2, at][b, j] * torch.stack(weights).sum() * (row @ reading.gradient[0, b])
        assert abs(float(expected - score)) < EXACT


def test_only_synapses_that_exist_are_reported(model: BDH, tokens: Tensor) -> None:
    """At token 0 nothing is written, and zeros never fill up the list."""
    assert len(strongest_synapses(model, tokens, 1, at=0)) == 0
    full = pair_strength(summed(model, tokens, 0, 1, range(2)))
    found = strongest_synapses(model, tokens, 1, at=1, k=1000)
    assert len(found) == int((full > 0).sum()) < full.numel()


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(item, Tensor):
                self.numbers = max(self.numbers, item.untyped_storage().nbytes() // item.element_size())
        return out


def test_memory_stays_far_below_the_matrix_and_the_estimate_holds() -> None:
    """n = 8,192: the matrices of the searched heads hold 67 million numbers; no tensor here has more than 2²¹ (a block)."""
    model = models.build("bdh", n_layers=2, d_model=16, n_neurons=8192, n_heads=2)
    tokens = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))
    watch = LargestTensor()
    began = time.perf_counter()
    with watch:
        found = strongest_synapses(model, tokens, 1, k=5)
        read = most_read_synapses(model, tokens, 1, k=5, logit=3)
    seconds = time.perf_counter() - began
    assert watch.numbers <= searching.BLOCK < 8192 * 8192 / 30
    assert watch.numbers > searching.BLOCK / 2  # the watch sees the blocks
    assert len(found) == len(read) == 5
    limit = search_cost(model, 24)
    assert limit.multiply_adds == 24 * 8192 * 8192 >= found.cost.multiply_adds > 0.1 * limit.multiply_adds
    assert found.cost.block_bytes <= 4 * searching.BLOCK
    assert seconds < 30 and 0 < limit.seconds < 30


def test_mistakes_are_named(model: BDH, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match="a batch of 2"):
        strongest_synapses(model, tiny_tokens(), 1)
    with pytest.raises(ValueError, match=r"target_layer is 0; expected 1\.\.2"):
        strongest_synapses(model, tokens, 0)
    with pytest.raises(ValueError, match=r"source_layer is 1; expected 0\.\.0"):
        strongest_synapses(model, tokens, 1, source_layer=1)
    with pytest.raises(ValueError, match="target_heads has 2"):
        strongest_synapses(model, tokens, 1, target_heads=[2])
    with pytest.raises(ValueError, match="later second position"):
        most_changed_synapses(model, tokens, 1, span=(4, 4))
    with pytest.raises(ValueError, match="k is 0"):
        strongest_synapses(model, tokens, 1, k=0)
    with pytest.raises(ValueError, match="logit is 37"):
        most_read_synapses(model, tokens, 1, logit=37)
    table = strongest_synapses(model, tokens, 1, k=3)
    assert table._repr_html_().count("<tr>") == 4 and "multiply-adds" in repr(table)
