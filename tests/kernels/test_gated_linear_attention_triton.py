"""The Triton kernel of gated linear attention: numbers in the interpreter, machine code for two GPUs, numbers on a GPU.

A CPU can check the first two; the third runs where there is a CUDA device and says so where there is none.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.gated_linear_attention import gated_linear_attention
from tests.kernels.gla_inputs import make_inputs
from tests.kernels.triton_checks import POINTERS, assert_not_loaded, assert_rounded_only, compiled, interpreted_cases

triton = pytest.importorskip("triton", reason="Triton has no build for this system")


def test_triton_is_not_loaded_before_a_gpu_needs_it() -> None:
    assert_not_loaded(
        "kernels.gated_linear_attention",
        "from kernels.gated_linear_attention import gated_linear_attention as f; f(x, x, x)",
    )


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """Every case of `interpret_gated_linear_attention`, run in one process of its own."""
    return interpreted_cases("tests.kernels.interpret_gated_linear_attention")


def test_the_interpreted_kernel_is_the_recurrence(interpreted: dict[str, Any]) -> None:
    """State to float32 rounding always; output too, or to one rounding to the 16-bit type that it is stored in."""
    assert_rounded_only(interpreted, 2 * 3 * 2 * 3 + 2 + 7, stored="output")


@pytest.mark.parametrize("claim", ["same bits twice", "dispatched once", "torch form where the kernel cannot"])
def test_the_interpreted_kernel_keeps_its_promises(interpreted: dict[str, Any], claim: str) -> None:
    assert interpreted[claim] is True


def resources(
    capability: int, dtype: torch.dtype, decay: bool, strict: bool, width: int, folder: Path
) -> dict[str, int]:
    """Compiles the kernel to a cubin, without a GPU; registers, bytes of stack (spills) and bytes of shared memory."""
    from kernels.gated_linear_attention.triton import chunk_walk, launch_options

    options = launch_options(dtype, width, width)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages")}
    row_tiles = -(-width // options["BLOCK_K"])
    constants = {**options, "DECAY": decay, "WRITE": True, "STRICT": strict}
    inputs = ["q_pointer", "k_pointer", "v_pointer"] + ["output_pointer"] * (row_tiles == 1)
    types = {**dict.fromkeys(inputs, POINTERS[dtype]), "scale": "fp32"}
    return compiled(chunk_walk, capability, constants, types, ("head", "pos"), launch, folder)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "decay", "strict", "width"),
    [
        (torch.bfloat16, True, False, 64),
        (torch.float16, False, True, 256),
        (torch.float32, True, False, 128),
        (torch.float32, False, True, 16),
    ],
)
def test_the_kernel_compiles_and_stays_in_registers(
    capability: int,
    dtype: torch.dtype,
    decay: bool,
    strict: bool,
    width: int,
    tmp_path: Path,
) -> None:
    usage = resources(capability, dtype, decay, strict, width, tmp_path)
    assert usage["stack"] == 0, usage
    assert usage["shared"] <= 48 << 10, usage


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("decay", ["none", "constant", "scalar"])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_on_a_gpu_the_kernel_is_the_recurrence(decay: str, strict: bool, dtype: torch.dtype) -> None:
    wide = make_inputs(decay, write=True, initial=True, shared=True, pos=301, state_k=200, state_v=72)
    inputs = wide.to(dtype)
    exact = inputs.to(torch.float64)
    expected = gated_linear_attention(exact.q, exact.k, exact.v, **exact.options, strict=strict, mode="recurrent")
    on_gpu = [x.cuda() for x in (inputs.q, inputs.k, inputs.v)]
    options: dict[str, Any] = {name: None if x is None else x.cuda() for name, x in inputs.options.items()}
    output, state = gated_linear_attention(*on_gpu, **options, strict=strict)
    # tf32 keeps 11 bits of the state and of the decayed values; three passes of it keep float32's accuracy.
    product = 2e-6 if dtype == torch.float32 else 2.0**-11
    stored = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    for actual, wanted, tolerance in ((output, expected[0], product + stored), (state, expected[1], product)):
        assert (actual.cpu().double() - wanted).abs().max() <= tolerance * wanted.abs().max()
