"""Runs the Triton kernels of the delta rule in Triton's interpreter and prints their errors as JSON.

Started by the tests in a process of its own, because the interpreter is chosen once, when a kernel is defined:
TRITON_INTERPRET=1 python -m tests.kernels.interpret_delta_rule
"""

import itertools
import json
from typing import Any

import torch
from torch import Tensor

import kernels.delta_rule as package
from kernels.delta_rule import delta_rule, delta_rule_and_pseudo_values, triton
from tests.kernels.delta_rule_inputs import Inputs, make_inputs, naive
from tests.kernels.triton_checks import counted

# Ragged ends; rows in one tile and in eight, the last ones empty; columns in one tile and in two.
SHAPES = (
    {"pos": 37, "state_k": 5, "state_v": 4, "batch": 2, "head": 2},
    {"pos": 45, "state_k": 130, "state_v": 20, "batch": 1, "head": 2},
)


def kernel(inputs: Inputs, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    batch, head, _, state_k = inputs.k.shape
    state = torch.zeros(batch, head, state_k, inputs.v.shape[3]) if inputs.initial is None else inputs.initial
    return triton.forward(inputs.q, inputs.k, inputs.v, inputs.beta, inputs.log_decay, scale, state)


def errors(inputs: Inputs, found: tuple[Tensor, Tensor, Tensor], scale: float = 1.0) -> dict[str, float]:
    """Largest error of output, pseudo-values and state over the largest expected number, against the loop in float64."""
    output, _, written, state = naive(inputs.to(torch.float64), scale)
    return {
        name: ((actual.double() - wanted).abs().max() / wanted.abs().max()).item()
        for name, actual, wanted in zip(
            ("output", "pseudo-values", "state"), found, (output, written, state), strict=True
        )
    }


def cases() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for shape, decay in itertools.product(SHAPES, ("none", "constant", "scalar")):
        for dtype, extras in ((torch.float32, True), (torch.float32, False), (torch.float16, True)):
            inputs = make_inputs(decay, initial=extras, shared=extras, **shape).to(dtype)
            actual = kernel(inputs, 0.3)
            assert [x.dtype for x in actual] == [dtype, torch.float32, torch.float32]
            name = f"{str(dtype)[6:]} {decay} extras={extras} state_k={shape['state_k']}"
            found[name] = errors(inputs, actual, 0.3)
    for pos in (1, 32):  # one token; whole chunks only
        for dtype in (torch.float32, torch.bfloat16):
            inputs = make_inputs("scalar", initial=True, batch=1, head=2, pos=pos, state_k=33, state_v=17).to(dtype)
            found[f"{str(dtype)[6:]} pos={pos}"] = errors(inputs, kernel(inputs))

    inputs = make_inputs("scalar", initial=True, batch=1, head=2, pos=40, state_k=20, state_v=20).to(torch.float32)
    rest = (inputs.beta, inputs.log_decay, inputs.initial)
    first, again = kernel(inputs), kernel(inputs)
    found["same bits twice"] = all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    q, k, v = (x.mT.contiguous().mT for x in (inputs.q, inputs.k, inputs.v))
    found["float32 strided last axis"] = errors(inputs, kernel(Inputs(q, k, v, *rest)))
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    found["float32 strided heads"] = errors(inputs, kernel(Inputs(q, k, v, *rest)))
    marked = torch.complex(q, k).conj().imag  # a negative view: memory holds k, the tensor -k
    found["float32 negative view"] = errors(Inputs(q, -k, v, *rest), kernel(Inputs(q, marked, v, *rest)))

    # One key again and again: the worst case of the triangular systems.
    inputs.k = inputs.k[:, :, :1].expand_as(inputs.k)
    found["float32 one key"] = errors(inputs, kernel(inputs))
    assert inputs.log_decay is not None
    inputs.log_decay.fill_(-20.0)
    inputs.log_decay[:, :, 25:35] = -1e-3
    found["float32 strong decay"] = errors(inputs, kernel(inputs))

    # The public functions take the kernels where there are any, and the torch form where the kernels cannot.
    calls = counted(triton)
    package._has_kernel = lambda device: True
    arguments = (inputs.q, inputs.k, inputs.v, inputs.beta)
    found["float32 dispatched"] = errors(inputs, delta_rule_and_pseudo_values(*arguments, **inputs.options))
    found["dispatched once"] = len(calls) == 1
    leaf = inputs.q.clone().requires_grad_()
    delta_rule(leaf, *arguments[1:], **inputs.options)[0].sum().backward()
    delta_rule(*arguments, **inputs.options, chunk_size=16)
    delta_rule(*arguments, **inputs.options, mode="recurrent")
    delta_rule(*arguments, **inputs.options, stops=[3], on_state=lambda t, state: None)
    delta_rule(*(x.double() for x in arguments))
    delta_rule(*arguments, log_decay=torch.zeros_like(inputs.k))
    wide = torch.zeros(1, 1, 3, triton.LARGEST_STATE_K + 1)
    delta_rule(wide, wide, wide, wide[..., 0])
    torch.func.vmap(lambda q: delta_rule(q, *arguments[1:])[0])(inputs.q.unsqueeze(0))
    torch.func.jvp(lambda q: delta_rule(q, *arguments[1:])[0], (inputs.q,), (inputs.q,))
    found["torch form where the kernel cannot"] = len(calls) == 1 and leaf.grad is not None
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(cases()))
