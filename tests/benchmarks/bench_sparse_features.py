"""Ratios of a sparse dictionary step against the dense one that libraries run.

    python -m tests.benchmarks --only sparse_features

A step is forward and backward of `‖x − decode(top_k(encode(x)))‖²` with gradients of both dictionaries and the bias, without the optimizer.
The dense side scatters the chosen values into [row, feature] and multiplies by the dictionary, as trainers commonly do. One process, one
thread, both sides in turn, CPU seconds, medians; gradients are compared with each other and with float64 before anything is timed.
"""

import torch
from torch import Tensor

from kernels.sparse_features import batch_top_features, decode, top_features
from kernels.sparse_features.reference import batch_top_codes, decode_dense, top_codes
from tests.benchmarks import Row
from tests.benchmarks.bench_gated_linear_attention import make_row, paired_medians, relative_error


def step(leaves: list[Tensor], x: Tensor, k: int, sparse: bool, whole_batch: bool) -> tuple[Tensor, ...]:
    weight, bias, dictionary = leaves
    if whole_batch and sparse:
        codes = batch_top_features(x, weight, bias, k)
        y = decode(codes.values, codes.features, dictionary, codes.starts)
    elif whole_batch:
        y = decode_dense(batch_top_codes(x, weight, bias, k), dictionary)
    elif sparse:
        y = decode(*top_features(x, weight, bias, k), dictionary)
    else:
        y = decode_dense(top_codes(x, weight, bias, k), dictionary)
    return torch.autograd.grad((x - y).pow(2).sum(), leaves)


def rows_for(rows: int, d: int, features: int, k: int, repeats: int) -> list[Row]:
    x = torch.randn(rows, d)
    dictionary = torch.nn.functional.normalize(torch.randn(features, d), dim=-1)
    leaves = [t.requires_grad_() for t in (dictionary.clone(), torch.zeros(features), dictionary.clone())]
    few = x[:64]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    found = []
    for whole_batch in (False, True):
        expected = step(wide, few.double(), k, False, whole_batch)
        actual = step(leaves, few, k, True, whole_batch)
        error = max(relative_error(a, b) for a, b in zip(actual, expected, strict=True))
        times = paired_medians(
            lambda whole=whole_batch: step(leaves, x, k, True, whole),  # type: ignore[misc]
            lambda whole=whole_batch: step(leaves, x, k, False, whole),  # type: ignore[misc]
            repeats,
        )
        kind = "top k of the batch" if whole_batch else "top k"
        found.append(
            make_row(
                f"dense / sparse step, {kind}, d={d} features={features} k={k} rows={rows}", times, True, 2.5, error
            )
        )
    encoder = torch.empty(rows, features)
    times = paired_medians(
        lambda: step(leaves, x, k, True, False), lambda: torch.mm(x, dictionary.T, out=encoder), repeats
    )
    found.append(
        make_row(f"sparse step / encoder product alone, d={d} features={features} k={k}", times, False, None, 0.0)
    )
    return found


def run(tiny: bool = False) -> list[Row]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return rows_for(96, 16, 512, 4, 1) if tiny else rows_for(1024, 768, 24576, 32, 5)
