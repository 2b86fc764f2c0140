"""The graph form against the tensor form, the split, and the rules one edge at a time."""

import pytest
import torch
from torch import Tensor

from models.bdh.graph import GraphBDH, normfree, split

N, WIDTH, LAYERS, LENGTH = 14, 5, 3, 7


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture()
def tensors() -> dict[str, Tensor]:
    return {
        "D_x": 0.3 * draw(N, WIDTH, seed=0),
        "D_y": 0.2 * draw(N, WIDTH, seed=1),
        "E": 0.2 * draw(WIDTH, N, seed=2),
        "fading": torch.linspace(0.5, 1, N, dtype=torch.float64),
    }


@pytest.fixture()
def inputs() -> tuple[Tensor, Tensor]:
    return draw(LENGTH, N, seed=3).clamp(min=0), draw(LENGTH, N, seed=4).clamp(min=0)


def largest(x: Tensor) -> float:
    return float(x.abs().max())


def test_split_is_exact_and_non_negative(tensors: dict[str, Tensor]) -> None:
    excite, inhibit, hidden = split(tensors["D_x"], tensors["E"])
    assert excite.shape == inhibit.shape == (N, 2 * WIDTH) and hidden.shape == (2 * WIDTH, N)
    for part in (excite, inhibit, hidden):
        assert float(part.min()) == 0 and largest(part) > 0
    product = tensors["D_x"] @ tensors["E"]
    assert largest(excite @ hidden - inhibit @ hidden - product) < 1e-14
    assert largest(product) > 0.1


def test_rounds_equal_the_tensor_form(tensors: dict[str, Tensor], inputs: tuple[Tensor, Tensor]) -> None:
    graph = GraphBDH.from_tensors(**tensors, n_layers=LAYERS)
    x, y = graph.run(*inputs)
    expected_x, expected_y = normfree(**tensors, n_layers=LAYERS, X=inputs[0], Y=inputs[1])
    assert largest(x - expected_x) < 1e-10
    assert largest(y - expected_y) < 1e-10
    assert largest(expected_y[:, 1:]) > 0.01 and largest(expected_x[:, 1] - expected_x[:, 0]) > 0.01
    assert largest(y[0]) == 0  # the first token finds no synapses


def test_synapses_are_the_sum_of_faded_products(tensors: dict[str, Tensor], inputs: tuple[Tensor, Tensor]) -> None:
    """σ after the last token, from the tensor form's own x and y: Σ_τ y_{τ,l−1} x_{τ,l}ᵀ u^{t−τ}."""
    graph = GraphBDH.from_tensors(**tensors, n_layers=LAYERS)
    x, y = graph.run(*inputs)
    for layer in range(LAYERS):
        below = inputs[1] if layer == 0 else y[:, layer - 1]
        expected = torch.stack(
            [torch.outer(below[t], x[t, layer]) * tensors["fading"] ** (LENGTH - 1 - t) for t in range(LENGTH)]
        )
        assert largest(graph.synapses[layer] - expected.sum(0)) < 1e-10
        assert largest(expected) > 0.01


def test_rules_edge_by_edge(inputs: tuple[Tensor, Tensor]) -> None:
    """General graphs (a missing synapse, a fading of its own for each), with every rule written as a sum over edges."""
    names = ("x_excite", "x_inhibit", "y_excite", "y_inhibit")
    graphs = {name: draw(N, N, seed=10 + k).clamp(min=0) * 0.2 for k, name in enumerate(names)}
    exists = (draw(N, N, seed=20) > 0).double()
    fading = torch.rand(N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(21))
    graph = GraphBDH(**graphs, synapse=exists, fading=fading, n_layers=2)
    x_excite, x_inhibit, y_excite, y_inhibit = (graphs[name].tolist() for name in names)
    synapses = [[[0.0] * N for _ in range(N)] for _ in range(2)]
    every = range(N)
    for token in range(3):
        X, Y = inputs[0][token].tolist(), inputs[1][token].tolist()
        rounds = list(graph.rounds(inputs[0][token], inputs[1][token]))
        assert [r.number for r in rounds] == list(range(8))
        for layer in range(2):
            old = synapses[layer]
            A = [sum(old[i][j] * float(fading[i, j]) * X[j] for j in every) for i in every]
            synapses[layer] = [
                [old[i][j] * float(fading[i, j]) + float(exists[i, j]) * Y[i] * X[j] for j in every] for i in every
            ]
            Y = [max(0.0, sum((y_excite[i][j] - y_inhibit[i][j]) * A[j] for j in every)) * X[i] for i in every]
            X = [X[i] + max(0.0, sum((x_excite[i][j] - x_inhibit[i][j]) * Y[j] for j in every)) for i in every]
            read, wrote, gated, spread = rounds[4 * layer : 4 * layer + 4]
            assert largest(read.A - torch.tensor(A, dtype=torch.float64)) < 1e-12
            assert largest(wrote.synapses - torch.tensor(synapses[layer], dtype=torch.float64)) < 1e-12
            assert largest(wrote.Y) == 0 and largest(gated.A) == 0
            assert largest(gated.Y - torch.tensor(Y, dtype=torch.float64)) < 1e-12
            assert largest(spread.X - torch.tensor(X, dtype=torch.float64)) < 1e-12
        assert token < 2 or sum(Y) > 0  # layer 1 is written from token 1 on


def test_large_graphs_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"257 neurons are more than its 256\. Use models\.bdh\.model\.BDH"):
        GraphBDH.from_tensors(torch.ones(257, 2), torch.ones(257, 2), torch.ones(2, 257), torch.ones(257), 1)
    GraphBDH.from_tensors(torch.ones(256, 2), torch.ones(256, 2), torch.ones(2, 256), torch.ones(256), 1)


def test_mistakes_are_named(tensors: dict[str, Tensor], inputs: tuple[Tensor, Tensor]) -> None:
    graph = GraphBDH.from_tensors(**tensors, n_layers=1)
    names = ("x_excite", "x_inhibit", "y_excite", "y_inhibit", "synapse", "fading")
    graphs: dict[str, Tensor] = {name: getattr(graph, name) for name in names}
    with pytest.raises(ValueError, match="x_inhibit has negative weights"):
        GraphBDH(**{**graphs, "x_inhibit": -graph.x_inhibit}, n_layers=1)
    with pytest.raises(ValueError, match="fading has entries above 1"):
        GraphBDH(**{**graphs, "fading": 2 * graph.fading}, n_layers=1)
    with pytest.raises(ValueError, match=r"synapse has shape \(3, 3\)"):
        GraphBDH(**{**graphs, "synapse": torch.ones(3, 3)}, n_layers=1)
    with pytest.raises(ValueError, match="X must be 14 non-negative numbers"):
        graph.run(-inputs[0], inputs[1])
    with pytest.raises(ValueError, match="expected as many"):
        graph.run(inputs[0], inputs[1][:2])
