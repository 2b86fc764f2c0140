"""Sparse rows hold exactly the dense trace."""

import pytest
import torch

import models
from models.bdh.model import BDH
from probes.bdh.sparse import SparseRows, dense_bytes, sparse_activations
from tests.probes.bdh_naive import LENGTH, tiny_model, tiny_tokens


@pytest.fixture(scope="module")
def model() -> BDH:
    return tiny_model()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_rows_equal_the_dense_trace(model: BDH, dtype: torch.dtype) -> None:
    tokens = tiny_tokens()
    sparse = sparse_activations(model, tokens, dtype, names=("x", "gate", "y"))
    _, cache = model.run_with_cache(tokens, names=["blocks.*.hook_x", "blocks.*.hook_gate", "blocks.*.hook_y"])
    assert len(sparse) == 3 * 3 * 2
    for (name, layer, head), rows in sparse.items():
        dense = cache[f"blocks.{layer}.hook_{name}"][:, head]
        assert torch.equal(rows.dense(), dense.to(dtype)), (name, layer, head)
        assert torch.equal(rows.counts(), (dense != 0).sum(-1))
        assert 0 < rows.counts().sum() < dense.numel()  # some are active and some are not


def test_active_neurons_of_one_token(model: BDH) -> None:
    tokens = tiny_tokens()
    rows = sparse_activations(model, tokens, torch.float64)["y", 1, 1]
    _, cache = model.run_with_cache(tokens, names="blocks.1.hook_y")
    dense = cache["blocks.1.hook_y"][1, 1, -2]
    neurons, values = rows.active(-2, sequence=1)
    assert torch.equal(neurons, dense.nonzero()[:, 0]) and torch.equal(values, dense[neurons])
    with pytest.raises(ValueError, match="expected within 2 sequences of 9 tokens"):
        rows.active(LENGTH)


def test_tiny_values_stay_active_and_large_ones_are_refused() -> None:
    """Which neurons are active is decided before rounding: 1e-9 becomes 0 in float16 and stays in the row."""
    rows = SparseRows.of(torch.tensor([[[0.0, 1e-9, 2.0]]]), torch.float16)
    assert rows.counts().item() == 2 and rows.neurons.tolist() == [1, 2]
    with pytest.raises(OverflowError, match="1e\\+05 does not fit"):
        SparseRows.of(torch.tensor([[[0.0, 1e5]]]), torch.float16)


def test_more_neurons_than_uint16_counts() -> None:
    dense = torch.zeros(1, 2, 70_000)
    dense[0, 1, 69_999] = 3.0
    rows = SparseRows.of(dense, torch.float32)
    assert rows.neurons.dtype == torch.int32 and torch.equal(rows.dense(), dense)


def test_memory_and_density() -> None:
    """At 2,048 neurons the rows take less than half of the dense trace, and density counts what it says."""
    model = models.build("bdh", n_neurons=2048, d_model=32)
    tokens = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
    sparse = sparse_activations(model, tokens)
    assert sparse.nbytes() < 0.5 * dense_bytes(model, 80)
    _, cache = model.run_with_cache(tokens, names="blocks.1.hook_y")
    dense = (cache["blocks.1.hook_y"][:, :, 1:] != 0).float().mean()
    assert abs(sparse.density("y", 1) - float(dense)) < 1e-6


def test_mistakes_are_named(model: BDH) -> None:
    tokens = tiny_tokens()
    with pytest.raises(ValueError, match=r"Unknown activation 'gates'\. Did you mean 'gate'"):
        sparse_activations(model, tokens, names=["gates"])
    with pytest.raises(ValueError, match=r"layers is 3; expected 0\.\.2"):
        sparse_activations(model, tokens, layers=[3])
    with pytest.raises(KeyError, match="names \\['x', 'y'\\]"):
        sparse_activations(model, tokens)["gate", 0, 0]
    with pytest.raises(ValueError, match="captures nothing"):
        sparse_activations(model, tokens, layers=[])
