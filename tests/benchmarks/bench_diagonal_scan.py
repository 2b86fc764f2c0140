"""Ratios of the diagonal and the selective scan: the chosen form against the step loop, traces, and the exact pattern.

    python -m tests.benchmarks --only diagonal_scan

Every ratio comes from one process on one thread: both sides run in turn (A, B, A, B, …), each run is measured in CPU
seconds, and the ratio is that of the medians. Before anything is timed the outputs are compared with float64.
"""

import statistics
import time

import torch
from torch import Tensor

from kernels.diagonal_scan import diagonal_scan, selective_entries, selective_pattern, selective_scan
from tests.benchmarks import Row
from tests.benchmarks.bench_gated_linear_attention import make_row, paired_medians, relative_error


def widths(pos: int, channels: tuple[int, ...], repeats: int) -> list[Row]:
    """Step loop / chosen form of the diagonal scan for narrow and wide states, without and with gradients."""
    rows = []
    for dtype in (torch.float32, torch.complex64):
        for channel in channels:
            decay = 0.9 * torch.rand(1, pos, channel, dtype=torch.float32).to(dtype)
            inputs = torch.randn(1, pos, channel, dtype=dtype)
            wide = torch.complex128 if dtype.is_complex else torch.float64
            expected, _ = diagonal_scan(decay.to(wide), inputs.to(wide), mode="recurrent")

            def forward(mode: str, decay: Tensor = decay, inputs: Tensor = inputs) -> Tensor:
                with torch.no_grad():
                    return diagonal_scan(decay, inputs, mode=mode)[0]

            def training(mode: str, decay: Tensor = decay, inputs: Tensor = inputs) -> None:
                leaves = [x.detach().requires_grad_() for x in (decay, inputs)]
                diagonal_scan(*leaves, mode=mode)[0].abs().sum().backward()

            states = forward("auto")
            error = relative_error(torch.view_as_real(states.to(wide) + 0j), torch.view_as_real(expected + 0j))
            label = f"{str(dtype)[6:]}, T={pos} channels={channel}"
            times = paired_medians(lambda: forward("auto"), lambda: forward("recurrent"), repeats)
            rows.append(make_row(f"step loop / scan, forward, {label}", times, True, 1.0, error))
            times = paired_medians(lambda: training("auto"), lambda: training("recurrent"), min(3, repeats))
            rows.append(make_row(f"step loop / scan, with gradients, {label}", times, True, 1.0, error))
    return rows


def mamba(pos: int, channel: int, state: int, repeats: int) -> list[Row]:
    """Mamba-1's scan against its step loop, the cost of 64 traced entries, and seconds per channel of the pattern."""
    x, steps = torch.randn(1, pos, channel), 0.1 * torch.rand(1, pos, channel)
    A = -torch.arange(1.0, state + 1).expand(channel, state).contiguous()
    B, C = torch.randn(2, 1, pos, state)
    entries = [(7 * i % channel, i % state) for i in range(64)]
    wide = [tensor.double() for tensor in (x, steps, A, B, C)]
    expected, _ = selective_scan(wide[0], wide[1], wide[2], wide[3], wide[4], mode="recurrent")
    shape = f"T={pos} D={channel} N={state}"

    def forward(mode: str = "chunked") -> Tensor:
        with torch.no_grad():
            return selective_scan(x, steps, A, B, C, mode=mode)[0]

    def training(mode: str = "chunked") -> None:
        leaves = [tensor.detach().requires_grad_() for tensor in (x, steps, A, B, C)]
        selective_scan(leaves[0], leaves[1], leaves[2], leaves[3], leaves[4], mode=mode)[0].sum().backward()

    def traced() -> None:
        with torch.no_grad():
            selective_scan(x, steps, A, B, C)
            selective_entries(x, steps, A, B, entries)

    error = relative_error(forward(), expected)
    times = paired_medians(forward, lambda: forward("recurrent"), repeats)
    rows = [make_row(f"step loop / selective scan, forward, {shape}", times, True, 1.0, error)]
    times = paired_medians(training, lambda: training("recurrent"), min(3, repeats))
    rows.append(make_row(f"step loop / selective scan, with gradients, {shape}", times, True, 1.0, error))
    times = paired_medians(traced, forward, repeats)
    rows.append(make_row(f"with / without 64 traced entries, {shape}", times, False, 1.1, error))

    channels = list(range(0, channel, max(1, channel // 8)))
    length = min(pos, 1024)
    cut = [tensor[:, :length] for tensor in (steps, B, C)]
    seconds = []
    for run in range(repeats + 1):
        start = time.process_time()
        with torch.no_grad():
            alpha = selective_pattern(cut[0], A, cut[1], cut[2], channels=channels)
        if run:
            seconds.append((time.process_time() - start) / len(channels))
        else:
            read = torch.einsum("bcij,bjc->bic", alpha, x[:, :length, channels])
            error = relative_error(read, expected[:, :length, channels])
    note = f"one thread, alpha @ x relative error {error:.0e}"
    label = f"exact pattern of one channel, T={length} N={state}"
    return [*rows, Row(label, statistics.median(seconds), None, "CPU seconds", note)]


def run(tiny: bool = False) -> list[Row]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if tiny:
        return widths(40, (4,), 1) + mamba(40, 8, 4, 1)
    return widths(1024, (64, 1024, 8192), 7) + mamba(2048, 512, 16, 7) + mamba(2048, 64, 16, 5)
