"""What the tests of every Triton kernel share: running cases in the interpreter, and compiling for a GPU that is not there."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

# Triton's names of the pointers to tensors; of a complex number both parts are float32.
POINTERS = {torch.float32: "*fp32", torch.complex64: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def assert_not_loaded(package: str, call: str) -> None:
    """`call` (Python that uses x, a small CPU tensor) runs without importing `package`.triton."""
    code = f"import sys, torch; x = torch.ones(1, 1, 3, 2); {call}; assert '{package}.triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def interpreted_cases(module: str) -> dict[str, Any]:
    """What `python -m module` prints as JSON, with Triton's interpreter switched on (for a whole process, hence one of its own)."""
    if triton_version() < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("Triton 3.6's interpreter takes arrays of one number for numbers, which numpy 2.4 refuses")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", module]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def triton_version() -> tuple[int, ...]:
    """(3, 6) for 3.6.0."""
    return tuple(map(int, version("triton").split(".")[:2]))


def counted(module: Any) -> list[int]:
    """From now on a list that grows by one entry with every call of `module.forward`."""
    calls: list[int] = []
    forward = module.forward

    def counting(*arguments: Any) -> Any:
        calls.append(1)
        return forward(*arguments)

    module.forward = counting
    return calls


def assert_rounded_only(interpreted: dict[str, Any], count: int, stored: str) -> None:
    """So many cases, each {what: error}, err by float32 rounding; what is `stored` in the 16-bit type that a case's name begins
    with, by one rounding to it.
    """
    numbers = {name: errors for name, errors in interpreted.items() if isinstance(errors, dict)}
    assert len(numbers) == count
    for name, errors in numbers.items():
        dtype = getattr(torch, name.split()[0])
        for what, error in errors.items():
            assert error <= (torch.finfo(dtype).eps if what == stored and dtype.itemsize == 2 else 1e-6), (name, what)


def compiled(
    kernel: Any,
    capability: int,
    constants: Mapping[str, Any],
    types: Mapping[str, str],
    unaligned: Collection[str],
    launch: dict[str, int],
    folder: Path,
) -> dict[str, int]:
    """Compiles a kernel to a cubin, without a GPU; registers, bytes of stack (spills) and bytes of shared memory.

    types : of the arguments that are neither constants, float32 pointers (names that end so) nor int32
    unaligned : arguments that need not be divisible by 16, beside constants and numbers that are no integers
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {}
    for name in kernel.arg_names:
        usual = "*fp32" if name.endswith("_pointer") else "i32"
        signature[name] = "constexpr" if name in constants else types.get(name, usual)
    aligned = [n for n, (name, kind) in enumerate(signature.items()) if kind[0] in "*i" and name not in unaligned]
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
    )
    # A cache of its own, so that what is measured was compiled now; products and sums fused as at every launch.
    settings = {"TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_DEFAULT_FP_FUSION": "1"}
    with mock.patch.dict(os.environ, settings):
        binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True, timeout=60).stdout
    found = re.search(rf"Function {kernel.__name__}:\s+REG:(\d+) STACK:(\d+)", report)
    assert found, report
    return {"registers": int(found[1]), "stack": int(found[2]), "shared": binary.metadata.shared}
