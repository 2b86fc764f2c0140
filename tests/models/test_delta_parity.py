"""Delta-rule layers with the weights of Hugging Face's Qwen3-Next, Kimi Linear and OLMo Hybrid; and what our exact pattern explains of a
Qwen3-Next layer's own output, beside TransformerLens's effective attention, both run on one model."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels.delta_rule import effective_pattern
from models.context import Context
from models.recurrent.delta import Delta, DeltaConfig, unit
from models.recurrent.delta_core import pattern_parts

D_MODEL, LENGTH = 20, 83
SAME = 2e-5  # float32, relative to the largest output
EXACT = 1e-10


def context(length: int) -> Context:
    positions = torch.arange(length)[None]
    return Context(positions, positions, None, None, 0, False)


def spread(module: nn.Module, decays: bool = True) -> None:
    """Every parameter random and away from 0; decays from fast to slow."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
            if name.endswith("A_log"):
                parameter.copy_(torch.linspace(-3, 1, parameter.numel()).view_as(parameter))
            elif parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * noise if "norm" in name else 0.5 * noise)
            else:
                parameter.copy_(noise * (0.6 if "conv" in name else 0.35))


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, LENGTH, D_MODEL, generator=torch.Generator().manual_seed(6), dtype=dtype)


def agree(ours: Delta, theirs: nn.Module, tolerance: float, dtype: torch.dtype = torch.float32) -> None:
    x = inputs(dtype)
    with torch.no_grad():
        expected = theirs(x)
        for mode in ("chunked", "recurrent"):
            ours.core.mode = mode
            got, _ = ours(x, context(LENGTH), None)
            assert (got - expected).abs().max() <= tolerance * expected.abs().max()


# ------------------------------------------------------------------------------------------------ Qwen3-Next


def qwen_config(**changes: Any) -> Any:
    from transformers import Qwen3NextConfig

    sizes: dict[str, Any] = {
        "hidden_size": D_MODEL,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 6,
        "layer_types": ["linear_attention"],
        "num_hidden_layers": 1,
        "vocab_size": 64,
        "num_experts": 0,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
    }
    return Qwen3NextConfig(**{**sizes, **changes})


def from_qwen(theirs: Any) -> Delta:
    """Our layer with a Qwen3-Next layer's weights, which are packed key head by key head: [q, k, its value heads, their gates]."""
    groups, heads, d_key, d_value = theirs.num_k_heads, theirs.num_v_heads, theirs.head_k_dim, theirs.head_v_dim
    each = heads // groups
    ours = Delta(
        DeltaConfig(heads, d_key, d_value, groups, "scalar", "silu", norm_eps=theirs.layer_norm_epsilon), D_MODEL, {}
    ).to(theirs.A_log.dtype)
    packed = theirs.in_proj_qkvz.weight.detach().unflatten(0, (groups, -1))
    q, k, v, z = (x.flatten(0, 1) for x in packed.split([d_key, d_key, each * d_value, each * d_value], dim=1))
    b, a = (
        x.flatten(0, 1) for x in theirs.in_proj_ba.weight.detach().unflatten(0, (groups, -1)).split([each, each], 1)
    )
    ours.load_state_dict(
        {
            "input.weight": torch.cat([q, k, v]),
            "conv": theirs.conv1d.weight.detach()[:, 0],
            "write.weight": b,
            "decay.weight": a,
            "dt_bias": theirs.dt_bias.detach(),
            "A_log": theirs.A_log.detach(),
            "gate.weight": z,
            "norm.w": theirs.norm.weight.detach(),
            "output.weight": theirs.out_proj.weight.detach(),
        }
    )
    return ours


def test_qwen3_next() -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    theirs = Qwen3NextGatedDeltaNet(qwen_config(), 0).eval()
    spread(theirs)
    agree(from_qwen(theirs), theirs, SAME)


# ----------------------------------------------------------------------------------------------- Kimi Linear


