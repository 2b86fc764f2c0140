"""Ratios of gated linear attention: chunks against the step loop, against BDH's quadratic form, and the cost of traces.

    python -m tests.benchmarks.bench_gated_linear_attention [--json] [--tiny]

Every ratio comes from one process on one thread: both sides run in turn (A, B, A, B, …), each run is measured in CPU
seconds (on a GPU in seconds until it has finished), and the ratio is that of the medians. Before anything is timed the
outputs are compared with float64.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor

from kernels.gated_linear_attention import effective_pattern, gated_linear_attention, trace_entries
from tests.benchmarks import Row
from tests.benchmarks.__main__ import format_table


def gpu_clock() -> float:
    """Seconds once the GPU has finished what it was given; wall time, because the process only waits."""
    torch.cuda.synchronize()
    return time.perf_counter()


def paired_medians(
    ours: Callable[[], object],
    baseline: Callable[[], object],
    repeats: int,
    clock: Callable[[], float] = time.process_time,
) -> tuple[float, float]:
    """Median seconds of each side, in turn after one unmeasured run of both; CPU seconds unless a clock is given."""
    sides = (ours, baseline)
    times: tuple[list[float], list[float]] = ([], [])
    for run in range(repeats + 1):
        for side, seconds in zip(sides, times, strict=True):
            start = clock()
            side()
            if run:
                seconds.append(clock() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def make_row(name: str, times: tuple[float, float], ours_below: bool, goal: float | None, error: float) -> Row:
    ours, other = times
    note = f"{ours * 1e3:.2f} ms and {other * 1e3:.2f} ms, relative error {error:.0e}"
    return Row(name, other / ours if ours_below else ours / other, goal, "time", note, at_least=ours_below)


def relative_error(actual: Tensor, expected: Tensor, limit: float = 1e-5) -> float:
    error = ((actual.double() - expected).norm() / expected.norm()).item()
    if not error < limit:
        raise AssertionError(f"wrong result, not timed: relative error {error:.1e} against float64")
    return error


def decays(batch: int, head: int, pos: int, state_k: int) -> dict[str, Tensor | None]:
    return {
        "no decay": None,
        "constant decay": -torch.rand(head) * 0.1,
        "scalar decay": -torch.rand(batch, head, pos) * 0.1,
        "vector decay": -torch.rand(batch, head, pos, state_k) * 0.1,
    }


def chunk_products(q: Tensor, k: Tensor, v: Tensor, chunk: int, delta: bool = False) -> Callable[[], None]:
    """The matrix products that any form in chunks of this size has to make, and nothing else: no decay, no mask, no carrying of states.

    Scores, their product with the values, what is written into the state and what is read from it; for the delta rule also the products of
    keys with keys, and what each chunk takes back. How fast the step loop is against these says what chunks could win at most here.
    """
    queries, keys, values = (x.unflatten(2, (-1, chunk)) for x in (q, k, v))
    state = torch.randn(*queries.shape[:3], k.shape[3], v.shape[3])
    square = torch.randn(*queries.shape[:3], chunk, chunk)

    def products() -> None:
        with torch.no_grad():
            queries @ keys.mT, square @ values, keys.mT @ values, queries @ state
            if delta:
                keys @ keys.mT, square @ keys, square @ values, keys @ state

    return products


def small_layers(head: int, pos: int, width: int, repeats: int) -> list[Row]:
    """Step loop / chunks, forward and with gradients, and the share that 64 traced entries add to the forward."""
    rows = []
    shape = f"H={head} T={pos} K=V={width}"
    q, k = torch.randn(2, 1, head, pos, width) * 0.2
    v = torch.randn(1, head, pos, width)
    entries = [(i % head, (3 * i) % width, (7 * i) % width) for i in range(64)]
    for name, log_decay in decays(1, head, pos, width).items():
        wide = None if log_decay is None else log_decay.double()
        expected, _ = gated_linear_attention(q.double(), k.double(), v.double(), log_decay=wide, mode="recurrent")

        def forward(mode: str, log_decay: Tensor | None = log_decay) -> Tensor:
            with torch.no_grad():
                return gated_linear_attention(q, k, v, log_decay=log_decay, mode=mode)[0]

        def training(mode: str, log_decay: Tensor | None = log_decay) -> None:
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            gated_linear_attention(*leaves, log_decay=log_decay, mode=mode)[0].sum().backward()

        def traced(log_decay: Tensor | None = log_decay) -> None:
            with torch.no_grad():
                gated_linear_attention(q, k, v, log_decay=log_decay)
                trace_entries(k, v, entries, log_decay=log_decay)

        error = relative_error(forward("chunked"), expected)

        def row(label: str, times: tuple[float, float], loop_over_ours: bool, goal: float | None) -> Row:
            return make_row(f"{label}, {name}, {shape}", times, loop_over_ours, goal, error)  # noqa: B023

        times = paired_medians(lambda: forward("chunked"), lambda: forward("recurrent"), repeats)
        rows.append(row("step loop / chunks, forward", times, True, 8.0))
        bound = paired_medians(chunk_products(q, k, v, min(32, pos)), lambda: forward("recurrent"), repeats)
        rows.append(row("step loop / the chunks' matrix products alone", bound, True, None))
        if head * width <= 256:  # the loop keeps every state: gigabytes for the wider layer
            times = paired_medians(lambda: training("chunked"), lambda: training("recurrent"), 3)
            rows.append(row("step loop / chunks, with gradients", times, True, 8.0))
        times = paired_medians(traced, lambda: forward("chunked"), repeats)
        rows.append(row("with / without 64 traced entries", times, False, 1.1))
    return rows


def patterns(head: int, pos: int, width: int, repeats: int) -> list[Row]:
    """Seconds of the exact pattern, checked by alpha @ v against the recurrence."""
    rows = []
    q, k = torch.randn(2, 1, head, pos, width) * 0.2
    v = torch.randn(1, head, pos, width)
    for name, log_decay in decays(1, head, pos, width).items():
        wide = None if log_decay is None else log_decay.double()
        expected, _ = gated_linear_attention(q.double(), k.double(), v.double(), log_decay=wide, mode="recurrent")
        error, seconds = 0.0, []
        for run in range(repeats + 1):
            start = time.process_time()
            with torch.no_grad():
                alpha = effective_pattern(q, k, log_decay=log_decay)
            if run:
                seconds.append(time.process_time() - start)
            else:
                error = relative_error(alpha @ v, expected)
        label = f"exact pattern, {name}, H={head} T={pos} K={width}"
        note = f"one thread, alpha @ v relative error {error:.0e}"
        rows.append(Row(label, statistics.median(seconds), 1.5, "CPU seconds", note))
    return rows


def bdh_layer(head: int, pos: int, neuron: int, d_model: int, repeats: int) -> list[Row]:
    """BDH's official attention, (q k^T).tril(-1) v with q = k, against chunks, and the cost of 64 traced synapses."""
    shape = f"H={head} T={pos} N={neuron} d={d_model}"
    x = torch.randn(1, head, pos, neuron) * (torch.rand(1, head, pos, neuron) < 0.05)
    v = torch.randn(1, 1, pos, d_model)
    entries = [(i % head, (131 * i) % neuron, (7 * i) % d_model) for i in range(64)]
    with torch.no_grad():
        first = min(pos, 256)  # the float64 oracle of the first rows needs no pos x pos matrix
        cut, values = x[:, :, :first].double(), v[:, :, :first].double()
        expected = (cut @ cut.mT).tril(-1) @ values
        output, _ = gated_linear_attention(x, x, v, strict=True)
        error = relative_error(output[:, :, :first], expected)
        last = ((x[:, :, -1:].double() @ x[:, :, :-1].mT.double()) @ v[:, :, :-1].double()).squeeze(2)
        error = max(error, relative_error(output[:, :, -1], last))

        def quadratic() -> Tensor:
            return (x @ x.mT).tril(-1) @ v

        def chunks() -> Tensor:
            return gated_linear_attention(x, x, v, strict=True)[0]

        def traced() -> None:
            gated_linear_attention(x, x, v, strict=True)
            trace_entries(x, v, entries)

        times = paired_medians(chunks, quadratic, repeats)
        rows = [make_row(f"BDH quadratic form / chunks, {shape}", times, True, 6.0 if pos >= 4096 else None, error)]
        times = paired_medians(traced, chunks, repeats)
        rows.append(make_row(f"BDH with / without 64 traced synapses, {shape}", times, False, 1.1, error))
    return rows


