"""Counts of active neurons against a token-by-token run; correlations against scipy and planted truth."""

from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch import Tensor

import models
from models.bdh.merge import merge
from models.bdh.model import BDH
from probes.bdh.sparsity import correlate, measure_sparsity, ranks
from probes.bdh.timescales import octiles
from tests.probes.bdh_naive import LENGTH, largest, naive, tiny_model, tiny_tokens


@pytest.fixture(scope="module")
def model() -> BDH:
    return tiny_model(n_neurons=32)  # 16 per head: two per octile


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return tiny_tokens()


def test_counts_are_those_of_the_naive_run(model: BDH, tokens: Tensor) -> None:
    found = measure_sparsity(model, tokens)
    groups = [8 * j // 16 for j in range(16)]
    for row in range(2):
        run = naive(model, tokens[row])
        for name, activity in (("x", run.x), ("gate", run.gate), ("y", run.y)):
            for layer in range(3):
                for t in range(1, LENGTH):
                    fires = activity[layer, t] != 0
                    assert largest(found.of(name)[row, layer, :, t] - fires.float().mean(-1)) < 1e-6
                    for octile in range(8):
                        expected = fires[:, [j for j in range(16) if groups[j] == octile]].float().mean()
                        assert abs(float(found.by_octile[name][row, layer, octile, t] - expected)) < 1e-6
    for name in ("x", "gate", "y"):
        assert bool(found.of(name)[..., 0].isnan().all()) and not bool(found.of(name)[..., 1:].isnan().any())
        assert 0 < float(found.mean(name).mean()) < 1


def test_dead_neurons(model: BDH, tokens: Tensor) -> None:
    model = tiny_model(n_neurons=32)
    with torch.no_grad():
        model.weights.D_x[1, :, 5] = 0
    found = measure_sparsity(model, tokens)
    runs = [naive(model, row) for row in tokens]
    for layer in range(3):
        fired = torch.stack([run.y[layer, t] != 0 for run in runs for t in range(1, LENGTH)]).any(0)
        assert torch.equal(found.ever["y"][layer], fired)
        assert torch.equal(found.dead("y")[layer], (~fired).sum(-1))
    everywhere = found.dead_everywhere("x")
    assert (1, 5) in everywhere and len(everywhere) < 16
    # x of position 0 does not count: a neuron that fires there alone is dead in this text
    first = (found.ever["x"][0] == 0) & (runs[0].x[0, 0] != 0)
    assert all(bool((run.x[0, t][first] == 0).all()) for run in runs for t in range(1, LENGTH))


def test_surprisal_and_padding(model: BDH, tokens: Tensor) -> None:
    found = measure_sparsity(model, tokens)
    loss = model(tokens, return_type="loss", loss_per_token=True)
    assert largest(found.surprisal[:, 1:] - loss) < 1e-5 and bool(found.surprisal[:, 0].isnan().all())
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), tokens], 1)
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[:, :4] = False
    with_padding = measure_sparsity(model, padded, mask=mask)
    assert bool(with_padding.of("y")[..., :5].isnan().all())
    assert torch.equal(with_padding.of("y")[..., 5:], found.of("y")[..., 1:])
    assert largest(with_padding.surprisal[:, 5:] - found.surprisal[:, 1:]) < 1e-5
    assert torch.equal(with_padding.ever["x"], found.ever["x"])


def test_correlation_equals_scipy(model: BDH, tokens: Tensor) -> None:
    found = measure_sparsity(model, tokens)
    activity, surprisal = found.of("y").mean(2).double(), found.surprisal.double()
    for method, oracle in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        read = found.correlation("y", method=method)
        following = found.correlation("y", token="next", method=method)
        assert read.tokens == 2 * (LENGTH - 1) and following.tokens == 2 * (LENGTH - 2)
        for layer in range(3):
            share = activity[:, layer]
            expected = oracle(share[:, 1:].flatten(), surprisal[:, 1:].flatten()).statistic
            assert float(read.value[layer]) == pytest.approx(expected, abs=1e-9)
            expected = oracle(share[:, 1:-1].flatten(), surprisal[:, 2:].flatten()).statistic
            assert float(following.value[layer]) == pytest.approx(expected, abs=1e-9)
    tied = torch.tensor([3.0, 1.0, 3.0, 2.0, 1.0, 1.0])
    assert ranks(tied).tolist() == stats.rankdata(tied).tolist()
    assert bool(correlate(torch.ones(1, 6), tied, "pearson").isnan().all())


def test_planted_tie_stands_out_of_the_null_and_noise_does_not(model: BDH) -> None:
    found = measure_sparsity(model, tiny_tokens(batch=4, length=60))
    generator = torch.Generator().manual_seed(0)
    planted, noise = found.surprisal[:, None, None] * 0.01, torch.rand(4, 1, 1, 60, generator=generator)
    noise[..., 0] = torch.nan
    both = replace(found, active={"y": torch.cat([planted, noise], 1)}).correlation("y")
    assert float(both.value[0]) == pytest.approx(1, abs=1e-6)
    assert float(both.value[0]) > float(both.null[0]) and abs(float(both.value[1])) < 2 * float(both.null[1])
    assert 0 < float(both.null.max()) < 0.5


def test_time_scales_of_a_merged_model(tokens: Tensor) -> None:
    """Octiles follow the frequencies: in a model merged with itself both halves count alike."""
    model = tiny_model(n_neurons=32, norm_eps=1e-30)
    merged, _ = merge([model, model])
    assert octiles(merged).tolist() == [8 * j // 16 for j in range(16)] * 2
    plain, doubled = measure_sparsity(model, tokens), measure_sparsity(merged, tokens)
    for name in ("x", "y"):
        assert largest((plain.by_octile[name] - doubled.by_octile[name]).nan_to_num()) < 1e-6
        assert largest(plain.octile_means(name) - doubled.octile_means(name)) < 1e-6


def test_untrained_models_have_the_priors_of_relu() -> None:
    """At random weights x and gate are active half of the time, and y a quarter: 50, 50 and 25 % of many neurons."""
    model = models.build("bdh", n_neurons=4096, d_model=64)
    text = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(0))
    found = measure_sparsity(model, text)
    assert abs(float(found.mean("x").mean()) - 0.5) < 0.02
    assert abs(float(found.mean("gate").mean()) - 0.5) < 0.03
    assert abs(float(found.mean("y").mean()) - 0.25) < 0.03


def test_mistakes_and_reports(model: BDH, tokens: Tensor) -> None:
    found = measure_sparsity(model, tokens)
    with pytest.raises(ValueError, match="Did you mean 'gate'"):
        found.of("gates")
    with pytest.raises(ValueError, match="method is 'kendall'"):
        found.correlation(method="kendall")
    with pytest.raises(ValueError, match="Only 2 tokens"):
        measure_sparsity(model, tokens[:1, :3]).correlation()
    with pytest.raises(ValueError, match="one token"):
        measure_sparsity(model, tokens[:, :1])
    assert "never active" in found._repr_html_() and "active by layer" in repr(found)
    assert "null" in repr(found.correlation())
