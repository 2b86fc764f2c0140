"""Attention statistics in strips against the same statistics of whole patterns: time, memory, and what a length costs that has no pattern.

    python -m tests.benchmarks --only attention_statistics

The peer holds scores and pattern [head, query, key] in float32 and uses the shortest plain torch for each statistic (`materialised` below):
softmax and log-sum-exp, `entr`, `max`, products with [1, j, j²] for the distances, sums and maxima over columns, one skewed copy for the
profile, adaptive max pooling for the map. Both sides give the same twelve statistics and run in turn on one thread. Memory is the highest
resident memory of a fresh process above its inputs.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention_statistics import attention_statistics, gated_linear_statistics
from tests.benchmarks import Row
from tests.benchmarks.bench_gated_linear_attention import paired_medians

ROOT = Path(__file__).resolve().parents[2]
HEADS, WIDTH = 12, 64
BINS = 64  # a divisor of the lengths, where adaptive pooling has the same bins


def materialised(q: Tensor, k: Tensor, map_size: int = BINS) -> dict[str, Tensor]:
    """The statistics of causal attention [head, query, key] from the whole pattern."""
    length = q.shape[1]
    position = torch.arange(length, dtype=q.dtype)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill_(hidden, float("-inf"))
    found = {"log_normaliser": scores.logsumexp(-1)}
    pattern = scores.softmax(-1)
    del scores
    found["entropy"] = torch.special.entr(pattern).sum(-1)
    found["largest"], found["largest_at"] = pattern.max(-1)
    found["first"] = pattern[..., 0].clone()
    found["self"], found["previous"] = pattern.diagonal(0, -2, -1).clone(), pattern.diagonal(-1, -2, -1).clone()
    mean, square = (pattern @ torch.stack([position, position**2], -1)).unbind(-1)
    found["distance"] = position - mean
    found["distance_squared"] = position**2 - 2 * position * mean + square
    found["received"] = pattern.sum(-2) / (length - position)
    found["received_largest"] = pattern.amax(-2)
    found["map"] = F.adaptive_max_pool2d(pattern, map_size)
    found["profile"] = diagonal_sums(pattern)
    return found


def diagonal_sums(pattern: Tensor) -> Tensor:
    """Sum of every diagonal by distance 0 … length − 1, through one padded copy of which the diagonals are columns."""
    length = pattern.shape[-1]
    padded = F.pad(pattern, (length - 1, 0))
    width = 2 * length - 1
    columns = padded.as_strided((len(pattern), length, length), (length * width, width + 1, 1))
    return columns.sum(1).flip(-1)


MEASURE = """
import json
from pathlib import Path
import torch
torch.set_num_threads(1)
from kernels.attention_statistics import attention_statistics
from tests.benchmarks.bench_attention_statistics import materialised

def resident(line):  # in MB; VmRSS is what is held now, VmHWM the most since it was last forgotten
    return next(int(l.split()[1]) / 1024 for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(line))

q, k = torch.randn(2, {heads}, {length}, {width}, generator=torch.Generator().manual_seed(0))
attention_statistics(q[None, :1, :64], k[None, :1, :64])
materialised(q[:1, :128], k[:1, :128])
start = resident("VmRSS")
try:
    Path("/proc/self/clear_refs").write_text("5")
except OSError:
    start = resident("VmHWM")
result = {call}
print(json.dumps(resident("VmHWM") - start))
"""
OURS, PEER = "attention_statistics(q[None], k[None], map_size=64)", "materialised(q, k)"


def peak(call: str, length: int) -> float:
    """MB of resident memory that a call adds at its highest, in a fresh process."""
    code = MEASURE.format(call=call, length=length, heads=HEADS, width=WIDTH)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(json.loads(done.stdout.splitlines()[-1]))


def check(q: Tensor, k: Tensor) -> float:
    """Largest relative error of either side against float64; the peer's distances lose digits by design and are not counted."""
    wanted, theirs = materialised(q.double(), k.double()), materialised(q, k)
    found = attention_statistics(q[None], k[None], map_size=BINS)
    pairs = q.shape[1] - torch.arange(q.shape[1])
    worst = 0.0
    for name, value in wanted.items():
        ours = found.need("self_weight" if name == "self" else name)[0].double()
        if name == "previous":
            ours = ours[:, 1:]
        if name == "profile":
            ours = ours * pairs
        if name != "largest_at":
            worst = max(worst, float(((ours - value).abs() / value.abs().clamp(min=1)).max()))
            if not name.startswith("distance"):
                error = float(((theirs[name].double() - value).abs() / value.abs().clamp(min=1)).max())
                assert error < 1e-4, (name, error)
    if not worst < 1e-5:
        raise AssertionError(f"wrong result, not timed: error {worst:.1e} against float64")
    return worst


def measured(
    name: str, ours: Callable[[], object], peer: Callable[[], object], repeats: int, goal: float, note: str
) -> Row:
    mine, theirs = paired_medians(ours, peer, repeats)
    return Row(name, theirs / mine, goal, "time", f"{theirs:.2f} s and {mine:.2f} s{note}", at_least=True)


def run(tiny: bool = False) -> list[Row]:
    torch.set_num_threads(1)
    length, long = (256, 512) if tiny else (4096, 16384)
    q, k = torch.randn(2, HEADS, length, WIDTH, generator=torch.Generator().manual_seed(0))
    error = check(q[:2, : min(length, 1536)], k[:2, : min(length, 1536)])
    shape = f"H={HEADS} d={WIDTH}"
    with torch.no_grad():
        rows = [
            measured(
                f"materialised / strips, twelve statistics, {shape} T={length}",
                lambda: attention_statistics(q[None], k[None], map_size=BINS),
                lambda: materialised(q, k),
                1 if tiny else 3,
                10.0,
                f", error {error:.0e}",
            )
        ]
        core = lambda: F.scaled_dot_product_attention(q[None], k[None], k[None], is_causal=True)  # noqa: E731
        few = ["entropy", "largest", "first", "received"]
        mine, plain = paired_medians(
            lambda: attention_statistics(q[None], k[None], statistics=few), core, 1 if tiny else 5
        )
        rows.append(Row(f"four statistics / fused attention itself, {shape} T={length}", mine / plain, None))
        mine, plain = paired_medians(
            lambda: attention_statistics(q[None], k[None], map_size=BINS), core, 1 if tiny else 5
        )
        rows.append(Row(f"twelve statistics / fused attention itself, {shape} T={length}", mine / plain, None))
        decay = -torch.rand(1, HEADS, length) * 0.1
        mine, plain = paired_medians(
            lambda: gated_linear_statistics(q[None], k[None], log_decay=decay),
            lambda: attention_statistics(q[None], k[None], map_size=BINS),
            1 if tiny else 3,
        )
        rows.append(Row(f"gated linear / softmax, all statistics, {shape} T={length}", mine / plain, None))
    few_mb, many_mb = peak(OURS, length), peak(PEER, length)
    rows.append(
        Row(
            f"materialised / strips, peak memory, {shape} T={length}",
            many_mb / few_mb,
            80.0,
            "bytes",
            f"{many_mb:.0f} MB and {few_mb:.1f} MB",
            at_least=True,
        )
    )
    long_mb = peak(OURS, long)
    rows.append(
        Row(
            f"peak memory / 300 MB, {shape} T={long}", long_mb / 300, 1.0, "bytes", f"{long_mb:.0f} MB above the inputs"
        )
    )
    return rows
