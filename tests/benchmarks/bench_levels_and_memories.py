"""Ratios of log-linear attention and of the fast-weight memories: blocks against the token-by-token loop, and the price of levels.

    python -m tests.benchmarks --only levels_and_memories

Every ratio comes from one process on one thread: both sides run in turn (A, B, A, B, …), each run is measured in CPU
seconds, and the ratio is that of the medians. Before anything is timed the outputs are compared with float64.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.delta_rule import delta_rule
from kernels.fast_weight_memory import Memory, fast_weight_memory
from kernels.fenwick import log_linear_attention, n_levels_for
from kernels.gated_linear_attention import gated_linear_attention
from tests.benchmarks import Row
from tests.benchmarks.bench_gated_linear_attention import make_row, paired_medians, relative_error


def tokens(pos: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k [1, 4, pos, width] of length 1, v, log decays and strengths."""
    q, k = (F.normalize(torch.randn(1, 4, pos, width), dim=-1) for _ in range(2))
    return q, k, torch.randn(1, 4, pos, width), -0.1 * torch.rand(1, 4, pos), torch.rand(1, 4, pos)


def wide(value: Any) -> Any:
    """Tensors in float64."""
    return value.double() if isinstance(value, Tensor) else value


def levels(pos: int, width: int, repeats: int) -> list[Row]:
    """Step loop / blocks, and blocks / the same rule without levels."""
    rows = []
    q, k, v, decay, strength = tokens(pos, width)
    weights = torch.rand(1, 4, pos, n_levels_for(pos))
    for name, extra in (("linear", {}), ("delta", {"beta": strength})):
        options = {"log_decay": decay, **extra}
        slow = {key: wide(value) for key, value in options.items()}
        expected, _ = log_linear_attention(*map(wide, (q, k, v, weights)), **slow, mode="recurrent")

        def run(mode: str = "chunked", options: dict[str, Any] = options) -> Tensor:
            with torch.no_grad():
                return log_linear_attention(q, k, v, weights, **options, mode=mode, need_state=False)[0]

        def plain(extra: dict[str, Any] = extra) -> None:
            with torch.no_grad():
                if extra:
                    delta_rule(q, k, v, strength, log_decay=decay)
                else:
                    gated_linear_attention(q, k, v, log_decay=decay)

        error, label = relative_error(run(), expected), f"{name}, T={pos} K=V={width} H=4"
        times = paired_medians(run, lambda run=run: run("recurrent"), repeats)  # type: ignore[misc]
        rows.append(make_row(f"step loop / log-linear {label}", times, True, 1.0, error))
        times = paired_medians(run, plain, repeats)
        rows.append(make_row(f"log-linear / without levels, {label}", times, False, float(n_levels_for(pos)), error))
    return rows


def memories(pos: int, width: int, repeats: int) -> list[Row]:
    """Step loop / blocks of 16, for a matrix and an MLP.

    An MLP behind a norm amplifies rounding from step to step, so float32 is compared with float64 on the first 128 tokens.
    """
    rows = []
    q, k, v, decay, strength = tokens(pos, width)
    for memory in (Memory(width, width), Memory(width, width, 2, 2 * width, output="norm_residual")):
        first = torch.randn(1, 4, *memory.shape) / memory.shape[0] ** 0.5
        options = {"log_decay": decay, "log_momentum": -torch.rand(1, 4, pos)}
        slow = {key: wide(value) for key, value in options.items()}
        given = (q, k, v, strength / 16)
        expected, _, _ = fast_weight_memory(*map(wide, given), memory, first.double(), **slow, mode="recurrent")

        def run(mode: str = "chunked", given: Any = given, memory: Memory = memory, first: Tensor = first,
                options: Any = options) -> Tensor:  # fmt: skip
            with torch.no_grad():
                return fast_weight_memory(*given, memory, first, **options, mode=mode)[0]

        error = relative_error(run()[:, :, :128], expected[:, :, :128])
        times = paired_medians(run, lambda run=run: run("recurrent"), repeats)  # type: ignore[misc]
        rows.append(
            make_row(f"step loop / memory of depth {memory.depth}, T={pos} width={width}", times, True, 1.0, error)
        )
    return rows


def run(tiny: bool = False) -> list[Row]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if tiny:
        return levels(40, 4, 1) + memories(40, 4, 1)
    return levels(1024, 32, 5) + levels(4096, 32, 3) + memories(1024, 32, 5)