def test_kimi_delta_attention() -> None:
    """KDA: decay per key channel through a bottleneck, sigmoid gate through another."""
    from transformers import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    config = KimiLinearConfig(hidden_size=D_MODEL, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"],
                              linear_num_heads=3, linear_head_dim=8, linear_conv_kernel_dim=3)  # fmt: skip
    theirs = KimiLinearDeltaAttention(config, 0).eval()
    spread(theirs)
    ours = Delta(
        DeltaConfig(3, 8, 8, decay="vector", gate="sigmoid", low_rank=8, d_conv=3, norm_eps=config.rms_norm_eps),
        D_MODEL,
        {},
    )
    weights = {name: value.detach() for name, value in theirs.named_parameters()}
    ours.load_state_dict(
        {
            "input.weight": torch.cat([weights[f"{name}_proj.weight"] for name in "qkv"]),
            "conv": weights["conv1d.weight"][:, 0],
            "write.weight": weights["b_proj.weight"],
            "decay.0.weight": weights["forget_gate.f_a_proj.weight"],
            "decay.1.weight": weights["forget_gate.f_b_proj.weight"],
            "dt_bias": weights["forget_gate.dt_bias"],
            "A_log": weights["forget_gate.A_log"].flatten(),
            "gate.0.weight": weights["g_a_proj.weight"],
            "gate.1.weight": weights["g_b_proj.weight"],
            "norm.w": weights["o_norm.weight"],
            "output.weight": weights["o_proj.weight"],
        }
    )
    agree(ours, theirs, SAME)


# ----------------------------------------------------------------------------------------------- OLMo Hybrid


def test_olmo_hybrid() -> None:
    """Gated DeltaNet with β in (0, 2): a write may flip what its key recalls."""
    from transformers import OlmoHybridConfig
    from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet

    config = OlmoHybridConfig(hidden_size=D_MODEL, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"],
                              linear_num_key_heads=3, linear_num_value_heads=3, linear_key_head_dim=8,
                              linear_value_head_dim=6, linear_allow_neg_eigval=True, num_attention_heads=2)  # fmt: skip
    theirs = OlmoHybridGatedDeltaNet(config, 0).eval()
    spread(theirs)
    ours = Delta(DeltaConfig(3, 8, 6, decay="scalar", gate="silu", negative_eigenvalues=True), D_MODEL, {})
    weights = {name: value.detach() for name, value in theirs.named_parameters()}
    ours.load_state_dict(
        {
            "input.weight": torch.cat([weights[f"{name}_proj.weight"] for name in "qkv"]),
            "conv": weights["conv1d.weight"][:, 0],
            "write.weight": weights["b_proj.weight"],
            "decay.weight": weights["a_proj.weight"],
            "dt_bias": weights["dt_bias"],
            "A_log": weights["A_log"],
            "gate.weight": weights["g_proj.weight"],
            "norm.w": weights["o_norm.weight"],
            "output.weight": weights["o_proj.weight"],
        }
    )
    agree(ours, theirs, SAME)


# ------------------------------------------------------------------------------------ what a pattern explains


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


