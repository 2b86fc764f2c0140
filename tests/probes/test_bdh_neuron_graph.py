"""Neuron graphs against dense matrices, known communities, known exponents and exact invariants."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import networkx
import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import minimize, minimize_scalar
from scipy.special import zeta
from torch import Tensor

from models.bdh.model import BDH
from probes.bdh import neuron_graph_edges as entries
from probes.bdh.capture import Synapse
from probes.bdh.neuron_graph import (
    NeuronGraph,
    coactivation_graph,
    graph_of,
    parameter_graph,
    state_graph,
)
from probes.bdh.neuron_graph_degrees import (
    degree_ccdf,
    degree_tails,
    fit_degree_tail,
    log_normal_ccdf,
    power_law_ccdf,
    standard_error,
)
from probes.bdh.neuron_graph_edges import Product, above, distribution, largest
from probes.bdh.neuron_graph_hubs import graph_hubs
from probes.bdh.neuron_graph_modularity import (
    communities,
    compare_modularity,
    graph_modularity,
    initial_weights,
    modularity_curve,
    random_graph,
    rewired_graph,
)
from probes.bdh.neuron_graph_noise import noise_threshold
from probes.bdh.neuron_graph_tails import head_census, weight_distribution
from probes.bdh.synapses import trace_synapses
from probes.progress import MeasurementCancelled
from tests.probes.bdh_naive import EXACT, LENGTH, tiny_model, tiny_tokens
from tests.probes.test_bdh_top_synapses import LargestTensor

HEADS, NEURONS = 2, 6


@pytest.fixture(scope="module")
def model() -> BDH:
    return tiny_model()


@pytest.fixture(params=[7, 2**21], ids=["many blocks", "one block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "BLOCK", request.param)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(product: Product) -> np.ndarray:
    """The whole matrix, with entries that are left out as nan."""
    parts = product.left @ product.right
    matrix = (parts.square().sum(0).sqrt() if len(parts) == 2 else parts[0]).numpy().copy()
    for i in range(matrix.shape[0]):
        for j, neuron in enumerate(product.columns.tolist()):
            if (product.left_out == "self" and i == neuron) or (product.left_out == "half" and i >= neuron):
                matrix[i, j] = np.nan
    return matrix


SQUARE = Product.of(normal(9, 4), normal(4, 9, seed=1), "self")
PRODUCTS = {
    "between heads": Product.of(normal(9, 4), normal(4, 7, seed=1), "nothing"),
    "within a head": SQUARE,
    "symmetric": Product.of(normal(9, 4), normal(9, 4).T, "half"),
    "rotary pairs": Product(normal(2, 8, 3), normal(2, 3, 4, seed=1), 2 * torch.arange(4), "self"),
}


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("sign", ["positive", "negative", "both"])
@pytest.mark.parametrize("m", [1, 5, 9])
def test_streaming_finds_the_largest_of_the_dense_matrix(name: str, sign: str, m: int, blocks: None) -> None:
    product = PRODUCTS[name]
    if name == "rotary pairs" and sign == "negative":
        with pytest.raises(ValueError, match="only 0 entries are negative"):
            largest(product, m, sign)
        return
    matrix = dense(product)
    size = {"positive": matrix, "negative": -matrix, "both": np.abs(matrix)}[sign]
    order = np.argsort(-np.nan_to_num(size, nan=-np.inf), axis=None)[:m]
    rows, columns = np.unravel_index(order, size.shape)
    found = largest(product, m, sign)
    assert len(found) == m
    assert found.source.tolist() == rows.tolist()
    assert found.target.tolist() == product.columns.numpy()[columns].tolist()
    assert np.abs(found.weight - matrix[rows, columns]).max() < EXACT
    threshold = np.sort(size[~np.isnan(size)])[-4]
    beyond = above(product, float(threshold), sign)
    assert len(beyond) == 3 and beyond.source.tolist() == largest(product, 3, sign).source.tolist()


def test_ties_go_to_the_earlier_neuron(blocks: None) -> None:
    product = Product.of(torch.ones(5, 1), torch.ones(1, 5), "self")
    found = largest(product, 6)
    assert list(zip(found.source.tolist(), found.target.tolist(), strict=True)) == [
        (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 2),
    ]  # fmt: skip


def test_exactly_as_many_edges_as_asked_for_or_an_error(model: BDH) -> None:
    for m in (1, 7, 20):
        assert parameter_graph(model, edges=m, sign="both").n_edges == m
    assert parameter_graph(model, 0, 1, mean_degree=1.5).n_edges == 18  # 12 neurons of two heads
    assert parameter_graph(model, 0, 0, mean_degree=1.5).n_edges == 9
    positive = int(np.nansum(dense(parameter_graph(model, edges=1).product) > 0))
    assert parameter_graph(model, edges=positive).n_edges == positive
    with pytest.raises(
        ValueError, match=f"{positive + 1} edges were asked for, but only {positive} entries are positive"
    ):
        parameter_graph(model, edges=positive + 1)


@pytest.mark.parametrize(("source", "target"), [(0, 0), (0, 1), (1, 0)])
@pytest.mark.parametrize("kind", ["x", "y"])
@pytest.mark.parametrize("centre", [False, True])
def test_an_edge_is_encoder_row_times_decoder_column(
    model: BDH, source: int, target: int, kind: str, centre: bool
) -> None:
    graph = parameter_graph(model, source, target, kind, edges=8, sign="both", centre=centre)
    decoder = model.weights.D_x if kind == "x" else model.weights.D_y
    for i, j, weight in zip(graph.source, graph.target, graph.weight, strict=True):
        row = model.weights.E[source, i].detach()
        row = row - row.mean() if centre else row
        assert weight == pytest.approx(float(row @ decoder[target, :, j].detach()), abs=EXACT)
    loops = sum(i == j for i, j in zip(graph.source, graph.target, strict=True))
    assert loops == 0 if source == target else graph.n_nodes == 2 * NEURONS


def test_degrees_and_networkx_agree_on_direction(model: BDH) -> None:
    for graph in (parameter_graph(model, edges=9), parameter_graph(model, 0, 1, edges=9)):
        drawn = graph.to_networkx()
        assert isinstance(drawn, networkx.DiGraph) and drawn.number_of_edges() == 9
        for neuron in range(NEURONS):
            out, into = (graph.source_head, neuron), (graph.target_head, neuron)
            assert graph.out_degrees()[neuron] == (drawn.out_degree(out) if out in drawn else 0)
            assert graph.in_degrees()[neuron] == (drawn.in_degree(into) if into in drawn else 0)
        first = (graph.source_head, int(graph.source[0])), (graph.target_head, int(graph.target[0]))
        assert drawn.edges[first]["weight"] == graph.weight[0] == graph.weight.max()


@pytest.mark.parametrize("view", ["strength", "fixed"])
def test_state_graph_holds_the_traced_synapses(model: BDH, view: str) -> None:
    tokens = tiny_tokens(batch=1)
    graph = state_graph(model, tokens, 2, 1, 0, at=6, view=view, edges=3)
    synapses = [Synapse((1, int(i)), (0, int(j)), 2) for i, j in zip(graph.source, graph.target, strict=True)]
    traced = trace_synapses(model, tokens, synapses).view(view)[0, 6]
    assert float((traced - torch.from_numpy(graph.weight)).abs().max()) < EXACT
    every = [
        Synapse((1, i), (0, j), 2) for i in range(NEURONS) for j in range(0, NEURONS, 2 if view == "strength" else 1)
    ]
    values = trace_synapses(model, tokens, every).view(view)[0, 6]
    assert np.abs(graph.weight - values.sort(descending=True).values[:3].numpy()).max() < EXACT


@pytest.mark.parametrize("heads", [(0, 0), (0, 1)])
def test_coactivation_is_the_correlation_of_numpy(model: BDH, heads: tuple[int, int]) -> None:
    tokens = tiny_tokens(batch=3)
    _, cache = model.run_with_cache(tokens, names="blocks.1.hook_x")
    columns = cache["blocks.1.hook_x"][:, list(heads), 1:].permute(1, 3, 0, 2).flatten(0, 1).flatten(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = np.nan_to_num(np.corrcoef(columns.detach().numpy()))[:NEURONS, NEURONS:]
    graph = coactivation_graph(model, tokens, 1, *heads, edges=4, sign="both")
    for i, j, weight in zip(graph.source, graph.target, graph.weight, strict=True):
        assert weight == pytest.approx(expected[i, j], abs=1e-9)
        assert heads[0] != heads[1] or i < j
    kept = np.abs(expected[np.triu_indices(NEURONS, 1)] if heads[0] == heads[1] else expected.ravel())
    assert np.abs(np.abs(graph.weight) - np.sort(kept)[::-1][:4]).max() < 1e-9
    counted = coactivation_graph(model, tokens, 1, *heads, measure="count", edges=1)
    both = (columns[int(counted.source[0])] != 0) & (columns[NEURONS + int(counted.target[0])] != 0)
    assert counted.weight[0] == int(both.sum())


def test_moments_and_histogram_of_all_entries(blocks: None) -> None:
    product = Product.of(normal(40, 3).abs(), normal(3, 40, seed=1), "self")
    matrix = dense(product)
    kept = matrix[~np.isnan(matrix)]
    found = distribution(product, bins=50)
    assert found.size == len(kept) == found.counts.sum() == 40 * 39
    assert (found.mean, found.sd) == pytest.approx((kept.mean(), kept.std()), abs=1e-9)
    assert found.skewness == pytest.approx(stats.skew(kept), abs=1e-9)
    assert found.excess_kurtosis == pytest.approx(stats.kurtosis(kept), abs=1e-9)
    assert np.allclose(found.centres, -found.centres[::-1])
    assert (found.symmetric == found.symmetric[::-1]).all() and (found.skew_part >= 0).all()
    edges = np.linspace(-np.abs(kept).max(), np.abs(kept).max(), 101)
    for number in (3, 50, 80):
        low, high = edges[number], edges[number + 1]
        mirrored = ((kept > -high) & (kept <= -low)).sum()
        assert found.symmetric[number] == min(((kept >= low) & (kept < high)).sum(), mirrored)


def test_noise_of_a_planted_tail() -> None:
    """σ_Q is the width of the symmetric part, and a threshold of 5 σ_Q finds the planted entries and nothing else."""
    noise, rank = normal(200, 200, seed=3), 200
    planted = torch.zeros(200, 200, dtype=torch.float64)
    planted.view(-1)[torch.arange(30) * 1301 + 7] = 20.0
    product = Product.of(torch.eye(rank, dtype=torch.float64), noise + planted, "self")
    found = distribution(product)
    assert found.sigma_q == pytest.approx(1.0, rel=0.03)
    assert found.tails(5) == (30, 0)
    graph = graph_of("planted", product, 0, 0, 200, noise=5.0)
    assert set((graph.source * 200 + graph.target).tolist()) == set((torch.arange(30) * 1301 + 7).tolist())


NOISY = {
    "between heads": Product.of(normal(60, 5), normal(5, 70, seed=1), "nothing"),
    "within a head": Product.of(normal(60, 5), normal(5, 60, seed=1), "self"),
    "symmetric": Product.of(normal(60, 5), normal(60, 5).T, "half"),
}


@pytest.mark.parametrize("sign", ["positive", "negative"])
@pytest.mark.parametrize("name", NOISY)
def test_a_noise_quantile_is_that_of_the_other_side(name: str, sign: str, blocks: None) -> None:
    product = NOISY[name]
    matrix = dense(product)
    entries_ = matrix[~np.isnan(matrix)] * (1 if sign == "positive" else -1)
    noise = -entries_[entries_ < 0]
    for quantile in (0.5, 0.9, 0.99):
        threshold = noise_threshold(product, quantile, sign)
        beyond = int((1 - quantile) * len(noise) + 1e-9)
        assert (noise > threshold * (1 + 1e-9)).sum() == beyond and np.isclose(noise, threshold, rtol=1e-9).any()
        graph = graph_of(
            "noisy", product, 0, 0 if name != "between heads" else 1, 70, noise_quantile=quantile, sign=sign
        )
        assert graph.n_edges == (entries_ > threshold).sum() and graph.threshold == threshold and graph.sign == sign
        assert graph.noise_edges() == beyond + 1  # the entry at the threshold itself
    few = graph_of("few", product, 0, 0 if name != "between heads" else 1, 70, edges=25, sign=sign)
    assert few.noise_edges() == (noise > few.threshold).sum()


def test_noise_of_strengths_is_the_same_activity_out_of_step() -> None:
    """One pair fires together among neurons that fire at random: it alone exceeds what shuffled tokens reach."""
    rng = np.random.default_rng(0)
    y, x = (torch.from_numpy((rng.random((400, 30)) < 0.1) * 1.0) for _ in range(2))
    x[:, 4] = y[:, 7]
    counts = Product(y.T[None], x[None], torch.arange(30), one_signed=True)
    threshold = noise_threshold(counts, 0.999)
    shuffled = dense(counts.shuffled(0))
    assert (shuffled > threshold).sum() <= 0.001 * shuffled.size
    graph = graph_of("counts", counts, 0, 1, 30, noise_quantile=0.999)
    assert (graph.source[0], graph.target[0]) == (7, 4) and graph.n_edges < 8
    assert graph.noise_edges() == ((shuffled >= threshold) & (shuffled > 0)).sum()
    with pytest.raises(ValueError, match="both signs"):
        graph_of("counts", counts, 0, 1, 30, noise=3)


def test_census_finds_the_head_without_a_positive_tail() -> None:
    """Head 0's rows point where some columns of D_x do, head 1's the opposite way."""
    model = tiny_model(n_neurons=240, d_model=16)
    with torch.no_grad():
        model.weights.E[:, :30] = 12 * model.weights.D_x[0, :, :30].T
        model.weights.E[1, :30] *= -1
    census = {(pair.source_head, pair.target_head): pair for pair in head_census(model)}
    assert len(census) == 4
    assert not census[1, 0].has_positive_tail and census[1, 0].negative_tail > 20 and census[1, 0].skewness < -0.5
    assert census[0, 0].skewness == pytest.approx(weight_distribution(model, 0, 0).skewness)


# Communities -----------------------------------------------------------------------------------------------------------


def block_model(groups: int, size: int, noise: float = 0.05) -> NeuronGraph:
    """Weights E D_x ≈ 1 within a community and 0 between, the largest quarter kept."""
    member = torch.arange(groups * size) % groups
    indicator = torch.nn.functional.one_hot(member).double()
    left = torch.cat([indicator, noise * normal(len(member), 20)], 1)
    right = torch.cat([indicator.T, noise * normal(20, len(member), seed=1)], 0)
    return graph_of("blocks", Product.of(left, right, "self"), 0, 0, len(member), mean_degree=4.0)


def test_planted_communities_are_recovered() -> None:
    graph = block_model(5, 12)
    found = communities(graph, seeds=3)
    truth = [{(0, number) for number in range(60) if number % 5 == group} for group in range(5)]
    assert sorted(map(sorted, found)) == sorted(map(sorted, truth))
    drawn = networkx.Graph()
    drawn.add_weighted_edges_from(  # an edge each way counts twice, as in Q of the sum of the matrix and its transpose
        (a, b, 0.0) for a, b in zip(graph.source.tolist(), graph.target.tolist(), strict=True)
    )
    for a, b, weight in zip(graph.source.tolist(), graph.target.tolist(), np.abs(graph.weight).tolist(), strict=True):
        drawn[a][b]["weight"] += weight
    parts = [{number for _, number in part} for part in truth]
    true_q = networkx.community.modularity(drawn, parts, weight="weight")
    result = graph_modularity(graph, seeds=3)
    assert result.q == pytest.approx(true_q, abs=1e-9) and true_q > 0.75
    assert result.communities == 5 and result.connected == 60 and result.giant == 12 / 60
    against = compare_modularity(graph, draws=3, seeds=2)
    for name in ("random", "rewired"):
        assert result.q > against.mean(name) + 10 * against.sd(name)
        assert {draw.connected for draw in against.baselines[name]} != {0}


def test_a_random_matrix_has_no_communities_beyond_chance() -> None:
    """At about one edge per neuron random graphs have Q near 0.9 (the trap), and a full-rank random matrix no more than they."""
    product = Product.of(normal(150, 150), normal(150, 150, seed=1), "self")
    for degree, least in ((0.5, 0.85), (6, 0.0)):
        graph = graph_of("random weights", product, 0, 0, 150, mean_degree=degree)
        found = compare_modularity(graph, draws=6, seeds=2)
        assert abs(found.observed.q - found.mean("random")) < 5 * found.sd("random") + 0.01
        assert found.observed.q > least
        assert (found.observed.giant < 0.5) == (degree < 1)


@pytest.mark.parametrize("kind", ["within", "between", "undirected"])
def test_rewiring_keeps_every_degree(kind: str) -> None:
    if kind == "undirected":
        factor = normal(40, 10)
        graph = graph_of("symmetric", Product.of(factor, factor.T, "half"), 0, 0, 40, edges=150)
    else:
        left_out = "self" if kind == "within" else "nothing"
        graph = graph_of(
            "hubs", Product.of(normal(40, 3), normal(3, 40, seed=1), left_out), 0, int(kind == "between"), 40, edges=150
        )
    made = rewired_graph(graph, seed=1)
    assert (made.in_degrees() == graph.in_degrees()).all() and (made.out_degrees() == graph.out_degrees()).all()
    pairs = set(zip(made.source.tolist(), made.target.tolist(), strict=True))
    before = set(zip(graph.source.tolist(), graph.target.tolist(), strict=True))
    assert len(pairs) == 150 and sorted(made.weight) == sorted(graph.weight)
    assert kind == "between" or all(a != b for a, b in pairs)
    assert kind != "undirected" or all(a < b for a, b in pairs)
    assert len(pairs & before) < 110  # a product of rank 3 leaves few free places, but most edges moved or could have
    assert pairs != set(
        zip(*(ends.tolist() for ends in (rewired_graph(graph, 2).source, rewired_graph(graph, 2).target)), strict=True)
    )


@pytest.mark.parametrize("name", PRODUCTS)
def test_random_graphs_use_allowed_pairs_evenly(name: str) -> None:
    product = PRODUCTS[name]
    graph = graph_of(name, product, 0, int(product.left_out == "nothing"), 9, edges=4)
    counts = np.zeros(product.shape)
    where = {neuron: column for column, neuron in enumerate(product.columns.tolist())}
    for seed in range(300):
        made = random_graph(graph, seed)
        assert len(set(zip(made.source.tolist(), made.target.tolist(), strict=True))) == made.n_edges == 4
        assert sorted(made.weight) == sorted(graph.weight)
        for a, b in zip(made.source.tolist(), made.target.tolist(), strict=True):
            counts[a, where[b]] += 1
    allowed = ~np.isnan(dense(product))
    assert (counts[~allowed] == 0).all()
    assert stats.chisquare(counts[allowed]).pvalue > 1e-4


def test_initial_weights_are_recognised_or_said_to_be_unknown() -> None:
    model = tiny_model(n_neurons=480, d_model=16)
    same = initial_weights(model)
    assert same.correlation == pytest.approx(1, abs=1e-6) and "still has" in same.note  # float32 draws, float64 model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 2 * torch.randn_like(parameter)
    moved = initial_weights(model)
    assert moved.known and "rebuilt" in moved.note and 0.2 < moved.correlation < 0.5
    stranger = initial_weights(model, seed=99)
    assert not stranger.known and "unknown" in stranger.note
    assert torch.equal(stranger.model.weights.E.double(), BDH(replace(model.config, seed=99)).weights.E.double())


def test_modularity_curve_has_all_baselines_progress_and_cancel() -> None:
    model = tiny_model(n_neurons=80, d_model=8)
    seen: list[float] = []
    curve = modularity_curve(model, edges=[20, 100], draws=2, seeds=1, progress=lambda f, message: seen.append(f))
    assert [point.edges for point in curve.points] == [20, 100]
    for point in curve.points:
        assert list(point.baselines) == ["random", "low rank", "initial", "rewired"]
        assert all(len(draws) == 2 for draws in point.baselines.values())
        assert point.baselines["initial"][0].q == pytest.approx(point.observed.q)  # the model is untrained
    assert seen == sorted(seen) and seen[0] >= 0 and seen[-1] <= 1
    assert "still has its initial weights" in curve.note
    assert curve._repr_html_().count("<tr>") == 3 and "rewired" in repr(curve)
    assert curve.to_json()["points"][1]["observed"]["q"] == curve.points[1].observed.q
    event = threading.Event()
    event.set()
    with pytest.raises(MeasurementCancelled):
        modularity_curve(model, edges=[20], cancel=event)


# Degrees ---------------------------------------------------------------------------------------------------------------


def clauset(degrees: np.ndarray, xmin: int) -> tuple[float, float]:
    """(α, D) by maximum likelihood with the Hurwitz zeta function."""
    tail = degrees[degrees >= xmin]
    mean = np.log(tail).mean()
    alpha = minimize_scalar(
        lambda a: a * mean + np.log(zeta(a, xmin)), bounds=(1.01, 20), method="bounded", options={"xatol": 1e-9}
    ).x
    values = np.unique(tail)
    observed = np.array([(tail <= value).mean() for value in values])
    return alpha, float(np.abs(observed - 1 + zeta(alpha, values + 1) / zeta(alpha, xmin)).max())


@pytest.mark.parametrize("alpha", [2.2, 2.7, 3.5])
def test_a_power_law_is_recovered(alpha: float) -> None:
    sample = np.random.default_rng(0).zipf(alpha, 4000)
    fit = fit_degree_tail(sample, xmin=1)
    expected, distance = clauset(sample, 1)
    assert fit.alpha == pytest.approx(expected, abs=2e-3) and fit.ks == pytest.approx(distance, abs=2e-3)
    assert abs(fit.alpha - alpha) < 4 * fit.alpha_sd < 0.4
    free = fit_degree_tail(np.concatenate([sample, np.zeros(50, int)]))
    assert abs(free.alpha - alpha) < 4 * free.alpha_sd and free.verdict != "log-normal"
    assert (free.n_zero, free.n_positive) == (50, 4000)


def log_normal_nats(tail: np.ndarray, mu: float, sigma: float, xmin: int) -> float:
    """−log likelihood of the log-normal of whole numbers, summed up from its probabilities one by one."""
    if sigma <= 0:
        return np.inf
    law = stats.norm(mu, sigma)
    whole = law.sf(np.log(xmin - 0.5))
    shares = (law.cdf(np.log(tail + 0.5)) - law.cdf(np.log(tail - 0.5))) / whole
    return float(-np.log(np.maximum(shares, 1e-300)).sum())


@pytest.mark.parametrize("xmin", [1, 6])
def test_the_log_normal_beside_the_power_law_is_the_most_likely_one(xmin: int) -> None:
    sample = np.ceil(np.random.default_rng(2).lognormal(2.5, 0.8, 1500)).astype(int)
    fit = fit_degree_tail(sample, xmin=xmin)
    tail = sample[sample >= xmin]
    best = minimize(
        lambda p: log_normal_nats(tail, *p, xmin),
        (2.0, 1.0),
        method="Nelder-Mead",
        options={"fatol": 1e-9, "xatol": 1e-7},
    )
    assert (fit.mu, fit.sigma) == pytest.approx(best.x, abs=2e-3)
    law, whole = stats.norm(fit.mu, fit.sigma), stats.norm(fit.mu, fit.sigma).sf(np.log(xmin - 0.5))
    values = np.unique(tail)
    observed = np.array([(tail <= value).mean() for value in values])
    assert fit.ks_log_normal == pytest.approx(
        np.abs(observed - 1 + law.sf(np.log(values + 0.5)) / whole).max(), abs=1e-9
    )
    assert fit.ks_log_normal < 0.05 < fit.ks


def test_fitted_curves_are_the_distributions_summed_up() -> None:
    sample = np.random.default_rng(0).zipf(2.3, 800)
    fit = fit_degree_tail(sample, xmin=2)
    degrees, *curves = fit.fitted.T
    assert degrees[0] == 2 and degrees[-1] == sample.max() and (np.diff(degrees) == 1).all()
    share = (sample >= 2).mean()
    assert curves[0][0] == pytest.approx(share) and curves[1][0] == pytest.approx(share)
    terms = np.arange(2, 400_000, dtype=float) ** -fit.alpha
    np.testing.assert_allclose(
        power_law_ccdf([2, 3, 10], fit.alpha, 2), [terms[k - 2 :].sum() / terms.sum() for k in (2, 3, 10)], rtol=1e-4
    )
    law = stats.norm(1.2, 0.7)
    np.testing.assert_allclose(
        log_normal_ccdf([2, 5, 30], 1.2, 0.7, 2), law.sf(np.log([1.5, 4.5, 29.5])) / law.sf(np.log(1.5))
    )
    assert np.isfinite(
        log_normal_ccdf([900, 1000], -5.0, 0.2, 900)
    ).all()  # a tail whose mass is below the smallest float


@pytest.mark.parametrize("spread", [0.4, 0.7, 1.0])
def test_a_log_normal_is_not_called_a_power_law(spread: float) -> None:
    sample = np.ceil(np.random.default_rng(1).lognormal(2.5, spread, 4000)).astype(int)
    assert fit_degree_tail(sample, xmin=1).verdict == "log-normal"
    assert fit_degree_tail(sample).verdict != "power law"


def test_standard_error_is_that_of_repeated_samples() -> None:
    rng = np.random.default_rng(0)
    fits = [clauset(rng.zipf(2.5, 500), 1)[0] for _ in range(200)]
    assert standard_error(2.5, 1, 500) == pytest.approx(np.std(fits), rel=0.15)


def test_ccdf_and_degree_tails_of_a_graph() -> None:
    degrees = np.array([0, 1, 1, 2, 5])
    assert degree_ccdf(degrees).tolist() == [[1, 1.0], [2, 0.5], [5, 0.25]]
    rows = normal(300, 300) + 3 * normal(300, 1, seed=2).exp() * normal(1, 300, seed=3).exp() / 10
    graph = graph_of("hubs", Product.of(torch.eye(300, dtype=torch.float64), rows, "self"), 0, 0, 300, edges=2000)
    tails = degree_tails(graph)
    assert set(tails) == {"in", "out"}
    assert (
        tails["in"].n_positive == (graph.in_degrees() > 0).sum()
        and tails["in"].n_zero == (graph.in_degrees() == 0).sum()
    )
    assert tails["out"].ccdf[0, 1] == 1 and tails["out"].to_json()["verdict"] in (
        "power law",
        "log-normal",
        "undecided",
    )
    with pytest.raises(ValueError, match="3"):
        fit_degree_tail(np.array([1, 1, 2, 2]))
    with pytest.raises(ValueError, match="whole numbers"):
        fit_degree_tail(np.array([1.5, 2]))


def test_hubs_are_the_neurons_with_most_edges(model: BDH) -> None:
    named = tiny_model(n_neurons=80, vocab_size=256)
    for graph, by in (
        (parameter_graph(named, edges=200), "all"),
        (parameter_graph(named, 1, 0, edges=200), "in"),
        (coactivation_graph(named, tiny_tokens(), 1, edges=60), "all"),
    ):
        drawn = graph.to_networkx()
        hubs = graph_hubs(named, graph, k=3, by=by, tokens=2, neighbours=4)
        degree = drawn.in_degree if by == "in" else drawn.degree
        most = sorted((count for _, count in degree()), reverse=True)[:3]
        assert [degree((hub.head, hub.neuron)) for hub in hubs] == most
        best = hubs[0]
        near = drawn.pred if by == "in" else drawn.adj
        side = best.sources if by == "in" else best.targets
        weights = sorted((edge["weight"] for edge in near[best.head, best.neuron].values()), reverse=True)
        assert [weight for _, weight in side] == pytest.approx(weights[:4])
        assert len(best.meaning.promotes) == 2 and best.to_json()["meaning"]["neuron"] == best.neuron
        assert (best.head, best.neuron) in communities(graph)[best.community]


# Size, mistakes --------------------------------------------------------------------------------------------------------


def test_memory_stays_far_below_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """2,048 neurons: 4 million entries; no tensor has more than two blocks."""
    monkeypatch.setattr(entries, "BLOCK", 2**17)
    left, right = torch.randn(2048, 8), torch.randn(8, 2048)
    with LargestTensor() as watch:
        graph = graph_of("large", Product.of(left, right, "self"), 0, 0, 2048, edges=12_000)
    assert graph.n_edges == 12_000
    assert entries.BLOCK / 2 < watch.numbers <= 2 * entries.BLOCK < 2048 * 2048 / 15
    row = int(graph.source[0])
    exact = (left[row].double() @ right.double()).numpy()
    exact[row] = -np.inf
    assert graph.weight[0] == pytest.approx(exact.max(), rel=1e-5)


MISTAKES: list[tuple[Callable[[BDH, Tensor], object], str]] = [
    (lambda m, t: parameter_graph(m), "exactly one of edges"),
    (lambda m, t: parameter_graph(m, edges=3, noise=2), "exactly one of edges"),
    (lambda m, t: parameter_graph(m, edges=0), "expected at least 1"),
    (lambda m, t: parameter_graph(m, 2, 0, edges=3), r"heads 0\.\.1"),
    (lambda m, t: parameter_graph(m, kind="z", edges=3), "Unknown kind 'z'"),
    (lambda m, t: parameter_graph(m, edges=3, sign="positiv"), "Did you mean 'positive'"),
    (lambda m, t: state_graph(m, t, 1, view="strenght", edges=3), "Did you mean 'strength'"),
    (lambda m, t: state_graph(m, t, 1, noise=3), "entries of both signs"),
    (lambda m, t: parameter_graph(m, noise_quantile=99), "more than 0 and less than 1"),
    (lambda m, t: parameter_graph(m, noise_quantile=0.9, sign="both"), "told by the other sign"),
    (lambda m, t: state_graph(m, t, 0, edges=3), r"expected 1\.\.2"),
    (lambda m, t: state_graph(m, t, 1, source_layer=1, edges=3), "below target_layer"),
    (lambda m, t: state_graph(m, tiny_tokens(), 1, edges=3), "a batch of 2"),
    (lambda m, t: coactivation_graph(m, t, 1, measure="corelation", edges=3), "Did you mean 'correlation'"),
    (lambda m, t: coactivation_graph(m, t, 1, activity="gate", edges=3), "Unknown activity 'gate'"),
    (lambda m, t: modularity_curve(m, baselines=["rewire"]), "Did you mean 'rewired'"),
    (lambda m, t: modularity_curve(m, edges=[]), "edges is empty"),
    (lambda m, t: graph_modularity(parameter_graph(m, edges=3), seeds=0), "seeds is 0"),
    (lambda m, t: graph_hubs(m, parameter_graph(m, edges=3), by="inn"), "Did you mean 'in'"),
    (
        lambda m, t: distribution(Product.of(torch.zeros(3, 1), torch.zeros(1, 3), "self")),
        "All entries of the matrix are equal",
    ),
]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_mistakes_are_named(model: BDH, number: int) -> None:
    call, message = MISTAKES[number]
    with pytest.raises(ValueError, match=message):
        call(model, tiny_tokens(batch=1, length=LENGTH))


def test_graphs_go_to_json(model: BDH, tmp_path: Path) -> None:
    import json

    graph = parameter_graph(model, edges=4)
    stored = json.loads(json.dumps(graph.to_json()))
    assert stored["source"] == graph.source.tolist() and stored["weight"] == graph.weight.tolist()
    assert "4 edges" in repr(graph) and "4 edges" in graph._repr_html_()
