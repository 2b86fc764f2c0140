"""Runs the Triton kernel of the diagonal scan in Triton's interpreter and prints its errors as JSON.

Started by the tests in a process of its own, because the interpreter is chosen once, when a kernel is defined:
TRITON_INTERPRET=1 python -m tests.kernels.interpret_diagonal_scan
"""

import itertools
import json
from typing import Any

import torch
from torch import Tensor

import kernels.diagonal_scan.scan as module
from kernels.diagonal_scan import diagonal_scan, triton
from tests.kernels.test_diagonal_scan import make_inputs, naive
from tests.kernels.triton_checks import counted

# The interpreter scans number by number, so most cases run with small chunks and tiles.
SMALL_CHUNK, SMALL_BLOCK = 8, 4
# One token, a ragged end, whole chunks; one channel, several channel axes, more channels than a tile holds.
SHAPES: tuple[tuple[int, tuple[int, ...]], ...] = ((1, (3,)), (21, (2, 3)), (16, ()))
WIDE = {torch.float32: torch.float64, torch.float16: torch.float64, torch.complex64: torch.complex128}


def worst(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Largest error of the states and of the final state over the largest expected number."""
    return {
        name: ((given.to(wanted.dtype) - wanted).abs().max() / wanted.abs().max()).item()
        for name, given, wanted in zip(("states", "final"), actual, expected, strict=True)
    }


def case(
    dtype: torch.dtype,
    pos: int,
    channels: tuple[int, ...],
    log: bool,
    reverse: bool,
    initial: bool,
    decay_shape: tuple[int, ...] | None = None,
) -> dict[str, float]:
    """The kernel on rounded inputs against the loop in double precision on the same rounded inputs."""
    wide = WIDE[dtype]
    log_decay, inputs, state = (x.to(dtype) for x in make_inputs(wide, channels, pos, decay_shape))
    state = state.to(torch.promote_types(dtype, torch.float32))
    state = state if initial else torch.zeros_like(state)
    decay = log_decay if log else log_decay.exp()
    actual = diagonal_scan(decay, inputs, state if initial else None, decay_is_log=log, reverse=reverse)
    assert actual[0].dtype == dtype and actual[1].dtype == state.dtype and actual[0].shape == inputs.shape
    factors = decay.to(wide).exp() if log else decay.to(wide)
    return worst(actual, naive(factors, inputs.to(wide), state.to(wide), reverse))


def cases() -> dict[str, Any]:
    calls = counted(triton)
    module.has_kernel = lambda device: True
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.complex64):
        found[f"{str(dtype)[6:]} whole tiles"] = case(dtype, 37, (33,), True, False, True)
    triton.CHUNK, triton.BLOCK = SMALL_CHUNK, SMALL_BLOCK
    for dtype, (pos, channels) in itertools.product(WIDE, SHAPES):
        for log, reverse, carried in ((True, False, True), (False, True, True), (True, True, False)):
            name = f"{str(dtype)[6:]} pos={pos} channels={channels} log={log} reverse={reverse} initial={carried}"
            found[name] = case(dtype, pos, channels, log, reverse, carried)
    for dtype, decay_shape in itertools.product(
        (torch.float32, torch.complex64), [(2, 3), (1, 1, 2, 3), (2, 9, 1, 1), (1, 9, 2, 1), (2, 1, 1, 3)]
    ):
        name = f"{str(dtype)[6:]} decay {decay_shape}"
        found[name] = case(dtype, 9, (2, 3), True, False, True, decay_shape)
    found["kernel in every case"] = len(calls) == len(found)

    log_decay, inputs, initial = (x.float() for x in make_inputs(torch.float64, (5,), 21))
    exact = [x.double() for x in (log_decay, inputs, initial)]
    first = diagonal_scan(log_decay, inputs, initial, decay_is_log=True)
    again = diagonal_scan(log_decay, inputs, initial, decay_is_log=True)
    found["same bits twice"] = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (log_decay, inputs)]
    found["float32 strided"] = worst(
        diagonal_scan(strided[0], strided[1], initial, decay_is_log=True), naive(exact[0].exp(), exact[1], exact[2])
    )
    narrow = inputs.to(torch.bfloat16)
    found["bfloat16 inputs, float32 decay"] = worst(
        diagonal_scan(log_decay, narrow, initial, decay_is_log=True), naive(exact[0].exp(), narrow.double(), exact[2])
    )
    found["complex64 decay, real inputs"] = worst(
        diagonal_scan(torch.complex(log_decay, inputs), inputs, decay_is_log=True),
        naive(torch.complex(exact[0], exact[1]).exp(), exact[1].to(torch.complex128), 0j * exact[2]),
    )
    marked = torch.complex(inputs, log_decay).conj()
    for name, view in (("conjugate", marked), ("negative", marked.imag)):
        kept = view.clone().resolve_conj().resolve_neg().to(torch.complex128 if view.is_complex() else torch.float64)
        found[f"float32 {name} view"] = worst(
            diagonal_scan(log_decay, view, decay_is_log=True),
            naive(exact[0].exp().to(kept.dtype), kept, torch.zeros_like(kept[:, 0])),
        )

    # Growth, and factors of zero, which forget all that was before.
    factors = 1.4 * log_decay.exp()
    factors[:, 6:20:5] = 0.0
    found["float32 growth and zeros"] = worst(
        diagonal_scan(factors, inputs, initial), naive(factors.double(), exact[1], exact[2])
    )

    # Padding: a token that neither decays nor writes hands the state on, so a padded run is the run of the other tokens.
    for name, padded in (("left", slice(0, 10)), ("right", slice(12, 21))):
        log_padded, inputs_padded = log_decay.clone(), inputs.clone()
        log_padded[:, padded], inputs_padded[:, padded] = 0.0, 0.0
        kept = torch.ones(21, dtype=torch.bool)
        kept[padded] = False
        actual = diagonal_scan(log_padded, inputs_padded, initial, decay_is_log=True)
        found[f"float32 padded {name}"] = worst(
            (actual[0][:, kept], actual[1]), naive(exact[0][:, kept].exp(), exact[1][:, kept], exact[2])
        )

    # The torch form wherever the kernel cannot run.
    before = len(calls)
    leaf = inputs.clone().requires_grad_()
    diagonal_scan(log_decay, leaf, initial)[0].sum().backward()
    diagonal_scan(log_decay, inputs, initial, mode="blocked")
    diagonal_scan(log_decay, inputs, initial, mode="recurrent")
    diagonal_scan(log_decay, inputs, initial, stops=[3], on_state=lambda t, state: None)
    diagonal_scan(*exact)
    torch.func.vmap(lambda x: diagonal_scan(log_decay, x)[0])(inputs.unsqueeze(0))
    torch.func.jvp(lambda x: diagonal_scan(log_decay, x)[0], (inputs,), (inputs,))
    found["torch form where the kernel cannot"] = len(calls) == before and leaf.grad is not None
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(cases()))