@pytest.mark.parametrize(("memory", "least"), [("short", 0.3), ("long", 0.3)])
def test_exact_pattern_beside_transformer_lens(memory: str, least: float, capsys: pytest.CaptureFixture[str]) -> None:
    """TransformerLens's bridge around a random Qwen3-Next: the output of the layer's recurrence, as its own hook caches it, from its
    effective attention (end to end, its own method) and from our exact pattern of the same cached tensors.

    Its method reads un-normalised queries and keys and leaves out what the delta rule takes back; its docstring calls it a heuristic.
    We also give its formula normalised, scaled queries and keys, so that the omission alone is seen.
    """
    pytest.importorskip("transformer_lens")
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformers import Qwen3NextForCausalLM

    torch.manual_seed(0)
    config = qwen_config(num_hidden_layers=2, layer_types=["linear_attention", "full_attention"], num_experts=2,
                         num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16,
                         decoder_sparse_step=1)  # fmt: skip
    wrapped = Qwen3NextForCausalLM(config).eval()
    layer = wrapped.model.layers[0].linear_attn
    spread(layer)
    with torch.no_grad():
        layer.A_log.fill_(1.0 if memory == "short" else -3.0)
    bridge = build_bridge_from_module(wrapped, "Qwen3NextForCausalLM", hf_config=config)
    tokens = torch.randint(0, 64, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, cache = bridge.run_with_cache(tokens, use_cache=False)
        theirs = cache.compute_ssm_effective_attention(layer=0)
    read = {name: cache[f"blocks.0.linear_attn.hook_{name}"] for name in ("q", "k", "v", "beta", "log_decay")}
    expected = cache["blocks.0.linear_attn.hook_recurrence_out"].transpose(1, 2)
    value, beta, log_decay = (read[name].transpose(1, 2) for name in ("v", "beta", "log_decay"))
    q, k = (unit(read[name]).repeat_interleave(2, dim=2).transpose(1, 2) for name in ("q", "k"))
    exact = effective_pattern(q, k, beta, log_decay=log_decay, scale=8**-0.5)
    summed = log_decay.cumsum(-1)
    without_erasure = (
        (q @ k.mT) * 8**-0.5 * (summed[..., :, None] - summed[..., None, :]).exp().tril() * beta[:, :, None]
    )
    errors = [relative(pattern @ value, expected) for pattern in (exact, theirs, without_erasure)]
    with capsys.disabled():
        print(f"\n{memory} memory: error of the layer's own output  exact {errors[0]:.1e}  TransformerLens {errors[1]:.2g}  "
              f"its formula on normalised q, k {errors[2]:.2g}")  # fmt: skip
    assert errors[0] <= 1e-4
    assert errors[1] > least
    if memory == "long":
        assert errors[2] > 0.1


# ----------------------------------------------------------------------------------------- the pattern in parts


def test_parts_multiply_to_the_pattern() -> None:
    import models

    for name in ("deltanet", "gated-deltanet", "kda"):
        model = models.build(name).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)
        parts = pattern_parts(model, "what was written is rewritten", 1)
        pattern = model.patterns("what was written is rewritten", layers=1)[1].values
        assert (parts.product() - pattern).abs().max() < EXACT
        assert (parts.decay is None) == (name != "gated-deltanet")
    with pytest.raises(ValueError, match=r"Layer 0 is 'retention' .*no delta rule"):
        pattern_parts(models.build("retnet"), "abc", 0)


def test_pseudo_values_and_surprise_are_the_definition() -> None:
    """u_t = β_t (v_t − Sᵀ k_t) with the state as it is carried, token by token; surprise is |u| / |v|."""
    import models

    model = models.build("gated-deltanet").double()
    text = "delta rules"
    core = "blocks.1.mixer"
    wanted = ("unit_k", "v", "write", "log_decay", "pseudo_value", "surprise")
    _, cache = model.run_with_cache(text, names=[f"{core}.hook_{name}" for name in wanted])
    states = model.states(text, range(len(text)), layers=1)[1][0]
    read = {name: cache[f"{core}.hook_{name}"][0] for name in wanted}
    for t in range(1, len(text)):
        key = read["unit_k"][t].repeat_interleave(2, dim=0)
        before = states[t - 1] * read["log_decay"][t].exp()[:, None, None]
        recalled = torch.einsum("hk,hkv->hv", key, before)
        u = read["write"][t][:, None] * (read["v"][t] - recalled)
        assert (u - read["pseudo_value"][:, t]).abs().max() < EXACT
        assert (u.norm(dim=-1) / read["v"][t].norm(dim=-1) - read["surprise"][:, t]).abs().max() < EXACT


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"Unknown decay 'scaler'\. Did you mean 'scalar'"):
        Delta(DeltaConfig(2, 4, 4, decay="scaler"), 8, {})
    with pytest.raises(ValueError, match="A vector decay needs low_rank"):
        Delta(DeltaConfig(2, 4, 4, decay="vector"), 8, {})
    with pytest.raises(ValueError, match="3 heads cannot share 2 key heads evenly"):
        Delta(DeltaConfig(3, 4, 4, n_key_heads=2), 8, {})
