"""Titans against loops with automatic differentiation, its delta-rule special case, its Jacobian map and its attention branch."""

import dataclasses

import pytest
import torch
from torch import Tensor

import models
from kernels.delta_rule import delta_rule
from kernels.fast_weight_memory import as_delta_rule
from models.decoder import Decoder
from workbench.instrument.errors import HookError
from workbench.instrument.interventions import EditPattern


def tokens(length: int = 14) -> Tensor:
    return torch.randint(0, 256, (2, length), generator=torch.Generator().manual_seed(0))


def built(name: str, **changes: object) -> Decoder:
    config = models.build(name).config
    model = models.build(name, mixer=dataclasses.replace(config.mixer, **changes)).double()
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.memory.input.weight.mul_(10)
    return model


def read(model: Decoder, names: list[str]) -> dict[str, Tensor]:
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens(), names=[f"blocks.1.mixer.hook_{name}" for name in names])
    return {name: cache[f"blocks.1.mixer.hook_{name}"] for name in names}


def heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def test_linear_memory_without_momentum_is_the_gated_delta_rule() -> None:
    model = built("titans-linear", momentum=False, every=1)
    f = read(model, ["unit_q", "unit_k", "v", "write", "log_decay", "z"])
    values, beta = as_delta_rule(heads(f["v"]), heads(f["write"]), heads(f["log_decay"]))
    expected, _ = delta_rule(heads(f["unit_q"]), heads(f["unit_k"]), values, beta, log_decay=heads(f["log_decay"]))
    assert (heads(f["z"]) - expected).abs().max() < 1e-12


def test_surprise_is_high_where_the_memory_is_wrong() -> None:
    """A text that repeats is learned: with steps large enough, the loss of a token falls from its first to its later occurrences."""
    model = built("titans-linear", every=1, max_step=1.0, momentum=False, d_conv=1)
    period = torch.randint(0, 256, (1, 5), generator=torch.Generator().manual_seed(3))
    ids = period.repeat(1, 8)
    with torch.no_grad():
        _, cache = model.run_with_cache(ids, names=["blocks.0.mixer.hook_surprise", "blocks.0.mixer.hook_loss"])
    surprise, loss = cache["blocks.0.mixer.hook_surprise"], cache["blocks.0.mixer.hook_loss"]
    assert surprise.shape == loss.shape == (1, 3, 40)
    first, last = loss[..., :5].mean(-1), loss[..., -5:].mean(-1)
    assert (last < 0.5 * first).all()
    assert surprise[..., -5:].mean() < surprise[..., :5].mean()


@pytest.mark.parametrize("every", [1, 4])
def test_the_jacobian_map_is_the_norm_of_finite_differences(every: int) -> None:
    model = built("titans", every=every, max_step=0.05)
    pattern = model.patterns(tokens(), layers=1)[1]
    assert not pattern.meta.exact and pattern.meta.kind == "jacobian"
    size = 1e-5
    for j in (0, 3, 9):
        columns = []
        for channel in range(8):
            difference = []
            for sign in (1, -1):

                def push(v: Tensor, hook: object, j: int = j, channel: int = channel, sign: int = sign) -> Tensor:
                    v[:, j, :, channel] += sign * size
                    return v

                with torch.no_grad():
                    _, cache = model.run_with_cache(
                        tokens(), names="blocks.1.mixer.hook_z", hooks=[("blocks.1.mixer.hook_v", push)]
                    )
                difference.append(heads(cache["z", 1]))
            columns.append((difference[0] - difference[1]) / (2 * size))
        expected = torch.stack(columns).square().sum((0, -1)).sqrt()  # [batch, head, query]
        assert (pattern.values[..., j] - expected).abs().max() < 1e-7 * expected.max()
    with pytest.raises(HookError):
        model.run_with_hooks(tokens(), hooks=[EditPattern(layer=1, queries=5, keys=3)])
    with torch.inference_mode():
        again = model.patterns(tokens(), layers=1)[1]
    assert (again.values - pattern.values).abs().max() < 1e-12


def test_attention_reads_its_window_and_the_persistent_tokens() -> None:
    """Rows are distributions over the learned tokens and the last six; the branch is softmax attention written out."""
    model = built("titans-mag")
    names = ["attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_attention", "attn.hook_attention_z"]
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens(), names=[f"blocks.1.mixer.{name}" for name in names])
    q, k, v, pattern, z = (cache[f"blocks.1.mixer.{name}"] for name in names)
    attn = model.blocks[1].mixer.attn
    for b, h, i in ((0, 0, 0), (1, 2, 5), (0, 1, 13)):
        low = max(0, i - 5)
        keys = torch.cat([attn.persistent_key[:, h], k[b, low : i + 1, h]])
        values = torch.cat([attn.persistent_value[:, h], v[b, low : i + 1, h]])
        weights = (keys @ q[b, i, h] * 8**-0.5).softmax(0)
        assert (z[b, i, h] - weights @ values).abs().max() < 1e-12
        assert (pattern[b, h, i, :2] - weights[:2]).abs().max() < 1e-12
        assert pattern[b, h, i, 2 : 2 + low].abs().sum() == 0 and pattern[b, h, i, 3 + i :].abs().sum() == 0
    assert (pattern.sum(-1) - 1).abs().max() < 1e-12


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="Did you mean 'gate'"):
        built("titans", variant="gates")
    with pytest.raises(ValueError, match=r"multiple of n_heads \(5\)"):
        built("titans", n_heads=5)