def kernel_layers(
    device: str, dtype: torch.dtype, head: int, pos: int, state_k: int, state_v: int, clock: Callable[[], float]
) -> list[Row]:
    """What the Triton kernel wins over the torch chunks on the same device, value shared over heads as in BDH."""
    rows = []
    q, k = (torch.randn(2, 1, head, pos, state_k, device=device) * state_k**-0.5).to(dtype)
    v = torch.randn(1, 1, pos, state_v, device=device).to(dtype)
    first = min(pos, 256)
    for name, log_decay in decays(1, head, pos, 1).items():
        if name == "vector decay":  # the kernel has none
            continue
        g = None if log_decay is None else log_decay.to(device)
        with torch.no_grad():

            def kernel(g: Tensor | None = g) -> Tensor:
                return gated_linear_attention(q, k, v, log_decay=g)[0]

            def chunks(g: Tensor | None = g) -> Tensor:
                return gated_linear_attention(q, k, v, log_decay=g, chunk_size=64)[0]

            start = [x[:, :, :first].double() for x in (q, k, v)]
            decay = None if g is None else (g if g.ndim == 1 else g[:, :, :first]).double()
            expected, _ = gated_linear_attention(*start, log_decay=decay, mode="recurrent")
            error = relative_error(kernel()[:, :, :first], expected, 1e-5 if dtype == torch.float32 else 5e-3)
            times = paired_medians(kernel, chunks, 7, clock)
        label = f"torch chunks / kernel, {name}, H={head} T={pos} K={state_k} V={state_v} {str(dtype)[6:]}"
        rows.append(make_row(label, times, True, 1.0, error))
    return rows


def run(tiny: bool = False) -> list[Row]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if tiny:
        rows = small_layers(2, 32, 8, 1) + bdh_layer(2, 32, 64, 8, 1) + patterns(2, 32, 8, 1)
        return rows + kernel_layers("cpu", torch.float32, 2, 32, 8, 8, time.process_time)
    rows = small_layers(4, 1024, 64, 7) + small_layers(16, 1024, 128, 7)
    rows += patterns(4, 1024, 64, 5)
    rows += bdh_layer(1, 2048, 8192, 256, 7) + bdh_layer(1, 4096, 8192, 256, 7)
    if torch.cuda.is_available():
        for dtype in (torch.bfloat16, torch.float32):
            rows += kernel_layers("cuda", dtype, 16, 2048, 128, 128, gpu_clock)
            rows += kernel_layers("cuda", dtype, 4, 2048, 8192, 256, gpu_clock)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: checks the benchmark, measures nothing")
    options = parser.parse_args(arguments)
    rows = run(options.tiny)
    if options.json:
        print(json.dumps([{**asdict(row), "within": row.within} for row in rows], indent=1))
    else:
        print(format_table({"gated_linear_attention": rows}))


if __name__ == "__main__":
    main()
