"""The RG-LRU against its equations written out token by token, its exact patterns channel by channel, and its interventions."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import models
from models.decoder import Decoder
from models.recurrent.rg_lru import RGLRU, RGLRUConfig, bounded_sqrt
from probes.state_tools_edits import clamp_gate, reset, scale_write

TEXT, AT, HEADS, WIDTH = "one two three one two", "blocks.1.mixer", 3, 30


@pytest.fixture(scope="module")
def model() -> Decoder:
    built = models.build("griffin").double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.5 * noise if parameter.dim() == 1 else noise * (0.3 if "ln" not in name else 0))
    return built


def slowly(mixer: Any, u: Tensor) -> Tensor:
    """One text [pos, d_model], token by token: convolution, gates block by block, decay, write, output gate."""
    taps, width = mixer.config.d_conv, mixer.n_heads * mixer.d_head
    before = torch.cat([u.new_zeros(taps - 1, width), u @ mixer.input.weight.T + mixer.input.bias])
    h, outputs = u.new_zeros(width), []
    for t, token in enumerate(u):
        x = (before[t : t + taps] * mixer.conv.T).sum(0) + mixer.conv_bias
        r, i = torch.empty(width, dtype=u.dtype), torch.empty(width, dtype=u.dtype)
        for head in range(mixer.n_heads):
            own = slice(head * mixer.d_head, (head + 1) * mixer.d_head)
            r[own] = torch.sigmoid(x[own] @ mixer.recurrence_gate[head] + mixer.recurrence_bias[own])
            i[own] = torch.sigmoid(x[own] @ mixer.input_gate[head] + mixer.input_bias[own])
        a = torch.sigmoid(-mixer.decay) ** (8 * r)  # the paper's form; softplus(Λ) = −log σ(−Λ)
        h = a * h + i * x * (torch.sqrt(1 - a**2) if t else 1.0)
        gate = F.gelu(mixer.gate.weight @ token + mixer.gate.bias, approximate="tanh")
        outputs.append(mixer.output.weight @ (h * gate) + mixer.output.bias)
    return torch.stack(outputs)


def test_against_the_equations(model: Decoder) -> None:
    names = ["blocks.1.ln1.hook_normalized", "blocks.1.hook_mixer_out"]
    for mode in ("chunked", "parallel", "recurrent"):
        model.set_mode(mode)
        _, cache = model.run_with_cache(TEXT, names=names)
        with torch.no_grad():
            expected = slowly(model.mixers[1], cache[names[0]][0])
        assert (cache[names[1]][0] - expected).abs().max() < 1e-12
    model.set_mode("chunked")


def test_channel_patterns(model: Decoder) -> None:
    """α_c x[c] is the state of channel c, and the layer's pattern is the mean over the channels of each head."""
    names = [f"{AT}.{name}" for name in ("hook_v", "hook_z", "hook_pattern", "hook_channel_pattern")]
    _, cache = model.run_with_cache(TEXT, names=names)
    x, z, mean, alpha = (cache[name] for name in names)
    assert (torch.einsum("bcqk,bkc->bqc", alpha, x.flatten(2)) - z.flatten(2)).abs().max() < 1e-12
    assert (mean - alpha.unflatten(1, (HEADS, -1)).mean(2)).abs().max() < 1e-12
    assert (alpha >= 0).all() and not model.hook_dict[f"{AT}.hook_pattern"].editable


def test_an_edited_channel_pattern_acts_on_its_channel(model: Decoder) -> None:
    def cut(pattern: Tensor, hook: Any) -> Tensor:
        pattern[:, 13, 9, 4] = 0
        return pattern

    names = [f"{AT}.hook_z", f"{AT}.hook_v", f"{AT}.hook_channel_pattern"]
    _, plain = model.run_with_cache(TEXT, names=names)
    _, changed = model.run_with_cache(TEXT, names=names[0], hooks=[(names[2], cut)])
    expected = torch.zeros(len(TEXT), WIDTH, dtype=torch.float64)
    expected[9, 13] = -plain[names[2]][0, 13, 9, 4] * plain[names[1]][0, 4].flatten()[13]
    difference = (changed[names[0]] - plain[names[0]])[0].flatten(1)
    assert (difference - expected).abs().max() < 1e-12 < expected.abs().max()


