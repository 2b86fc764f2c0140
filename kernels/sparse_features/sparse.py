"""Codes as lists of (feature, value), and the two products that a dictionary needs in that form.

Every product here is a weighted sum of rows of a matrix, which torch has as one operation (`embedding_bag`):

    decoding          y_b = Σ_j v_bj D[i_bj]                         sums rows of D, one bag per row of the batch
    gradient of D     ∂D_f = Σ_{(b,j): i_bj = f} v_bj ∂y_b            sums rows of ∂y, one bag per feature
    gradient of W     ∂W_f = Σ_{(b,j): i_bj = f} ∂z_bj x_b            the same bags over rows of x
    gradient of v     ∂v_bj = ⟨∂y_b, D[i_bj]⟩                         a gather and a dot product, a few rows at a time

Feature-major bags come from one stable sort of the feature numbers, so sums have a fixed order and results are deterministic.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.arguments import check_like, check_positive_integer, check_tensor, shape_of

_BLOCK = 64  # features per block in the two-level selection
_GATHERED = 2**22  # numbers gathered at once for dot products


class SparseCodes(NamedTuple):
    """Values and features of all rows one after the other; row b holds entries starts[b] … starts[b+1] − 1."""

    values: Tensor  # [entry]
    features: Tensor  # int64 [entry]
    starts: Tensor  # int64 [row + 1]


def top_features(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of ReLU(x Wᵀ + b) in every row, in no particular order.

    Differentiable in x, weight and bias: the gradient reaches only what was chosen and positive, as in the dense equation.

    Args:
        x: [row, d]. weight: [feature, d]. bias: [feature]. k: features per row.

    Returns:
        values [row, k] (0 where fewer than k are positive) and features, int64 [row, k].

    Raises:
        ValueError, TypeError: a shape, dtype or k that does not fit, named.
    """
    _check_encoder(x, weight, bias, k)
    return _TopFeatures.apply(x, weight, bias, k)


