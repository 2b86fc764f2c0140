"""Runs the Triton kernel of gated linear attention in Triton's interpreter and prints its errors as JSON.

Started by the tests in a process of its own, because the interpreter is chosen once, when a kernel is defined:
TRITON_INTERPRET=1 python -m tests.kernels.interpret_gated_linear_attention
"""

import itertools
import json
from typing import Any

import torch
from torch import Tensor

import kernels.gated_linear_attention as package
from kernels.gated_linear_attention import gated_linear_attention, triton
from tests.kernels.gla_inputs import Inputs, make_inputs
from tests.kernels.triton_checks import counted

SHAPES = ({"pos": 37, "state_k": 5, "state_v": 4}, {"pos": 70, "state_k": 70, "state_v": 20, "batch": 1, "head": 2})


def errors(inputs: Inputs, output: Tensor, state: Tensor, **options: Any) -> dict[str, float]:
    """Largest error of output and state over the largest expected number, against the recurrence in float64."""
    wide = inputs.to(torch.float64)
    expected = gated_linear_attention(wide.q, wide.k, wide.v, **wide.options, **options, mode="recurrent")
    names = ("output", "state")
    return {
        name: ((actual.double() - wanted).abs().max() / wanted.abs().max()).item()
        for name, actual, wanted in zip(names, (output, state), expected, strict=True)
    }


def kernel(inputs: Inputs, scale: float = 1.0, strict: bool = False) -> tuple[Tensor, Tensor]:
    batch, head, _, state_k = inputs.k.shape
    empty = torch.zeros(batch, head, state_k, inputs.v.shape[3])
    state = empty if inputs._initial is None else inputs._initial
    return triton.forward(inputs.q, inputs.k, inputs.v, inputs.log_decay, inputs._write, scale, strict, state)


def cases() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for shape, decay, strict in itertools.product(SHAPES, ("none", "constant", "scalar"), (False, True)):
        for dtype, extras in ((torch.float32, True), (torch.float32, False), (torch.float16, True)):
            wide = make_inputs(decay, write=extras, initial=extras, shared=extras, **shape)  # type: ignore[arg-type]
            inputs = wide.to(dtype)
            output, state = kernel(inputs, 0.3, strict)
            assert output.dtype == dtype and state.dtype == torch.float32
            name = f"{str(dtype)[6:]} {decay} strict={strict} extras={extras} state_k={shape['state_k']}"
            found[name] = errors(inputs, output, state, scale=0.3, strict=strict)

    inputs = make_inputs("scalar", write=True, initial=True, **SHAPES[1]).to(torch.float32)  # type: ignore[arg-type]
    output, state = kernel(inputs)
    again = kernel(inputs)
    found["same bits twice"] = bool(torch.equal(output, again[0]) and torch.equal(state, again[1]))

    assert inputs.log_decay is not None
    inputs.log_decay.fill_(-20.0)
    inputs.log_decay[:, :, 25:50] = -1e-3
    found["float32 strong decay"] = errors(inputs, *kernel(inputs))

    triton.PARTIAL_OUTPUT_BYTES = 1  # one launch per chunk
    found["float32 several launches"] = errors(inputs, *kernel(inputs))

    q, k, v = (x.mT.contiguous().mT for x in (inputs.q, inputs.k, inputs.v))
    found["float32 strided last axis"] = errors(inputs, *kernel(Inputs(q, k, v, *inputs.tensors()[3:])))
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
    found["float32 strided heads"] = errors(inputs, *kernel(Inputs(q, k, v, *inputs.tensors()[3:])))

    marked = torch.complex(q, k).conj().imag  # a negative view: memory holds k, the tensor -k
    found["float32 negative view"] = errors(
        Inputs(q, -k, v, *inputs.tensors()[3:]), *kernel(Inputs(q, marked, v, *inputs.tensors()[3:]))
    )

    # BDH: the query is the key, positive and sparse; one value for all heads; reads of the strict past; a state much taller than wide.
    for decay, initial in (("none", False), ("constant", True)):
        bdh = make_inputs(decay, initial=initial, shared=True, pos=70, state_k=200, state_v=20).to(torch.float32)
        bdh.q = bdh.k = bdh.q.clamp(min=0)
        found[f"float32 BDH decay={decay} initial={initial}"] = errors(bdh, *kernel(bdh, strict=True), strict=True)

    narrow = make_inputs("scalar", write=True, initial=True, **SHAPES[1]).to(torch.bfloat16)  # type: ignore[arg-type]
    found["bfloat16 in two row tiles"] = errors(narrow, *kernel(narrow))

    # The public function takes the kernel where one exists, and the torch form where a gradient is kept.
    calls = counted(triton)
    package._has_kernel = lambda device: True
    arguments = (inputs.q, inputs.k, inputs.v)
    found["float32 dispatched"] = errors(inputs, *gated_linear_attention(*arguments, **inputs.options))
    found["dispatched once"] = len(calls) == 1
    leaf = inputs.q.clone().requires_grad_()
    gated_linear_attention(leaf, inputs.k, inputs.v, **inputs.options)[0].sum().backward()
    gated_linear_attention(*arguments, **inputs.options, chunk_size=16)
    gated_linear_attention(*arguments, **inputs.options, mode="recurrent")
    gated_linear_attention(*arguments, **inputs.options, stops=[3], on_state=lambda t, state: None)
    gated_linear_attention(*(x.double() for x in arguments))
    gated_linear_attention(*arguments, log_decay=torch.zeros_like(inputs.k))
    torch.func.vmap(lambda q: gated_linear_attention(q, inputs.k, inputs.v)[0])(inputs.q.unsqueeze(0))
    torch.func.jvp(lambda q: gated_linear_attention(q, inputs.k, inputs.v)[0], (inputs.q,), (inputs.q,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(inputs.q, inputs.q)
        gated_linear_attention(dual, inputs.k, inputs.v)
    found["torch form where the kernel cannot"] = len(calls) == 1 and leaf.grad is not None
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(cases()))
