"""Mamba layers with the weights of Hugging Face's Mamba and Falcon Mamba layers, and the exact patterns of their channels."""

from typing import Any

import pytest
import torch
from torch import Tensor

import models
from models.context import Context
from models.recurrent.mamba import Mamba, MambaConfig, channel_patterns

D_MODEL, LENGTH, STATE, RANK = 12, 45, 5, 7
TEXT = "channels remember differently"


def context(length: int) -> Context:
    positions = torch.arange(length)[None]
    return Context(positions, positions, None, None, 0, False)


@pytest.mark.parametrize("falcon", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hugging_face(falcon: bool, dtype: torch.dtype) -> None:
    """float64 is compared more tightly, as far as the reference keeps it: it computes Δ's exponentials in float32."""
    sizes: dict[str, Any] = {
        "hidden_size": D_MODEL,
        "state_size": STATE,
        "time_step_rank": RANK,
        "num_hidden_layers": 1,
    }
    if falcon:
        from transformers import FalconMambaConfig as Config
        from transformers import FalconMambaModel as Model
    else:
        from transformers import MambaConfig as Config
        from transformers import MambaModel as Model
    config = Config(**sizes, vocab_size=8)
    # in a model: Falcon Mamba's mixer alone initialises weights before it has them
    theirs = Model(config).layers[0].mixer.eval().to(dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype))
    eps = config.mixer_rms_eps if falcon else 1e-6
    ours = Mamba(MambaConfig(STATE, dt_rank=RANK, norm_factors=falcon, norm_eps=eps), D_MODEL, {}).to(dtype)
    weights = {name: value.detach() for name, value in theirs.named_parameters()}
    renamed = {
        "input.weight": "in_proj.weight", "conv_bias": "conv1d.bias", "select.weight": "x_proj.weight",
        "dt_weight": "dt_proj.weight", "dt_bias": "dt_proj.bias", "A_log": "A_log", "D": "D", "output.weight": "out_proj.weight",
    }  # fmt: skip
    ours.load_state_dict(
        {**{own: weights[their] for own, their in renamed.items()}, "conv": weights["conv1d.weight"][:, 0]}
    )
    x = torch.randn(2, LENGTH, D_MODEL, generator=generator, dtype=torch.float64).to(dtype)
    with torch.no_grad():
        expected = theirs(x)
        for mode in ("chunked", "recurrent", "parallel"):
            ours.core.mode = mode
            got, _ = ours(x, context(LENGTH), None)
            assert (got - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.fixture(scope="module")
def model() -> Any:
    built = models.build("mamba").double()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3)
    return built


def test_channel_patterns_give_each_channels_output(model: Any) -> None:
    """α_c x[c] is hook_z of channel c, without the skip, and the layer's pattern is the mean over its groups of channels."""
    _, cache = model.run_with_cache(
        TEXT, names=["blocks.1.mixer.hook_v", "blocks.1.mixer.hook_z", "blocks.1.mixer.hook_pattern"]
    )
    x, z = cache["blocks.1.mixer.hook_v"], cache["blocks.1.mixer.hook_z"].flatten(-2)
    some = [3, 40, 0]
    alpha = channel_patterns(model, TEXT, 1, some)
    assert (torch.einsum("bcqk,bkc->bqc", alpha, x[..., some]) - z[..., some]).abs().max() < 1e-12
    everything = channel_patterns(model, TEXT, 1, list(range(48)))
    means = everything.unflatten(1, (3, 16)).mean(2)
    assert (cache["blocks.1.mixer.hook_pattern"] - means).abs().max() < 1e-12
    assert torch.equal(channel_patterns(model, TEXT, 1, [40], queries=[5]), everything[:, 40:41, 5:6])


def test_an_edited_channel_pattern_acts_on_its_channel(model: Any) -> None:
    def cut(pattern: Tensor, hook: Any) -> Tensor:
        pattern[:, 3, 9, 4] = 0
        return pattern

    name = "blocks.1.mixer.hook_z"
    _, plain = model.run_with_cache(TEXT, names=[name, "blocks.1.mixer.hook_v"])
    _, changed = model.run_with_cache(TEXT, names=name, hooks=[("blocks.1.mixer.hook_channel_pattern", cut)])
    difference = (changed[name] - plain[name]).flatten(-2)[0]
    expected = torch.zeros_like(difference)
    expected[9, 3] = -channel_patterns(model, TEXT, 1, [3])[0, 0, 9, 4] * plain["blocks.1.mixer.hook_v"][0, 4, 3]
    assert (difference - expected).abs().max() < 1e-12 and expected.abs().max() > 1e-9


def test_mistakes_are_named(model: Any) -> None:
    with pytest.raises(ValueError, match=r"multiple of n_heads \(5\), the groups shown"):
        Mamba(MambaConfig(n_heads=5), D_MODEL, {})
    with pytest.raises(ValueError, match="Layer 1 is 'attention', not 'mamba'"):
        channel_patterns(models.build("samba"), TEXT, 1, [0])
    with pytest.raises(Exception, match="it only reports"):
        from workbench.instrument.interventions import EditPattern

        model.run_with_hooks(TEXT, hooks=[EditPattern(layer=0, heads=0, keys=2, value=0.0)])
