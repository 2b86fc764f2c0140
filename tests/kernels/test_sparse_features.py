"""Sparse codes against the dense equations: values, gradients, and what happens at the edges."""

import pytest
import torch
from torch import Tensor

from kernels.sparse_features import batch_top_features, decode, top_features
from kernels.sparse_features.reference import batch_top_codes, decode_dense, top_codes

SHAPES = [
    (5, 7, 30, 3),
    (9, 6, 2048, 4),
    (1, 4, 64, 64),
    (3, 8, 1024, 5),
    (0, 3, 10, 2),
    (300, 4, 640, 2),
]  # row, d, feature, k


def parts(rows: int, d: int, features: int, seed: int = 0) -> list[Tensor]:
    """x, encoder weight, bias, dictionary, and a direction for gradients, in float64."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(rows, d), (features, d), (features,), (features, d), (rows, d)]
    made = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    made[2] -= 0.3
    return made


def dense_codes(values: Tensor, features: Tensor, n_features: int) -> Tensor:
    return torch.zeros(len(values), n_features, dtype=values.dtype).scatter_add(1, features, values)


@pytest.mark.parametrize(("rows", "d", "features", "k"), SHAPES)
def test_top_features_are_the_dense_codes(rows: int, d: int, features: int, k: int) -> None:
    x, weight, bias, *_ = parts(rows, d, features)
    values, chosen = top_features(x, weight, bias, k)
    assert values.shape == chosen.shape == (rows, k) and bool((values >= 0).all())
    expected = top_codes(x, weight, bias, k)
    assert torch.allclose(dense_codes(values, chosen, features), expected, rtol=0, atol=1e-12)
    assert all(len(set(row)) == k for row in chosen.tolist())


@pytest.mark.parametrize(("rows", "d", "features", "k"), SHAPES[:4])
@pytest.mark.parametrize("form", ["per row", "per batch"])
def test_gradients_are_those_of_the_dense_equation(rows: int, d: int, features: int, k: int, form: str) -> None:
    *leaves, direction = [t.requires_grad_() for t in parts(rows, d, features)]
    x, weight, bias, dictionary = leaves
    if form == "per row":
        values, chosen = top_features(x, weight, bias, k)
        y = decode(values, chosen, dictionary)
        expected = decode_dense(top_codes(x, weight, bias, k), dictionary)
    else:
        codes = batch_top_features(x, weight, bias, k)
        y = decode(codes.values, codes.features, dictionary, codes.starts)
        expected = decode_dense(batch_top_codes(x, weight, bias, k), dictionary)
    assert torch.allclose(y, expected, rtol=0, atol=1e-12)
    ours = torch.autograd.grad((y * direction).sum(), leaves)
    theirs = torch.autograd.grad((expected * direction).sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) < 1e-12 * (1 + float(b.abs().max()))


def test_batch_top_features_spend_the_budget_where_it_counts() -> None:
    x, weight, bias, *_ = parts(6, 5, 40)
    x[0] *= 10  # one loud row takes most of the budget
    codes = batch_top_features(x, weight, bias, 3)
    counts = codes.starts.diff()
    assert int(counts.sum()) == len(codes.values) == 18 and int(counts[0]) > 6 > int(counts.min())
    rebuilt = torch.zeros(6, 40, dtype=x.dtype)
    for row in range(6):
        piece = slice(codes.starts[row], codes.starts[row + 1])
        rebuilt[row, codes.features[piece]] = codes.values[piece]
    assert torch.allclose(rebuilt, batch_top_codes(x, weight, bias, 3), rtol=0, atol=1e-12)


def test_features_that_are_not_positive_are_silent_and_get_no_gradient() -> None:
    x, weight, _, dictionary, _ = parts(4, 5, 12)
    bias = torch.full((12,), -1e3, dtype=x.dtype)
    for tensor in (x, weight, dictionary):
        tensor.requires_grad_()
    values, chosen = top_features(x, weight, bias, 3)
    assert float(values.detach().abs().max()) == 0
    decode(values, chosen, dictionary).sum().backward()
    assert float(x.grad.abs().max()) == float(weight.grad.abs().max()) == float(dictionary.grad.abs().max()) == 0
    codes = batch_top_features(x.detach(), weight.detach(), bias, 3)
    assert len(codes.values) == 0 and codes.starts.tolist() == [0] * 5
    assert decode(codes.values, codes.features, dictionary.detach(), codes.starts).abs().sum() == 0


def test_rows_without_codes_between_others_decode_to_nothing() -> None:
    dictionary = torch.eye(3, dtype=torch.float64, requires_grad=True)
    values = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    y = decode(values, torch.tensor([2, 2]), dictionary, torch.tensor([0, 1, 1, 2]))
    assert y.tolist() == [[0, 0, 2], [0, 0, 0], [0, 0, 3]]
    y.sum().backward()
    assert values.grad.tolist() == [1, 1] and dictionary.grad[2].tolist() == [5, 5, 5]


def test_the_order_of_sums_is_fixed() -> None:
    leaves = [t.float().requires_grad_() for t in parts(64, 16, 512)[:4]]

    def gradients() -> tuple[Tensor, ...]:
        values, chosen = top_features(leaves[0], leaves[1], leaves[2], 8)
        return torch.autograd.grad(decode(values, chosen, leaves[3]).pow(2).sum(), leaves)

    assert all(torch.equal(a, b) for a, b in zip(gradients(), gradients(), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3)}, r"x: expected 2 axes \[row, d\]"),
        ({"weight": torch.zeros(9, 4)}, r"weight: expected \[feature, d=5\]"),
        ({"bias": torch.zeros(8)}, r"bias: expected \[feature=9\]"),
        ({"weight": torch.zeros(9, 5).double()}, "weight: expected torch.float32"),
        ({"k": 0}, "k: expected a positive integer"),
        ({"k": 10}, "only 9"),
    ],
)
def test_mistakes_are_named(change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(3, 5), "weight": torch.zeros(9, 5), "bias": torch.zeros(9), "k": 2, **change}
    with pytest.raises(ValueError, match=message):
        top_features(**arguments)
    with pytest.raises(ValueError, match=message):
        batch_top_features(**arguments)


def test_decoding_mistakes_are_named() -> None:
    values, features, dictionary = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(4, 5)
    with pytest.raises(ValueError, match="features: expected int64"):
        decode(values, features.int(), dictionary)
    with pytest.raises(ValueError, match=r"values: expected 1 axes \[entry\]"):
        decode(values, features, dictionary, torch.tensor([0, 3, 6]))
    with pytest.raises(ValueError, match="starts: expected int64"):
        decode(values.flatten(), features.flatten(), dictionary, torch.tensor([0.0, 3, 6]))