def batch_top_features(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> SparseCodes:
    """The k · row largest of ReLU(x Wᵀ + b) in the whole batch; a row may have more or fewer than k. Arguments as `top_features`."""
    _check_encoder(x, weight, bias, k)
    values, features, starts = _BatchTopFeatures.apply(x, weight, bias, k)
    return SparseCodes(values, features, starts)


def decode(values: Tensor, features: Tensor, dictionary: Tensor, starts: Tensor | None = None) -> Tensor:
    """Σ_j values_j · dictionary[features_j] for every row: [row, d]. Differentiable in values and dictionary.

    Args:
        values, features: [row, k]; or [entry] with `starts` [row + 1] as in `SparseCodes`.
        dictionary: [feature, d].
    """
    n_axes = 1 if starts is not None else 2
    check_tensor("values", values, "entry" if starts is not None else "row, k", n_axes)
    check_tensor("dictionary", dictionary, "feature, d", 2)
    check_like("dictionary", dictionary, "values", values, same_dtype=True)
    if features.shape != values.shape or features.dtype != torch.int64:
        raise ValueError(
            f"features: expected int64 {shape_of(values)} as values, got {features.dtype} {shape_of(features)}"
        )
    if starts is None:
        rows, k = values.shape
        starts = torch.arange(0, rows * k + 1, k, device=values.device)
    elif starts.ndim != 1 or starts.dtype != torch.int64:
        raise ValueError(f"starts: expected int64 [row + 1], got {starts.dtype} {shape_of(starts)}")
    return _Decode.apply(values.flatten(), features.flatten(), starts, dictionary)


class _TopFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, features = _largest(torch.addmm(bias, x, weight.T), k)
        values = values.relu_()
        ctx.save_for_backward(x, weight, features, values)
        ctx.mark_non_differentiable(features)
        return values, features

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, features, values = ctx.saved_tensors
        rows, k = features.shape
        starts = torch.arange(0, rows * k + 1, k, device=x.device)
        return (*_encoder_gradients(ctx, (grad * (values > 0)).flatten(), features.flatten(), starts, x, weight), None)


class _BatchTopFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        z = torch.addmm(bias, x, weight.T)
        rows = len(x)
        values, flat = _largest(z.view(1, -1), k * rows)
        flat = flat[values > 0].sort().values
        row, features = flat // z.shape[1], flat % z.shape[1]
        starts = torch.zeros(rows + 1, dtype=torch.int64, device=x.device)
        torch.cumsum(torch.bincount(row, minlength=rows), 0, out=starts[1:])
        values = z.flatten()[flat]
        ctx.save_for_backward(x, weight, features, starts)
        ctx.mark_non_differentiable(features, starts)
        return values, features, starts

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, features, starts = ctx.saved_tensors
        return (*_encoder_gradients(ctx, grad, features, starts, x, weight), None)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, features: Tensor, starts: Tensor, dictionary: Tensor) -> Tensor:
        ctx.save_for_backward(values, features, starts, dictionary)
        return _bags(dictionary, features, starts, values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        values, features, starts, dictionary = ctx.saved_tensors
        to_values = _row_dots(grad, dictionary, features, starts) if ctx.needs_input_grad[0] else None
        to_dictionary = None
        if ctx.needs_input_grad[3]:
            to_dictionary = _by_feature(grad, values, features, starts, len(dictionary))
        return to_values, None, None, to_dictionary


def _encoder_gradients(
    ctx: Any, grad: Tensor, features: Tensor, starts: Tensor, x: Tensor, weight: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias from those of the chosen pre-activations `grad` [entry]."""
    to_x = _bags(weight, features, starts, grad) if ctx.needs_input_grad[0] else None
    to_weight = _by_feature(x, grad, features, starts, len(weight)) if ctx.needs_input_grad[1] else None
    to_bias = None
    if ctx.needs_input_grad[2]:
        to_bias = torch.zeros(len(weight), dtype=x.dtype, device=x.device).index_add_(0, features, grad)
    return to_x, to_weight, to_bias


def _largest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row. Each of them lies in one of the k blocks with the largest maxima, so only those are searched."""
    rows, width = z.shape
    blocks = width // _BLOCK
    if width % _BLOCK or blocks < 4 * k:
        values, indices = z.topk(k, dim=-1, sorted=False)
        return values, indices
    tiled = z.view(rows, blocks, _BLOCK)
    chosen = tiled.amax(-1).topk(k, dim=-1, sorted=False).indices  # [row, k] block numbers
    candidates = tiled.gather(1, chosen[..., None].expand(-1, -1, _BLOCK)).flatten(1)
    values, places = candidates.topk(k, dim=-1, sorted=False)
    return values, chosen.gather(1, places // _BLOCK) * _BLOCK + places % _BLOCK


def _bags(matrix: Tensor, rows: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Σ of weights · matrix[rows] within each bag: [bag, width]."""
    return F.embedding_bag(
        rows, matrix, offsets=starts, per_sample_weights=weights, mode="sum", include_last_offset=True
    )


def _by_feature(matrix: Tensor, weights: Tensor, features: Tensor, starts: Tensor, n_features: int) -> Tensor:
    """Σ over the entries of each feature of weight · matrix[row of the entry]: [feature, width]."""
    order = features.argsort(stable=True)
    row = torch.repeat_interleave(torch.arange(len(starts) - 1, device=features.device), starts.diff())
    bounds = torch.zeros(n_features + 1, dtype=torch.int64, device=features.device)
    torch.cumsum(torch.bincount(features, minlength=n_features), 0, out=bounds[1:])
    return _bags(matrix, row[order], bounds, weights[order])


def _row_dots(rows: Tensor, matrix: Tensor, features: Tensor, starts: Tensor) -> Tensor:
    """⟨rows[b], matrix[feature]⟩ for every entry: [entry]. Only a few gathered rows exist at a time."""
    out = torch.empty(len(features), dtype=rows.dtype, device=rows.device)
    count, width = len(features), matrix.shape[1]
    if len(starts) > 1 and count and bool((starts.diff() == starts[1]).all()):  # every row has the same number
        k = int(starts[1])
        step = max(1, _GATHERED // (k * width))
        by_row = features.view(-1, k)
        for start in range(0, len(rows), step):
            piece = slice(start, start + step)
            out.view(-1, k)[piece] = torch.bmm(matrix[by_row[piece]], rows[piece, :, None])[..., 0]
        return out
    row = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), starts.diff())
    for start in range(0, count, max(1, _GATHERED // width)):
        piece = slice(start, start + max(1, _GATHERED // width))
        out[piece] = (matrix[features[piece]] * rows[row[piece]]).sum(-1)
    return out


def _check_encoder(x: Tensor, weight: Tensor, bias: Tensor, k: int) -> None:
    check_tensor("x", x, "row, d", 2)
    check_tensor("weight", weight, "feature, d", 2)
    check_tensor("bias", bias, "feature", 1)
    if weight.shape[1] != x.shape[1]:
        raise ValueError(f"weight: expected [feature, d={x.shape[1]}] to match x {shape_of(x)}, got {shape_of(weight)}")
    if bias.shape[0] != weight.shape[0]:
        raise ValueError(f"bias: expected [feature={weight.shape[0]}] to match weight, got {shape_of(bias)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_like(name, tensor, "x", x, same_dtype=True)
    check_positive_integer("k", k)
    if k > weight.shape[0]:
        raise ValueError(f"k: {k} features per row, but there are only {weight.shape[0]}")
