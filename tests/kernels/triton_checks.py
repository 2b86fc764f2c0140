"""What the tests of every Triton kernel share: running cases in the interpreter, and compiling for a GPU that is not there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def assert_not_loaded(package: str, call: str) -> None:
    """`call` (Python that uses x, a small CPU tensor) runs without importing `package`.triton."""
    code = f"import sys, torch; x = torch.ones(1, 1, 3, 2); {call}; assert '{package}.triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def interpreted_cases(module: str) -> dict[str, Any]:
    """What `python -m module` prints as JSON, with Triton's interpreter switched on (for a whole process, hence one of its own)."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", module]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def compiled(
    kernel: Any,
    capability: int,
    signature: dict[str, str],
    constants: dict[str, Any],
    divisible: list[int],
    launch: dict[str, int],
    folder: Path,
) -> dict[str, int]:
    """Compiles a kernel to a cubin, without a GPU; registers, bytes of stack (spills) and bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constants.items()},
        attrs={(index,): [["tt.divisibility", 16]] for index in divisible},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    report = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True, timeout=60).stdout
    found = re.search(rf"Function {kernel.__name__}:\s+REG:(\d+) STACK:(\d+)", report)
    assert found, report
    return {"registers": int(found[1]), "stack": int(found[2]), "shared": binary.metadata.shared}
