"""Rotary positions beyond the length they were trained on: five published ways to change the frequencies.

    linear      all frequencies / factor (Chen et al. 2023, position interpolation)
    dynamic     a larger base, once the text is longer than the original context (NTK-aware scaling)
    yarn        high frequencies as they are, low ones interpolated, a ramp between; rotated vectors are made longer (Peng et al. 2023)
    llama3      the same idea with bounds on wavelengths (Llama 3.1)
    longrope    a divisor for every frequency, other ones for texts longer than the original context (Ding et al. 2024)

A rotation by `dynamic` or `longrope` depends on the length of the text at the time of the call: keys that were carried from earlier
calls keep the rotation that they were given, as in other implementations.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.instrument.errors import suggestion

METHODS = ("linear", "dynamic", "yarn", "llama3", "longrope")


@dataclass(frozen=True)
class RopeScaling:
    """Args:
    method: see the module docstring. factor: how much longer texts may get. original_context: the length trained on.
    attention_factor: what rotated vectors are multiplied by (None: 1; yarn: 0.1·ln(factor) + 1; longrope: √(1 + ln factor / ln original)).
    beta_fast, beta_slow: yarn: pairs that turn more often than beta_fast over the original context keep their frequency, less often than
        beta_slow are interpolated. truncate: yarn rounds the ends of its ramp to whole pairs.
    low_frequency_factor, high_frequency_factor: llama3: wavelengths above original / low are interpolated, below original / high kept.
    short_factors, long_factors: longrope: a divisor per pair.
    """

    method: str
    factor: float = 1.0
    original_context: int | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    kind: str = "rope_scaling"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"Unknown rope scaling {self.method!r}.{suggestion(self.method, METHODS)} Expected one of {', '.join(METHODS)}."
            )
        if self.original_context is None and self.method != "linear":
            raise ValueError(
                f"The rope scaling {self.method!r} needs original_context, the length that was trained on."
            )
        if self.method == "longrope" and not (self.short_factors and self.long_factors):
            raise ValueError("The rope scaling 'longrope' needs short_factors and long_factors, one divisor per pair.")

    @property
    def needs_length(self) -> bool:
        """Whether the frequencies depend on the length of the text."""
        return self.method in ("dynamic", "longrope")

    @property
    def amplitude(self) -> float:
        """What rotated vectors are multiplied by."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.method == "yarn":
            return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        if self.method == "longrope" and self.factor > 1:
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_context or 1))
        return 1.0

    def frequencies(self, base: float, d_rotary: int, plain: Tensor, length: int | None) -> Tensor:
        """Angles per position of every pair, [d_rotary / 2]; `plain` are those without scaling, base^(−2k / d_rotary)."""
        original = self.original_context or 0
        if self.method == "linear":
            return plain / self.factor
        if self.method == "dynamic":
            ratio = max(length or 0, original) / original
            grown = base * (self.factor * ratio - (self.factor - 1)) ** (d_rotary / (d_rotary - 2))
            return grown ** (plain.log() / math.log(base))
        if self.method == "yarn":
            return self._yarn(base, d_rotary, plain, original)
        if self.method == "llama3":
            return self._llama3(plain, original)
        factors = self.long_factors if (length or 0) > original else self.short_factors
        if len(factors) != len(plain):
            raise ValueError(f"longrope lists {len(factors)} factors; expected one for each of the {len(plain)} pairs.")
        return plain / torch.tensor(factors, dtype=plain.dtype, device=plain.device)

    def _yarn(self, base: float, d_rotary: int, plain: Tensor, original: int) -> Tensor:
        def pair_that_turns(times: float) -> float:
            return d_rotary * math.log(original / (times * 2 * math.pi)) / (2 * math.log(base))

        first, last = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, d_rotary - 1)
        pairs = torch.arange(len(plain), dtype=plain.dtype, device=plain.device)
        interpolated = ((pairs - first) / max(last - first, 1e-3)).clamp(0, 1)
        return plain / self.factor * interpolated + plain * (1 - interpolated)

    def _llama3(self, plain: Tensor, original: int) -> Tensor:
        wavelength = 2 * math.pi / plain
        low, high = self.low_frequency_factor, self.high_frequency_factor
        kept = ((original / wavelength - low) / (high - low)).clamp(0, 1)
        return plain * kept + plain / self.factor * (1 - kept)
