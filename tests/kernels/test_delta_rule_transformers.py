"""The delta rule against two independent implementations: Qwen3-Next and Kimi Linear of the transformers library.

Both scale queries by state_k^-1/2 and lay tensors out as [batch, pos, head, width].
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.delta_rule import delta_rule, effective_pattern, values_probe
from tests.kernels.delta_rule_inputs import Inputs, make_inputs

BATCH, HEAD, POS, STATE_K, STATE_V = 2, 3, 100, 16, 8


def swapped(*tensors: Tensor | None) -> list[Tensor]:
    return [x.transpose(1, 2).contiguous() for x in tensors if x is not None]


def inputs_of(decay: str) -> Inputs:
    inputs = make_inputs(decay, initial=True, pos=POS, state_k=STATE_K, state_v=STATE_V, dtype=torch.float32)
    inputs.beta *= 0.5  # the published models keep beta in (0, 1)
    return inputs


def theirs(decay: str, form: str) -> Any:
    if decay == "scalar":
        from transformers.models.qwen3_next import modeling_qwen3_next as qwen

        return {"chunk": qwen.torch_chunk_gated_delta_rule, "step": qwen.torch_recurrent_gated_delta_rule}[form]
    from transformers.models.kimi_linear import modeling_kimi_linear as kimi

    return {"chunk": kimi.chunk_kimi_delta_attention, "step": kimi.recurrent_kimi_delta_attention}[form]


@pytest.mark.parametrize("decay", ["scalar", "vector"])
@pytest.mark.parametrize("form", ["chunk", "step"])
@pytest.mark.parametrize("mode", ["chunked", "recurrent"])
def test_outputs_and_states_agree(decay: str, form: str, mode: str) -> None:
    inputs = inputs_of(decay)
    q, k, v, g, beta = swapped(inputs.q, inputs.k, inputs.v, inputs.log_decay, inputs.beta)
    expected, expected_state = theirs(decay, form)(
        q, k, v, g=g, beta=beta, initial_state=inputs.initial, output_final_state=True
    )
    output, state = delta_rule(
        inputs.q, inputs.k, inputs.v, inputs.beta, scale=STATE_K**-0.5, mode=mode, **inputs.options
    )
    assert (output - expected.transpose(1, 2)).abs().max() <= 2e-5
    assert (state - expected_state).abs().max() <= 2e-5


@pytest.mark.parametrize("decay", ["scalar", "vector"])
def test_the_pattern_is_what_one_hot_values_read_out_of_their_kernel(decay: str) -> None:
    inputs = inputs_of(decay)

    def core(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        moved = swapped(q, k, v.expand(-1, q.shape[1], -1, -1), inputs.log_decay, inputs.beta)
        output, state = theirs(decay, "chunk")(*moved, initial_state=None, output_final_state=True)
        return output.transpose(1, 2), state

    probe = values_probe(core, inputs.q, inputs.k)
    alpha = effective_pattern(inputs.q, inputs.k, inputs.beta, log_decay=inputs.log_decay, scale=STATE_K**-0.5)
    assert (alpha - probe).abs().max() <= 2e-5
