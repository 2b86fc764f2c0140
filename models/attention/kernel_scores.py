"""Scores that are kernels with a learned spectrum: Kernelized Transformer (Chowdhury et al. 2022, "On Learning the Transformer Kernel").

    ω_m = μ_h + e^{σ_h / 2} ⊙ ε_m                 spectrum "gaussian": one Gaussian per head, as in the released code
    ω_m = tanh(W₂ leaky(W₁ ε_m + b₁) + b₂)        spectrum "generated": a network per layer turns noise into frequencies
    φ(x) = exp(ω_m · x − offset ‖x‖²)             features "positive"
    φ(x) = [cos(ω_m · x), sin(ω_m · x)], 1        features "fourier"; the last, constant one keeps the kernel from being negative
    score_ij = log Σ_m φ_m(q_i) φ_m(k_j),   queries and keys times √scale, so that q · k is the ordinary score

The softmax of a logarithm is the linear attention of the paper, Σ_j φ(q_i)·φ(k_j) v_j / Σ_j φ(q_i)·φ(k_j); so terms of the score multiply
the kernel, and rows are distributions. Here the map is formed; the paper never forms it, which costs time linear in the text's length.
With μ = 0, σ = 0 and more and more frequencies, positive features give the kernel e^{q·k} with offset ½ (softmax attention) and
e^{−‖q−k‖²/2} with offset 1, as in the released code; Fourier features give the latter, plus 1. The noise ε is drawn once per layer and
kept (`redraw` draws it anew), so that hooked runs can be repeated. Not here: the code's FastFood frequencies, its full covariance of
Fourier features, and its batch norm in the generator.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.attention.stages import Call, Part, Score, Sizes, register_part
from workbench.instrument.errors import suggestion
from workbench.instrument.hook_points import HookPoint

FEATURES, SPECTRA = ("positive", "fourier"), ("gaussian", "generated")


@dataclass(frozen=True)
class KernelScoreConfig:
    """Args: features, spectrum: see the module docstring. frequencies: how many, m. offset: of positive features. seed: of the noise."""

    features: str = "positive"
    spectrum: str = "gaussian"
    frequencies: int = 16
    offset: float = 0.5
    seed: int = 0
    kind: str = "kernel_score"

    def __post_init__(self) -> None:
        for name, given, known in (("features", self.features, FEATURES), ("spectrum", self.spectrum, SPECTRA)):
            if given not in known:
                raise ValueError(
                    f"Unknown {name} {given!r}.{suggestion(given, known)} Expected one of {', '.join(known)}."
                )
        if self.frequencies < 1:
            raise ValueError(f"frequencies is {self.frequencies}; expected at least 1.")


@register_part(KernelScoreConfig)
class KernelScore(Score):
    """`noise` ε [head, frequency, d_head]; `hook_query_phase`, `hook_key_phase` [batch, head, query or key, frequency] are ω_m · x."""

    noise: Tensor
    hook_query_phase: HookPoint
    hook_key_phase: HookPoint

    def __init__(self, config: KernelScoreConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        shape = (sizes.n_maps, config.frequencies, sizes.d_head)
        self.register_buffer("noise", torch.empty(shape))
        self.redraw(config.seed)
        if config.spectrum == "gaussian":
            self.mean = nn.Parameter(torch.empty(sizes.n_maps, sizes.d_head))
            self.log_variance = nn.Parameter(torch.empty(sizes.n_maps, sizes.d_head))
        else:
            self.generator = nn.Sequential(
                nn.Linear(sizes.d_head, sizes.d_head),
                nn.LeakyReLU(),
                nn.Linear(sizes.d_head, sizes.d_head),
                nn.Tanh(),
            )
        for name in ("query", "key"):
            point = HookPoint(f"{name}_phase", f"batch {sizes.map_axis} {name} frequency")
            setattr(self, f"hook_{name}_phase", point)

    def initialise_own(self) -> None:
        """The generator's maps start as large as those of an ordinary network, or all frequencies would begin near 0."""
        if self.config.spectrum == "generated":
            for name, weight in self.generator.named_parameters():
                if name.endswith("weight"):
                    nn.init.xavier_uniform_(weight)

    def placed(self, layer: int, earlier: list[Part]) -> None:
        """Every layer draws noise of its own."""
        self.redraw(self.config.seed + layer)

    @torch.no_grad()
    def redraw(self, seed: int) -> None:
        """New noise ε. The released code does this every few steps of training."""
        generator = torch.Generator().manual_seed(seed)
        self.noise.copy_(torch.randn(self.noise.shape, generator=generator))

    def frequencies(self) -> Tensor:
        """ω [head, frequency, d_head]."""
        if self.config.spectrum == "generated":
            return self.generator(self.noise)  # type: ignore[no-any-return]
        return self.mean[:, None] + (self.log_variance / 2).exp()[:, None] * self.noise

    def forward(self, call: Call) -> Tensor:
        """[batch, map, query, key]."""
        root, omega = self.sizes.scale**0.5, self.frequencies()
        q, k = call.q * root, call.k * root
        phase_q = self.hook_query_phase(torch.einsum("bhqd,hmd->bhqm", q, omega))
        phase_k = self.hook_key_phase(torch.einsum("bhkd,hmd->bhkm", k, omega))
        if self.config.features == "fourier":  # Σ cos(a) cos(b) + sin(a) sin(b), in [−1, 1]; plus the constant feature
            alike = phase_q.cos() @ phase_k.cos().transpose(-1, -2) + phase_q.sin() @ phase_k.sin().transpose(-1, -2)
            return (alike / self.config.frequencies + 1).clamp(min=1e-12).log()
        exponent_q = phase_q - self.config.offset * q.square().sum(-1, keepdim=True)
        exponent_k = phase_k - self.config.offset * k.square().sum(-1, keepdim=True)
        most_q, most_k = (x.detach().amax(-1, keepdim=True) for x in (exponent_q, exponent_k))  # against overflow
        total = (exponent_q - most_q).exp() @ (exponent_k - most_k).exp().transpose(-1, -2)
        smallest = torch.finfo(total.dtype).tiny
        return total.clamp(min=smallest).log() + most_q + most_k.transpose(-1, -2)
