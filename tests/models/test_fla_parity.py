"""Mixers between their hook points beside the reference recurrences of flash-linear-attention (fla-core 0.6.0, in float32 there).

Its layers need a GPU; its plain functions do not. Group `parity`, skipped where it is absent. Its own reference of Titans is left out:
its gradient lacks a pair of parentheses, so it does not follow its own loss.
"""

import pytest
from torch import Tensor

import models

TEXT = "every rule of it"  # 16 tokens: as many as the levels of the log-linear preset tell apart


def retnet(x: dict[str, Tensor]) -> Tensor:
    from fla.ops.retention.naive import naive_retention

    width = x["rot_q"].shape[-1]  # it divides queries by sqrt(width), where our keys are divided already
    heads_first = (x[name].transpose(1, 2) for name in ("rot_q", "rot_k", "v"))
    q, k, v = heads_first
    return naive_retention(width**0.5 * q, k, v).transpose(1, 2)


def gla(x: dict[str, Tensor]) -> Tensor:
    from fla.ops.gla.naive import naive_recurrent_gla

    decay = x["log_decay"] if x["log_decay"].dim() == 4 else x["log_decay"][..., None].expand_as(x["k"])
    return naive_recurrent_gla(x["q"], x["k"], x["v"], decay)[0]


def deltanet(x: dict[str, Tensor]) -> Tensor:
    from fla.ops.delta_rule.naive import delta_rule_recurrence

    q, k, v, beta = (x[name].transpose(1, 2) for name in ("unit_q", "unit_k", "v", "write"))
    return delta_rule_recurrence(q, k, v, beta)[0].transpose(1, 2)


def gated_deltanet(x: dict[str, Tensor]) -> Tensor:
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    heads = x["v"].shape[2] // x["unit_k"].shape[2]
    q, k = (x[name].repeat_interleave(heads, 2) for name in ("unit_q", "unit_k"))
    return naive_recurrent_gated_delta_rule(q, k, x["v"], x["write"], x["log_decay"])[0]


def kda(x: dict[str, Tensor]) -> Tensor:
    from fla.ops.kda.naive import naive_recurrent_kda

    return naive_recurrent_kda(x["unit_q"], x["unit_k"], x["v"], x["log_decay"], x["write"])[0]


def loglinear_mamba2(x: dict[str, Tensor]) -> Tensor:
    from fla.ops.log_linear_attn.naive import naive_log_linear_attn

    return naive_log_linear_attn(x["q"], x["k"], x["v"] * x["write"][..., None], x["log_decay"], x["level"])


CASES = {
    "retnet": retnet,
    "gla": gla,
    "simple-gla": gla,
    "deltanet": deltanet,
    "gated-deltanet": gated_deltanet,
    "kda": kda,
    "loglinear-mamba2": loglinear_mamba2,
}


@pytest.mark.parametrize("name", list(CASES))
def test_flash_linear_attention(name: str) -> None:
    pytest.importorskip("fla", reason="flash-linear-attention is not installed (dependency group parity)")
    model = models.build(name)
    _, cache = model.run_with_cache(TEXT, names="blocks.1.mixer.hook_*")
    signals = {address.rsplit("hook_", 1)[-1]: tensor for address, tensor in cache.items()}
    expected = CASES[name](signals)
    assert (signals["z"] - expected).abs().max() <= 2e-5 * expected.abs().max()
