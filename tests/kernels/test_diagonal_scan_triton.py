"""The Triton kernel of the diagonal scan: numbers in the interpreter, machine code for two GPUs, numbers on a GPU.

A CPU can check the first two; the third runs where there is a CUDA device and says so where there is none.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.diagonal_scan import diagonal_scan
from tests.kernels.test_diagonal_scan import make_inputs, naive
from tests.kernels.triton_checks import (
    POINTERS,
    assert_not_loaded,
    assert_rounded_only,
    compiled,
    interpreted_cases,
    triton_version,
)

triton = pytest.importorskip("triton", reason="Triton has no build for this system")


def test_triton_is_not_loaded_before_a_gpu_needs_it() -> None:
    assert_not_loaded("kernels.diagonal_scan", "from kernels.diagonal_scan import diagonal_scan as f; f(x, x)")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """Every case of `interpret_diagonal_scan`, run in one process of its own."""
    return interpreted_cases("tests.kernels.interpret_diagonal_scan")


def test_the_interpreted_kernel_is_the_loop(interpreted: dict[str, Any]) -> None:
    """Final state to float32 rounding always; states too, or to one rounding to the 16-bit type that they are stored in."""
    assert_rounded_only(interpreted, 2 + 3 * 3 * 3 + 2 * 5 + 8, stored="states")


@pytest.mark.parametrize("claim", ["kernel in every case", "same bits twice", "torch form where the kernel cannot"])
def test_the_interpreted_kernel_keeps_its_promises(interpreted: dict[str, Any], claim: str) -> None:
    assert interpreted[claim] is True


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "log", "reverse", "block"),
    [
        (torch.float32, True, False, 32),
        (torch.bfloat16, True, True, 32),
        (torch.float16, False, False, 1),
        (torch.complex64, True, False, 32),
        (torch.complex64, False, True, 32),
    ],
)
def test_the_kernel_compiles_and_stays_in_registers(
    capability: int,
    dtype: torch.dtype,
    log: bool,
    reverse: bool,
    block: int,
    tmp_path: Path,
) -> None:
    from kernels.diagonal_scan.triton import CHUNK, scan_walk

    constants = {"LOG": log, "COMPLEX": dtype.is_complex, "REVERSE": reverse, "CHUNK": CHUNK, "BLOCK": block}
    # Neighbouring channels lie side by side; of complex ones, two numbers apart.
    constants |= {} if dtype.is_complex else {"decay_channel": 1, "inputs_channel": 1}
    types = dict.fromkeys(("decay_pointer", "inputs_pointer", "states_pointer"), POINTERS[dtype])
    unaligned = ("decay_channel", "inputs_channel", "pos", "channel")
    usage = compiled(scan_walk, capability, constants, types, unaligned, {"num_warps": 4}, tmp_path)
    # Sine and cosine reduce large angles through 8 bytes of stack, also where most registers are free.
    # The compiler of Triton 3.6 keeps a few numbers more there (8 to 32 bytes, in some of these cases).
    spilled = 0 if triton_version() >= (3, 7) else 32
    assert usage["stack"] <= (8 if log and dtype.is_complex else 0) + spilled, usage
    assert usage["shared"] <= 48 << 10, usage


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", list(POINTERS))
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("log", [False, True])
def test_on_a_gpu_the_kernel_is_the_loop(dtype: torch.dtype, reverse: bool, log: bool) -> None:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    log_decay, inputs, state = (x.to(dtype) for x in make_inputs(wide, (3, 50), 301))
    state = state.to(torch.promote_types(dtype, torch.float32))
    decay = log_decay if log else log_decay.exp()
    factors = decay.to(wide).exp() if log else decay.to(wide)
    expected = naive(factors, inputs.to(wide), state.to(wide), reverse)
    actual = diagonal_scan(*(x.cuda() for x in (decay, inputs, state)), decay_is_log=log, reverse=reverse)
    stored = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    for given, wanted, tolerance in zip(actual, expected, (1e-5 + stored, 1e-5), strict=True):
        assert (given.cpu().to(wide) - wanted).abs().max() <= tolerance * wanted.abs().max()
