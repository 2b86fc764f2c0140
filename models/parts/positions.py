"""Positions: learned and sinusoidal embeddings, rotations of queries and keys (RoPE), and ALiBi's slopes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.parts.rope_scaling import RopeScaling
from workbench.lab.catalogue import implements

POSITIONS = ("learned", "sinusoidal", "rope", "alibi", "none")


def sinusoidal(positions: Tensor, width: int) -> Tensor:
    """Sine and cosine embedding (Vaswani et al. 2017, section 3.5). positions [...] -> [..., width], sines at even entries."""
    precise = torch.promote_types(torch.get_default_dtype(), positions.dtype)
    steps = torch.arange(0, width, 2, device=positions.device, dtype=precise)
    frequency = torch.exp(steps * (-math.log(10000.0) / width))
    angle = positions[..., None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)[..., :width]


class PositionEmbedding(nn.Module):
    """Adds nothing itself: returns the embedding [batch, pos, d_model] of given positions, learned or sinusoidal."""

    def __init__(self, kind: str, n_ctx: int, d_model: int) -> None:
        super().__init__()
        self.kind, self.n_ctx, self.d_model = kind, n_ctx, d_model
        if kind == "learned":
            self.W_pos = nn.Parameter(torch.empty(n_ctx, d_model))

    def forward(self, positions: Tensor) -> Tensor:
        """positions [batch or 1, pos] -> [batch or 1, pos, d_model]."""
        if self.kind == "learned":
            return F.embedding(positions, self.W_pos)
        return sinusoidal(positions.to(torch.get_default_dtype()), self.d_model)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, interleaved: bool) -> Tensor:
    """Rotate pairs of the last axis. Pairs are (2k, 2k+1) if interleaved, else (k, k + half). cosine, sine broadcast to [..., half]."""
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([a * cosine - b * sine, b * cosine + a * sine], dim=-1).flatten(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=-1)


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021): the pair k of a head is turned by position · base^(−2k/d_rotary).

    Args:
        d_head: width of a head. base: wavelength base. fraction: share of the head that is rotated (the rest passes through).
        interleaved: pair layout; False is Hugging Face's half-split layout. scaling: other frequencies for texts longer than trained on.
    """

    def __init__(
        self,
        d_head: int,
        base: float = 10000.0,
        fraction: float = 1.0,
        interleaved: bool = False,
        scaling: RopeScaling | None = None,
    ) -> None:
        super().__init__()
        self.d_rotary = int(d_head * fraction)
        if self.d_rotary % 2 or self.d_rotary == 0:
            raise ValueError(
                f"RoPE rotates pairs: d_head·fraction is {self.d_rotary}, expected an even number above 0."
            )
        self.base, self.interleaved, self.scaling = base, interleaved, scaling
        self.needs_length = scaling is not None and scaling.needs_length

    def angles(self, positions: Tensor, dtype: torch.dtype, length: int | None = None) -> tuple[Tensor, Tensor]:
        """cos and sin [batch or 1, pos, 1, d_rotary / 2] (the third axis is the head).

        positions [batch or 1, pos], whole numbers or not. length: of the longest text (needed where the scaling `needs_length`).
        """
        precise = torch.float64 if dtype == torch.float64 else torch.float32
        exponent = torch.arange(0, self.d_rotary, 2, device=positions.device, dtype=precise) / self.d_rotary
        frequency = self.base**-exponent
        if self.scaling is None:
            angle = (positions.to(precise)[..., None] * frequency)[:, :, None, :]
            return angle.cos().to(dtype), angle.sin().to(dtype)
        frequency = self.scaling.frequencies(self.base, self.d_rotary, frequency, length)
        angle = (positions.to(precise)[..., None] * frequency)[:, :, None, :]
        amplitude = self.scaling.amplitude
        return (angle.cos() * amplitude).to(dtype), (angle.sin() * amplitude).to(dtype)

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Rotate x [batch, pos, head, d_head]."""
        if self.d_rotary == x.shape[-1]:
            return rotate(x, cosine, sine, self.interleaved)
        turned, rest = x[..., : self.d_rotary], x[..., self.d_rotary :]
        return torch.cat([rotate(turned, cosine, sine, self.interleaved), rest], dim=-1)


def alibi_slopes(n_heads: int) -> Tensor:
    """ALiBi's slopes (Press et al. 2021): 2^(−8h/n) for a power of two; else the next lower power's, then every other of the next."""
    power = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    slopes += [2 ** (-4 * (2 * head + 1) / power) for head in range(n_heads - power)]
    return torch.tensor(slopes)


@implements(
    "randomized-pe",
    "position",
    "randomised_positions",
    note="the sampler; drawn per call and handed over as facts['positions']",
)
def randomised_positions(length: int, longest: int, generator: torch.Generator | None = None, batch: int = 1) -> Tensor:
    """Ascending positions drawn without replacement from 0..longest − 1, [batch, length] (Ruoss et al. 2023).

    Handed to a model as `facts={"positions": ...}`, in training and in testing, they let any kind of positions meet numbers up to `longest`
    on short texts, and show how far a prediction hangs on positions.

    Raises:
        ValueError: more tokens than positions.
    """
    if length > longest:
        raise ValueError(f"{length} tokens cannot have different positions below {longest}. Expected longest ≥ length.")
    shuffled = torch.rand(batch, longest, generator=generator).argsort(-1)
    return shuffled[:, :length].sort(-1).values
