"""The Triton kernels of attention statistics: numbers in the interpreter, machine code for two GPUs, numbers on a GPU.

A CPU can check the first two; the third runs where there is a CUDA device and says so where there is none.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.attention_statistics import attention_statistics
from tests.kernels.interpret_attention_statistics import CASES
from tests.kernels.triton_checks import POINTERS, assert_not_loaded, compiled, interpreted_cases

triton = pytest.importorskip("triton", reason="Triton has no build for this system")


def test_triton_is_not_loaded_before_a_gpu_needs_it() -> None:
    assert_not_loaded(
        "kernels.attention_statistics", "from kernels.attention_statistics import attention_statistics as f; f(x, x)"
    )


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """Every case of `interpret_attention_statistics`, run in one process of its own."""
    return interpreted_cases("tests.kernels.interpret_attention_statistics")


def test_the_interpreted_kernels_give_the_statistics_of_float64(interpreted: dict[str, Any]) -> None:
    numbers = {name: value for name, value in interpreted.items() if not isinstance(value, bool)}
    assert len(numbers) == 2 * len(CASES)
    assert max(numbers.values()) <= 1e-6, numbers


def test_the_interpreted_kernels_keep_their_promises(interpreted: dict[str, Any]) -> None:
    promises = {name: value for name, value in interpreted.items() if isinstance(value, bool)}
    assert len(promises) == 2 * len(CASES) + 4
    assert all(promises.values()), promises


def resources(
    name: str, capability: int, dtype: torch.dtype, width: int, folder: Path, **flags: bool
) -> dict[str, int]:
    """Compiles a kernel to a cubin, without a GPU; registers, bytes of stack (spills) and bytes of shared memory."""
    from kernels.attention_statistics import triton as kernels

    kernel = getattr(kernels, name)
    options = kernels.launch_options(dtype, width)
    launch = {key: options.pop(key) for key in ("num_warps", "num_stages")}
    names = ("SOFTCAP", "BIAS", "REAL", "SEGMENTS", "CAUSAL", "STRICT", "WINDOW")
    constants = {**options, **{flag: flags.get(flag.lower(), False) for flag in names}}
    types = {"q_pointer": POINTERS[dtype], "k_pointer": POINTERS[dtype], "factor": "fp32", "softcap": "fp32"}
    types |= dict.fromkeys(("real_pointer", "segment_pointer", "first_key_pointer", "at_pointer"), "*i32")
    counts = ("heads", "group_size", "queries", "keys", "width", "window", "lowest_distance", "n_distances")
    return compiled(kernel, capability, constants, types, counts, launch, folder)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["read_rows", "read_columns"])
@pytest.mark.parametrize(
    ("dtype", "width", "flags"),
    [
        (torch.bfloat16, 128, {"causal": True}),
        (torch.float16, 64, {"causal": True, "window": True, "bias": True, "softcap": True}),
        (torch.float32, 64, {"causal": True, "strict": True, "real": True, "segments": True}),
        (torch.float32, 128, {}),
    ],
)
def test_the_kernels_compile_and_stay_in_registers(
    name: str,
    capability: int,
    dtype: torch.dtype,
    width: int,
    flags: dict[str, bool],
    tmp_path: Path,
) -> None:
    usage = resources(name, capability, dtype, width, tmp_path, **flags)
    assert usage["stack"] == 0, usage
    assert usage["shared"] <= 160 << 10, usage  # sm_80 has 163 KB


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu_the_kernels_give_the_statistics_of_float64(case: str, dtype: torch.dtype) -> None:
    from tests.kernels.interpret_attention_statistics import BATCH, HEADS, LENGTH, error

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(BATCH, HEADS, LENGTH, 72, generator=generator).to(dtype)
    k = torch.randn(BATCH, 1, LENGTH, 72, generator=generator).to(dtype)
    options = CASES[case]
    there = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    found = attention_statistics(q.cuda(), k.cuda(), **there)
    on_cpu = {
        name: x.cpu() if isinstance(x := getattr(found, name), torch.Tensor) else x
        for name in type(found).__dataclass_fields__
    }
    wanted = attention_statistics(q.double(), k.double(), **options)
    assert error(type(found)(**on_cpu), wanted) < 1e-5
