"""Models and token batches that the tests of lenses and attributions share."""

import torch
from torch import Tensor

import models
from models.decoder import Decoder

ARCHITECTURES = ("gpt2", "llama", "retnet", "mamba2", "bdh")


def perturbed(name: str, dtype: torch.dtype = torch.float64, scale: float = 0.05, **changes: object) -> Decoder:
    """A tiny model whose biases, norms and means are none of them zero or one."""
    model = models.build(name, **changes).eval().to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return model


def random_tokens(model: Decoder, batch: int = 3, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(0, model.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(tokens: Tensor, pads: int = 2) -> tuple[Tensor, Tensor]:
    """The same sequences after `pads` padding tokens, and their mask."""
    filled = torch.cat([torch.zeros_like(tokens[:, :pads]), tokens], 1)
    mask = torch.ones_like(filled, dtype=torch.bool)
    mask[:, :pads] = False
    return filled, mask
