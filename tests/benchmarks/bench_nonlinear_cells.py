"""Ratios of the nonlinear cells: Newton's method against the step loop at T = 1024, the loop against torch's, and the Jacobian map.

    python -m tests.benchmarks --only nonlinear_cells

Every ratio comes from one process on one thread: both sides run in turn (A, B, A, B, …), each run is measured in CPU
seconds, and the ratio is that of the medians. Before anything is timed the outputs are compared with float64.
"""

import statistics
import time

import torch
from torch import Tensor, nn

from kernels.nonlinear_cells import (
    GRU,
    LSTM,
    Cell,
    ParaGRU,
    ParaLSTM,
    jacobian_pattern,
    local_derivatives,
    run_cell,
)
from tests.benchmarks import Row
from tests.benchmarks.bench_gated_linear_attention import make_row, paired_medians, relative_error

CHUNK = 256  # smaller pieces than a run, to see what they cost


def newton_against_loop(pos: int, units: tuple[int, ...], repeats: int) -> list[Row]:
    """Step loop / Newton's method, forward and with gradients; three iterations as in the paper, and until nothing is left."""
    rows = []
    for unit in units:
        for cell_type in (ParaGRU, ParaLSTM):
            cell: Cell = cell_type() if cell_type is ParaGRU else ParaLSTM(0.1 * torch.randn(2, 1, unit))
            inputs = torch.randn(1, 1, pos, len(cell.drives), unit)
            weights = (torch.rand(1, len(cell.drives), unit) - 0.5) * 2 * unit**-0.5
            wide: Cell = ParaLSTM(cell.peephole.double()) if isinstance(cell, ParaLSTM) else cell
            expected = run_cell(wide, inputs.double(), weights.double()).output

            def forward(
                mode: str,
                iterations: int | None = None,
                chunk_size: int | None = None,
                cell: Cell = cell,
                inputs: Tensor = inputs,
                weights: Tensor = weights,
            ) -> Tensor:
                with torch.no_grad():
                    return run_cell(
                        cell, inputs, weights, mode=mode, iterations=iterations, chunk_size=chunk_size
                    ).output

            def training(mode: str, cell: Cell = cell, inputs: Tensor = inputs, weights: Tensor = weights) -> None:
                leaves = [x.detach().requires_grad_() for x in (inputs, weights)]
                run_cell(cell, leaves[0], leaves[1], mode=mode).output.sum().backward()

            shape = f"{cell_type.__name__}, T={pos} units={unit}"
            for label, iterations, chunk_size in (
                ("3 iterations", 3, None),
                ("until rounding", None, None),
                (f"until rounding, {CHUNK} tokens at once", None, CHUNK),
            ):
                error = relative_error(forward("newton", iterations, chunk_size), expected)
                times = paired_medians(
                    lambda n=iterations, c=chunk_size, run=forward: run("newton", n, c),
                    lambda run=forward: run("recurrent"),
                    repeats,
                )
                rows.append(make_row(f"step loop / Newton, {label}, {shape}", times, True, None, error))
            times = paired_medians(
                lambda run=training: run("newton"), lambda run=training: run("recurrent"), min(3, repeats)
            )
            rows.append(make_row(f"step loop / Newton, with gradients, {shape}", times, True, None, error))
    return rows


def loop_against_torch(pos: int, unit: int, repeats: int) -> list[Row]:
    """Our watched-at-every-step loop / torch's fused module, one head."""
    rows = []
    x = torch.randn(1, pos, unit)
    for cell, module in (
        (LSTM(), nn.LSTM(unit, unit, batch_first=True)),
        (GRU(), nn.GRU(unit, unit, batch_first=True)),
    ):
        drives = len(cell.drives)
        project = nn.Linear(unit, drives * unit)
        weights = (torch.rand(1, drives, unit, unit) - 0.5) * 2 * unit**-0.5

        def ours(cell: Cell = cell, project: nn.Linear = project, weights: Tensor = weights) -> Tensor:
            with torch.no_grad():
                drives = project(x).unflatten(-1, (len(cell.drives), unit))[:, None]
                return run_cell(cell, drives, weights).output

        def torchs(module: nn.Module = module) -> None:
            with torch.no_grad():
                module(x)

        with torch.no_grad():
            wide = project(x).double().unflatten(-1, (drives, unit))[:, None]
        error = relative_error(ours(), run_cell(cell, wide, weights.double()).output)
        times = paired_medians(ours, torchs, repeats)
        rows.append(
            make_row(f"step loop / torch.nn, {type(cell).__name__}, T={pos} units={unit}", times, False, None, error)
        )
    return rows


def jacobian_seconds(pos: int, head: int, unit: int) -> Row:
    """CPU seconds of the whole Jacobian map of an LSTM."""
    cell = LSTM()
    inputs, weights = torch.randn(1, head, pos, 4, unit), torch.randn(1 * head, 4, unit, unit) * unit**-0.5
    before = run_cell(cell, inputs, weights, keep_before=True).before
    assert before is not None
    seconds = []
    for _ in range(3):
        start = time.process_time()
        jacobian_pattern(local_derivatives(cell, inputs, weights, before))
        seconds.append(time.process_time() - start)
    shape = f"LSTM, H={head} T={pos} units={unit}"
    return Row(f"Jacobian map, {shape}", statistics.median(seconds), unit="CPU seconds", note="median of 3")


def run(tiny: bool = False) -> list[Row]:
    """All rows; tiny: on small inputs, to check the benchmark itself."""
    torch.manual_seed(0)
    if tiny:
        return [*newton_against_loop(16, (4,), 1), *loop_against_torch(16, 4, 1), jacobian_seconds(8, 2, 3)]
    return [
        *newton_against_loop(1024, (32, 128, 512), 5),
        *loop_against_torch(1024, 64, 5),
        jacobian_seconds(256, 4, 32),
    ]
