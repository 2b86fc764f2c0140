"""What following entries of a state costs: time beside the forward pass of a whole model, memory beside storing every state.

    python -m tests.benchmarks --only state_traces

Time: the `demo` model of an architecture (four layers of width 128) reads 1,024 tokens; `trace_state` of 64 entries of one layer, which
runs the model too, against the forward pass alone, in turn in one process on one thread. Memory: the resident peak of a fresh process above
its inputs, following 64 entries against storing the state after every token, for one layer of four heads of 128 x 128. Values are compared
before anything is measured.
"""

import statistics
import time

import torch

import models
from tests.benchmarks import Row
from tests.benchmarks.bench_memory import in_fresh_process

ENTRIES = 64
NAMES = ("retnet", "mamba2", "gla", "gated-deltanet", "kda", "bdh")

PEAK = """
import json
from pathlib import Path
import torch
torch.set_num_threads(1)
from kernels import delta_rule, gated_linear_attention

def resident(line):  # in MB
    return next(int(l.split()[1]) / 1024 for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(line))

head, pos, width = {head}, {pos}, {width}
generator = torch.Generator().manual_seed(0)
k = torch.nn.functional.normalize(torch.randn(1, head, pos, width, generator=generator), dim=-1)
v = torch.randn(1, head, pos, width, generator=generator)
beta, g = torch.rand(1, head, pos, generator=generator), -torch.rand(1, head, pos, generator=generator) * 0.1
entries = [(i % head, 3 * i % width, 7 * i % width) for i in range({entries})]
with torch.no_grad():
    delta_rule.trace_entries(k[:, :, :8], v[:, :, :8], beta[:, :, :8], entries, log_decay=g[:, :, :8])  # code is loaded once
    gated_linear_attention.trace_entries(k[:, :, :8], v[:, :, :8], entries, log_decay=g[:, :, :8])
    start = resident("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        start = resident("VmHWM")
    result = {call}
print(json.dumps(resident("VmHWM") - start))
"""
CALLS = {
    "gated linear attention": (
        "gated_linear_attention.trace_entries(k, v, entries, log_decay=g)",
        "gated_linear_attention.states_at(k, v, range(pos), log_decay=g)",
    ),
    "gated delta rule": (
        "delta_rule.trace_entries(k, v, beta, entries, log_decay=g)",
        "delta_rule.states_at(k, v, beta, range(pos), log_decay=g)",
    ),
}


def time_row(name: str, length: int, repeats: int) -> Row:
    """`trace_state` / forward of one architecture."""
    torch.manual_seed(0)
    model = models.build(name, "demo")
    tokens = torch.arange(length)[None] * 7 % 256
    factors = model.state_factors(tokens, 2)
    head, size_k, size_v = factors["key"].shape[1], factors["key"].shape[3], factors["value"].shape[3]
    entries = [(i % head, 3 * i % size_k, 7 * i % size_v) for i in range(ENTRIES)]
    state = model.states(tokens, [length // 2], layers=2)[2][0, 0]
    traced = model.trace_state(tokens, 2, entries)[0, length // 2]
    expected = torch.stack([state[entry] for entry in entries])
    error = float((traced - expected).norm() / expected.norm())
    if not error < 1e-4:
        raise AssertionError(f"wrong entries, not timed: relative error {error:.1e} against the model's state")
    seconds: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for run in range(repeats + 1):
            for side, call in enumerate((lambda: model(tokens), lambda: model.trace_state(tokens, 2, entries))):
                start = time.process_time()
                call()
                if run:
                    seconds[side].append(time.process_time() - start)
    plain, with_trace = (statistics.median(side) for side in seconds)
    note = f"{with_trace * 1e3:.1f} ms and {plain * 1e3:.1f} ms, relative error {error:.0e}"
    return Row(
        f"model with / without {ENTRIES} traced entries, {name}, T={length}", with_trace / plain, 1.1, "time", note
    )


def memory_row(rule: str, head: int, pos: int, width: int) -> Row:
    """Peak of following entries / peak of storing every state."""
    sizes = {"head": head, "pos": pos, "width": width, "entries": ENTRIES}
    traced, stored = (in_fresh_process(PEAK.format(call=call, **sizes)) for call in CALLS[rule])
    note = f"{traced:.1f} MB and {stored:.0f} MB"
    name = f"{ENTRIES} traced entries / every state, {rule}, H={head} T={pos} K=V={width}"
    return Row(name, traced / max(stored, 1e-3), 1 / 50, "bytes", note)


def run(tiny: bool = False) -> list[Row]:
    torch.set_num_threads(1)
    if tiny:
        return [time_row("retnet", 48, 1), memory_row("gated delta rule", 2, 32, 8)]
    return [*(time_row(name, 1024, 7) for name in NAMES), *(memory_row(rule, 4, 1024, 128) for rule in CALLS)]
