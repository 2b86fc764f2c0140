"""Ratios of the delta rule: chunks against the step loop, the cost of traces, and the exact pattern in seconds.

    python -m tests.benchmarks --only delta_rule

Every ratio comes from one process on one thread: both sides run in turn (A, B, A, B, …), each run is measured in CPU
seconds, and the ratio is that of the medians. Before anything is timed the outputs are compared with float64.
"""

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from kernels import gated_linear_attention as linear
from kernels.delta_rule import delta_rule, delta_rule_and_pseudo_values, effective_pattern, trace_entries
from tests.benchmarks import Row
from tests.benchmarks.bench_gated_linear_attention import chunk_products, make_row, paired_medians, relative_error


def make_inputs(head: int, pos: int, width: int) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """(q, k, v, beta), and a log decay by name."""
    q, k, v = torch.randn(3, 1, head, pos, width)
    k = torch.nn.functional.normalize(k, dim=-1)
    decays = {
        "no decay": None,
        "scalar decay": -torch.rand(1, head, pos) * 0.1,
        "vector decay": -torch.rand(1, head, pos, width) * 0.1,
    }
    return [q * width**-0.5, k, v, torch.rand(1, head, pos)], decays


def layer(head: int, pos: int, width: int, repeats: int, gradients: bool) -> list[Row]:
    rows = []
    shape = f"H={head} T={pos} K=V={width}"
    tensors, decays = make_inputs(head, pos, width)
    k, v, beta = tensors[1:]
    entries = [(i % head, (3 * i) % width, (7 * i) % width) for i in range(64)]
    for name, log_decay in decays.items():
        options: dict[str, Any] = {"log_decay": log_decay}
        wide: dict[str, Any] = {"log_decay": None if log_decay is None else log_decay.double()}
        expected, _ = delta_rule(*(x.double() for x in tensors), **wide, mode="recurrent")

        def forward(mode: str, options: dict[str, Any] = options) -> Tensor:
            with torch.no_grad():
                return delta_rule(*tensors, **options, mode=mode)[0]

        def training(mode: str, options: dict[str, Any] = options) -> None:
            leaves = [x.detach().requires_grad_() for x in tensors]
            delta_rule(*leaves, **options, mode=mode)[0].sum().backward()

        def traced(options: dict[str, Any] = options) -> None:
            with torch.no_grad():
                _, written, _ = delta_rule_and_pseudo_values(*tensors, **options)
                linear.trace_entries(k, written, entries, **options)

        def traced_alone(options: dict[str, Any] = options) -> None:
            with torch.no_grad():
                trace_entries(k, v, beta, entries, **options)

        error = relative_error(forward("chunked"), expected)
        times = paired_medians(lambda: forward("chunked"), lambda: forward("recurrent"), repeats)
        rows.append(make_row(f"step loop / chunks, forward, {name}, {shape}", times, True, 8.0, error))
        bound = paired_medians(
            chunk_products(tensors[0], k, v, 32 if pos % 32 == 0 else 8, delta=True),
            lambda: forward("recurrent"),
            repeats,
        )
        rows.append(
            make_row(f"step loop / the chunks' matrix products alone, {name}, {shape}", bound, True, None, error)
        )
        if gradients:  # the loop keeps every state: gigabytes for the wider layer
            times = paired_medians(lambda: training("chunked"), lambda: training("recurrent"), 3)
            rows.append(make_row(f"step loop / chunks, with gradients, {name}, {shape}", times, True, 8.0, error))
        times = paired_medians(traced, lambda: forward("chunked"), repeats)
        rows.append(make_row(f"with / without 64 traced entries, {name}, {shape}", times, False, 1.1, error))
        times = paired_medians(traced_alone, lambda: forward("chunked"), repeats)
        rows.append(make_row(f"64 entries traced alone / forward, {name}, {shape}", times, False, None, error))
    return rows


def patterns(head: int, pos: int, width: int, repeats: int) -> list[Row]:
    """Seconds of the exact pattern, checked by alpha @ v against the recurrence."""
    rows = []
    tensors, decays = make_inputs(head, pos, width)
    q, k, v, beta = tensors
    for name, log_decay in decays.items():
        wide = None if log_decay is None else log_decay.double()
        expected, _ = delta_rule(*(x.double() for x in tensors), log_decay=wide, mode="recurrent")
        error, seconds = 0.0, []
        for run in range(repeats + 1):
            start = time.process_time()
            with torch.no_grad():
                alpha = effective_pattern(q, k, beta, log_decay=log_decay)
            if run:
                seconds.append(time.process_time() - start)
            else:
                error = relative_error(alpha @ v, expected)
        label = f"exact pattern, {name}, H={head} T={pos} K={width}"
        note = f"one thread, alpha @ v relative error {error:.0e}"
        rows.append(Row(label, statistics.median(seconds), 1.5, "CPU seconds", note))
    return rows


def run(tiny: bool = False) -> list[Row]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if tiny:
        return layer(2, 40, 8, 1, True) + patterns(2, 40, 8, 1)
    return layer(4, 1024, 64, 7, True) + layer(16, 1024, 128, 5, False) + patterns(4, 1024, 64, 5)