def test_an_edited_decay_leaves_writes_alone_and_an_edited_gate_does_not(model: Decoder) -> None:
    """With no decay the state is the sum of all writes; a recurrence gate of 0 forgets nothing and writes nothing but the first token."""
    names = [f"{AT}.hook_write", f"{AT}.hook_v", f"{AT}.hook_z"]
    _, plain = model.run_with_cache(TEXT, names=names)
    _, kept = model.run_with_cache(TEXT, names=names, hooks=[(f"{AT}.hook_log_decay", lambda g, hook: 0 * g)])
    assert torch.equal(kept[names[0]], plain[names[0]])
    assert (kept[names[2]] - (kept[names[0]] * kept[names[1]]).cumsum(1)).abs().max() < 1e-12
    _, shut = model.run_with_cache(TEXT, names=names, hooks=[(f"{AT}.hook_recurrence_gate", lambda r, hook: 0 * r)])
    assert (shut[names[0]][:, 1:] == 0).all() and (shut[names[2]] == shut[names[2]][:, :1]).all()
    assert (shut[names[0]][:, 0] > 0).all()


def test_the_first_token_is_written_whole_wherever_it_stands(model: Decoder) -> None:
    """Its weight is its input gate: also behind padding, and not where a text goes on from a state."""
    tokens = model.to_tokens(TEXT)
    names = [f"{AT}.hook_write", f"{AT}.hook_input_gate"]
    padded = torch.cat([torch.zeros_like(tokens[:, :4]), tokens], 1)
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[:, :4] = False
    _, cache = model.run_with_cache(padded, mask=mask, names=names)
    whole = (cache[names[0]] == cache[names[1]]).flatten(2).all(-1)[0]
    assert whole[4] and not whole[5:].any()
    _, state = model(tokens[:, :6], return_state=True)
    _, cache = model.run_with_cache(tokens[:, 6:], state=state, names=names)
    assert not (cache[names[0]] == cache[names[1]]).flatten(2).all(-1).any()


def test_verbs_of_the_state_against_the_loop(model: Decoder) -> None:
    """Writes doubled, a decay held and a state reset: the loop with the same changes."""
    names = [f"{AT}.{name}" for name in ("hook_v", "hook_write", "hook_log_decay")]
    _, cache = model.run_with_cache(TEXT, names=names)
    x, write, log_decay = (cache[name][0] for name in names)

    def loop(write: Tensor, log_decay: Tensor, forget: int | None = None) -> Tensor:
        h, states = torch.zeros_like(x[0]), []
        for t in range(len(x)):
            h = log_decay[t].exp() * h + write[t] * x[t]
            states.append(h)
            h = 0 * h if t == forget else h
        return torch.stack(states)

    doubled, held = write.clone(), log_decay.clone()
    doubled[4, 1] *= 2
    held[5] = math.log(0.25)
    for verbs, expected in (
        (scale_write(model, 1, 2.0, heads=1, positions=4), loop(doubled, log_decay)),
        (clamp_gate(model, 1, 0.25, positions=5), loop(write, held)),
        (reset(model, 1, after=8), loop(write, log_decay, forget=8)),
    ):
        _, changed = model.run_with_cache(TEXT, names=f"{AT}.hook_z", hooks=verbs)
        assert (changed[f"{AT}.hook_z"][0] - expected).abs().max() < 1e-12
        assert (expected - loop(write, log_decay)).abs().max() > 1e-3


def test_bounded_square_root() -> None:
    """The value is √x; the derivative is 1/(2√x), but 1000 where that is more."""
    x = torch.tensor([0.0, 1e-12, 2.5e-7, 0.04, 1.0], dtype=torch.float64, requires_grad=True)
    root = bounded_sqrt(x)
    (slope,) = torch.autograd.grad(root.sum(), x)
    assert torch.equal(root.detach(), x.detach().sqrt())
    assert torch.allclose(slope, torch.tensor([1000.0, 1000.0, 1000.0, 2.5, 0.5], dtype=torch.float64), rtol=1e-12)


def test_initial_decays_and_mistakes() -> None:
    mixer = RGLRU(RGLRUConfig(n_heads=4), 400, {})
    mixer.initialise_own()
    least = torch.exp(-F.softplus(mixer.decay.detach()))
    assert 0.9 <= float(least.min()) < 0.91 and 0.99 < float(least.max()) <= 0.9991
    with pytest.raises(ValueError, match=r"channels \(30\) must be a multiple of n_heads \(4\)"):
        RGLRU(RGLRUConfig(4, 30), 24, {})
    with pytest.raises(ValueError, match="Unknown activation 'gellu'"):
        RGLRU(RGLRUConfig(3, 30, activation="gellu"), 24, {})
