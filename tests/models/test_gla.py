"""GLA and GateLoop against their papers' recurrences, token by token, and against public implementations where those are installed."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from models.context import Context
from models.recurrent.gateloop import GateLoop, GateLoopConfig
from models.recurrent.gla import GLA, GLAConfig

EXACT = 1e-10
D_MODEL, LENGTH = 12, 23


def context(length: int, offset: int = 0) -> Context:
    keys = torch.arange(offset + length)[None]
    return Context(keys[:, offset:], keys, None, None, offset, True)


def filled(mixer: Any, scale: float = 0.6) -> Any:
    mixer.double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return mixer


def inputs(batch: int = 2) -> Tensor:
    return torch.randn(batch, LENGTH, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


@pytest.mark.parametrize("decay", ["vector", "scalar"])
@pytest.mark.parametrize("mode", ["chunked", "recurrent", "parallel"])
def test_gla_is_its_paper(decay: str, mode: str) -> None:
    """Yang et al. 2023, equations 3 and 6 to 9, one token, head and key channel after the other."""
    config = GLAConfig(n_heads=3, key_factor=0.5, value_factor=1.0, decay=decay, decay_rank=4, decay_temperature=3.0)
    layer = filled(GLA(config, D_MODEL, {}))
    layer.core.mode = mode
    x = inputs()
    got, _ = layer(x, context(LENGTH), None)
    for row in range(2):
        states = torch.zeros(3, 2, 4, dtype=torch.float64)
        for t in range(LENGTH):
            token = x[row, t]
            gates = token if layer.decay_in is None else layer.decay_in.weight @ token
            gates = layer.decay.weight @ gates + layer.decay.bias
            parts = []
            for head in range(3):
                keys, values = slice(2 * head, 2 * head + 2), slice(4 * head, 4 * head + 4)
                q, k = layer.query.weight[keys] @ token, layer.key.weight[keys] @ token
                v = layer.value.weight[values] @ token
                a = torch.sigmoid(gates[keys] if decay == "vector" else gates[head]) ** (1 / 3.0)
                for channel in range(2):
                    fade = a[channel] if decay == "vector" else a
                    states[head, channel] = fade * states[head, channel] + k[channel] * v
                o = q @ states[head] / math.sqrt(2)
                o = o / (o.square().mean() + config.norm_eps).sqrt() * layer.norm.w
                parts.append(o * silu(layer.gate.weight[values] @ token))
            assert (got[row, t] - layer.output.weight @ torch.cat(parts)).abs().max() < EXACT


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("mode", ["chunked", "recurrent", "parallel"])
def test_gateloop_is_its_paper(mode: str, width: int) -> None:
    """Katsch 2023, section 3: a complex state that every token scales and turns, read by its real part."""
    layer = filled(GateLoop(GateLoopConfig(n_heads=3, d_head=width), D_MODEL, {}))
    layer.core.mode = mode
    x = inputs()
    cut = 9
    first, carried = layer(x[:, :cut], context(cut), None)
    second, _ = layer(x[:, cut:], context(LENGTH - cut, cut), carried)
    got = torch.cat([first, second], dim=1)
    for row in range(2):
        states = torch.zeros(3, width, width, dtype=torch.complex128)
        for t in range(LENGTH):
            token = x[row, t]
            a = torch.polar(
                torch.sigmoid(layer.magnitude.weight @ token + layer.magnitude.bias),
                layer.phase.weight @ token + layer.phase.bias,
            )
            parts = []
            for head in range(3):
                own = slice(width * head, width * (head + 1))
                q, k, v = (part.weight[own] @ token for part in (layer.query, layer.key, layer.value))
                states[head] = a[own, None] * states[head] + torch.outer(k, v)
                parts.append((q.to(states.dtype) @ states[head]).real * silu(layer.gate.weight[own] @ token))
            assert (got[row, t] - layer.output.weight @ torch.cat(parts)).abs().max() < EXACT


def test_gateloops_pattern_is_a_data_dependent_rotation() -> None:
    """α_ij = Σ_d q_id k_jd cos(Θ_id − Θ_jd) Π r, from the cached signals alone."""
    model = models.build("gateloop").double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    text, at = "turn and turn again", "blocks.1.mixer.hook_"
    names = ("q", "k", "phase", "log_magnitude")
    _, cache = model.run_with_cache(text, names=[at + name for name in names])
    q, k, phase, log_magnitude = (cache[at + name][0].transpose(0, 1).double() for name in names)
    turned, faded = phase.cumsum(1), log_magnitude.cumsum(1)
    exponent = faded[:, :, None] - faded[:, None] + 1j * (turned[:, :, None] - turned[:, None])
    alpha = (q[:, :, None] * k[:, None] * exponent.exp()).sum(-1).real.tril()
    assert (model.patterns(text, layers=1)[1].values[0] - alpha).abs().max() < EXACT


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"Unknown decay 'vectr'\. Did you mean 'vector'"):
        GLA(GLAConfig(n_heads=2, decay="vectr"), 12, {})
    with pytest.raises(ValueError, match=r"width of the keys \(6\) must be a multiple of n_heads \(4\)"):
        GLA(GLAConfig(n_heads=4), 12, {})
    with pytest.raises(ValueError, match=r"d_model \(12\) must be a multiple of n_heads \(5\), or d_head given"):
        GateLoop(GateLoopConfig(n_heads=5), 12, {})


# ---------------------------------------------------------------------- public implementations (dependency group "parity")


def test_gateloop_transformer() -> None:
    """The mixer between its hook points is the operator of gateloop-transformer 0.2.5 (the paper's section 3.2).

    That package makes magnitude and phase from one complex projection; the operator after them is the same.
    """
    pytest.importorskip(
        "gateloop_transformer", reason="gateloop-transformer is not installed (dependency group parity)"
    )
    from gateloop_transformer.gateloop_transformer import gate_loop_operator

    model = models.build("gateloop")
    at = "blocks.1.mixer.hook_"
    names = ("q", "k", "v", "log_magnitude", "phase", "z")
    _, cache = model.run_with_cache("every token turns", names=[at + name for name in names])
    q, k, v, log_magnitude, phase, z = (cache[at + name].transpose(1, 2).flatten(0, 1) for name in names)
    a = torch.polar(log_magnitude.exp(), phase)[..., None]
    expected = gate_loop_operator(q, k, v, a.expand(*a.shape[:3], v.shape[-1]))
    assert (z - expected).abs().max() <= 2e-5 * expected.abs().max()
