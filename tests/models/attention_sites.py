"""One attention site by itself, in float64 and with weights off their neutral values, for comparisons with other libraries."""

from typing import Any

import torch
from torch import Tensor

from models.attention.site import Attention, AttentionConfig
from models.context import Context
from models.language_model import LanguageModel, LanguageModelConfig
from models.mixers import build_mixer

WIDTH, HEADS, LENGTH, VOCABULARY = 32, 4, 11, 37


def largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


def lively(module: Any, std: float = 0.4) -> Any:
    """The module in float64, every parameter drawn from N(0, std²) and without gradient."""
    generator = torch.Generator().manual_seed(0)
    module = module.double().requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)
    return module


def site(config: AttentionConfig, layer: int = 0, width: int = WIDTH) -> Attention:
    """The mixer of a configuration, told that it stands in `layer`."""
    made: Attention = lively(build_mixer(config, width, {"use_attn_result": False}))
    made.placed(layer, [])
    return made


def context(length: int = LENGTH, before: int = 0) -> Context:
    """Of a call with `length` tokens after `before` others."""
    positions = torch.arange(before + length)[None]
    return Context(positions[:, before:], positions, None, None, before, False)


def stream(length: int = LENGTH, width: int = WIDTH, seed: int = 1) -> Tensor:
    """[2, length, width]."""
    return torch.randn(2, length, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def out(layer: Attention, x: Tensor, carried: dict[str, Tensor] | None = None, before: int = 0) -> Tensor:
    """What the site gives for a stream."""
    return layer((x, x, x), context(x.shape[1], before), carried)[0]


def causal_mask(length: int = LENGTH) -> Tensor:
    """[1, 1, length, length], −inf above the diagonal."""
    return torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1)[None, None]


def heads_first(layer: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [batch, head, pos, width]."""
    q, k, v = (
        getattr(layer, n)(x).unflatten(-1, (-1, layer.d_head)).transpose(1, 2) for n in ("query", "key", "value")
    )
    return q, k, v


def model(mixer: Any, layers: int = 1, width: int = WIDTH, seed: int = 3, **more: Any) -> LanguageModel:
    """A model of such layers without MLPs, float64, every parameter away from its initial value."""
    made = LanguageModel(LanguageModelConfig(layers, width, VOCABULARY, 64, mixer, init_std=0.4, **more)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return made.requires_grad_(False)


def tokens(length: int = LENGTH, vocabulary: int = VOCABULARY) -> Tensor:
    """[2, length]."""
    return torch.randint(0, vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
