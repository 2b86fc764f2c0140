"""Models of the instrument's tests: small, float64, with weights large enough that every part has an effect."""

import torch
from torch import Tensor

import models
from models.attention.site import AttentionConfig
from models.decoder import Decoder
from models.language_model import LanguageModel, LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from workbench.instrument.hook_points import ACTIVE

VOCABULARY = 200
LENGTH = 8


def gpt2(n_layers: int = 2) -> LanguageModel:
    """The sizes of the TransformerLens fixture: d_model 64, 4 heads, d_mlp 256, vocabulary 200."""
    return LanguageModel(LanguageModelConfig(n_layers, 64, VOCABULARY, 32, AttentionConfig(4), MLPConfig(256))).eval()


def llama() -> LanguageModel:
    """The same with rotary positions, 2 key/value heads, RMS norms and a gated MLP."""
    attention = AttentionConfig(4, 2, position="rope", bias=False)
    mlp = MLPConfig(256, "silu", gated=True, bias=False)
    return LanguageModel(LanguageModelConfig(2, 64, VOCABULARY, None, attention, mlp, norm="rms")).eval()


def lively(name: str) -> Decoder:
    """An architecture of the registry at its tiny size, float64, with larger weights and no parameter at its neutral value."""
    model = models.build(name).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4)
            else:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model.requires_grad_(False)


def some_tokens(batch: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Token ids [batch, pos] that every vocabulary here has."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def largest(x: Tensor) -> float:
    """Largest absolute entry."""
    return float(x.detach().abs().max())


def nothing_attached(model: Decoder) -> bool:
    """No hook is left in this thread or on the model."""
    return not ACTIVE.entries and not ACTIVE.scopes and not ACTIVE.running and not model.list_hooks()
