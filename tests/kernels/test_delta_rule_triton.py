"""The Triton kernels of the delta rule: numbers in the interpreter, machine code for two GPUs, numbers on a GPU.

A CPU can check the first two; the third runs where there is a CUDA device and says so where there is none.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.delta_rule import delta_rule_and_pseudo_values
from tests.kernels.delta_rule_inputs import make_inputs, naive
from tests.kernels.triton_checks import (
    POINTERS,
    assert_not_loaded,
    assert_rounded_only,
    compiled,
    interpreted_cases,
)

triton = pytest.importorskip("triton", reason="Triton has no build for this system")


def test_triton_is_not_loaded_before_a_gpu_needs_it() -> None:
    assert_not_loaded("kernels.delta_rule", "from kernels.delta_rule import delta_rule as f; f(x, x, x, x[..., 0])")


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """Every case of `interpret_delta_rule`, run in one process of its own."""
    return interpreted_cases("tests.kernels.interpret_delta_rule")


def test_the_interpreted_kernels_are_the_recurrence(interpreted: dict[str, Any]) -> None:
    """State and pseudo-values to float32 rounding always; output too, or to one rounding to the 16-bit type it is stored in."""
    assert_rounded_only(interpreted, 2 * 3 * 3 + 2 * 2 + 6, stored="output")


@pytest.mark.parametrize("claim", ["same bits twice", "dispatched once", "torch form where the kernel cannot"])
def test_the_interpreted_kernels_keep_their_promises(interpreted: dict[str, Any], claim: str) -> None:
    assert interpreted[claim] is True


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "decay", "width"),
    [
        (torch.float32, True, 256),
        (torch.float32, False, 16),
        (torch.bfloat16, True, 256),
        (torch.float16, True, 32),
    ],
)
def test_the_kernels_compile_and_stay_in_registers(
    capability: int, dtype: torch.dtype, decay: bool, width: int, tmp_path: Path
) -> None:
    from kernels.delta_rule.triton import SOLVE_WARPS, launch_options, solve_chunks, walk_chunks

    options = {**launch_options(dtype, width, width), "DECAY": decay}
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    inputs = ("q_pointer", "k_pointer", "v_pointer", "output_pointer")
    types = {**dict.fromkeys(inputs, POINTERS[dtype]), "scale": "fp32"}
    for kernel, warps in ((solve_chunks, SOLVE_WARPS), (walk_chunks, launch["num_warps"])):
        constants = {name: value for name, value in options.items() if name in kernel.arg_names}
        usage = compiled(kernel, capability, constants, types, ("head", "pos"), launch | {"num_warps": warps}, tmp_path)
        assert usage["stack"] == 0, usage
        assert usage["shared"] <= 48 << 10, usage


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("decay", ["none", "constant", "scalar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_the_kernels_are_the_recurrence(decay: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(decay, initial=True, shared=True, pos=301, state_k=200, state_v=72).to(dtype)
    output, _, written, state = naive(inputs.to(torch.float64))
    on_gpu = [x.cuda() for x in (inputs.q, inputs.k, inputs.v, inputs.beta)]
    options: dict[str, Any] = {name: None if x is None else x.cuda() for name, x in inputs.options.items()}
    found = delta_rule_and_pseudo_values(*on_gpu, **options)
    # tf32 keeps 11 bits of the state and of what is written; three passes of it keep float32's accuracy.
    product = 2e-6 if dtype == torch.float32 else 2.0**-10
    stored = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    wanted = (output, written, state)
    for actual, expected, tolerance in zip(found, wanted, (product + stored, product, product), strict=True):
        assert (actual.cpu().double() - expected).abs().max() <= tolerance * expected.abs().max()
