"""Runs the Triton kernels of attention statistics in Triton's interpreter and prints their errors as JSON.

Started by the tests in a process of its own, because the interpreter is chosen once, when a kernel is defined:
TRITON_INTERPRET=1 python -m tests.kernels.interpret_attention_statistics
"""

import json
from typing import Any

import torch
from torch import Tensor

import kernels.attention_statistics as package
from kernels.attention_statistics import STATISTICS, AttentionStatistics, attention_statistics, triton

LENGTH, BATCH, HEADS = 130, 2, 2
REAL = torch.ones(BATCH, LENGTH, dtype=torch.bool)
REAL[1, :21] = False
SEGMENTS = (torch.arange(LENGTH) >= 70).long().expand(BATCH, -1)
CASES: dict[str, dict[str, Any]] = {
    "causal": {},
    "strict, ALiBi": {"causal": "strict", "alibi_slopes": torch.tensor([0.3, 0.05])},
    "both ways, padded": {"causal": "none", "mask": REAL},
    "window, softcap": {"window": 40, "softcap": 3.0},
    "window both ways": {"window": 30, "causal": "none"},
    "padded, segments": {"mask": REAL, "segments": SEGMENTS},
}


def error(found: AttentionStatistics, wanted: AttentionStatistics) -> float:
    """Largest error of any statistic, over the number where that is above 1; 1 where a nan is out of place."""
    worst = 0.0
    for name in ("received", "received_largest", "profile", *AttentionStatistics.__dataclass_fields__):
        a, b = getattr(found, name), getattr(wanted, name)
        if not isinstance(a, Tensor) or name == "largest_at":
            continue
        a, b = a.double(), b.double()
        if not torch.equal(a.isnan(), b.isnan()):
            return 1.0
        worst = max(worst, float(((a - b).nan_to_num() / b.nan_to_num().abs().clamp(min=1)).abs().max()))
    return worst


def cases() -> dict[str, Any]:
    found: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(0)
    forward, calls = triton.forward, []

    def counted(source: Any, see: Any, statistics: set[str]) -> dict[str, Tensor]:
        calls.append(statistics)
        return forward(source, see, statistics)

    triton.forward = counted  # type: ignore[assignment]
    slow = package.has_kernel
    for name, options in CASES.items():
        for dtype, queries, width in ((torch.float32, LENGTH, 20), (torch.float16, 50, 16)):
            q = torch.randn(BATCH, HEADS, queries, width, generator=generator).to(dtype)
            k = torch.randn(BATCH, 1, LENGTH, width, generator=generator).to(dtype)
            package.has_kernel = slow
            wanted = attention_statistics(q.double(), k.double(), **options)
            package.has_kernel = lambda device: True
            result = attention_statistics(q, k, **options)
            found[f"{str(dtype)[6:]} {name}"] = error(result, wanted)
            assert wanted.largest_at is not None and result.largest_at is not None
            found[f"{str(dtype)[6:]} {name}, positions"] = bool(
                ((result.largest_at != wanted.largest_at).float().mean() < 0.02).item()
            )
    found["kernels were used"] = len(calls) == 2 * len(CASES) and all(call == triton.SUPPORTED for call in calls)
    q, k = torch.randn(2, 1, 2, 40, 16, generator=generator)
    package.has_kernel = lambda device: True
    before = len(calls)
    some = attention_statistics(q, k, statistics=["entropy"])
    found["only what is asked"] = some.received is None and some.profile is None and some.entropy is not None
    package.has_kernel = lambda device: True
    attention_statistics(q.double(), k.double())
    attention_statistics(q, k, bias=lambda item, head, rows, keys: torch.zeros(()))
    attention_statistics(q, k, statistics=["profile"])
    found["strips where the kernels cannot"] = len(calls) == before + 1
    twice = [attention_statistics(q, k, statistics=list(STATISTICS)) for _ in range(2)]
    found["same bits twice"] = all(
        torch.equal(twice[0].need(name), twice[1].need(name)) for name in ("entropy", "received", "received_largest")
    )
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(cases()))
