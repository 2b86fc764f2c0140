"""Dictionaries: sparse autoencoders (and transcoders) of five kinds over one pair of matrices.

    z = (x/s − b_d) W_eᵀ + b_e              pre-activations; s makes the mean squared length of x equal to d_in
    f = activation(z)                        codes ≥ 0, where the kinds differ
    x̂ = s (f D + b_d)                        D [feature, d_out] with rows of length 1

Standard   f = ReLU(z); penalty λ Σ f                                              Bricken et al. 2023
TopK       the k largest of each row; dead features learn the residual (AuxK)         Gao et al. 2024, arXiv 2406.04093
BatchTopK  the k · rows largest of a batch; then a threshold θ fitted in training     Bussmann et al. 2024, arXiv 2412.06410
JumpReLU   z · 1[z > θ]; penalty λ Σ 1[z > θ], gradients through a rectangle kernel   Rajamanoharan et al. 2024, arXiv 2407.14435
Gated      1[π > 0] · ReLU(e^r ⊙ (π − b_e) + b_m); penalty λ Σ ReLU(π)                Rajamanoharan et al. 2024, arXiv 2404.16014

A transcoder (`d_out`) reads one site and reconstructs another; for a dictionary of one site the decoder bias is also taken off the input.
Losses are squared errors per row over the scaled target, so that λ means the same at every site.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kernels.sparse_features import SparseCodes, batch_top_features, decode, top_features
from workbench.instrument.errors import suggestion


@dataclass(frozen=True)
class DictionaryConfig:
    """What all kinds share.

    Args:
        n_features: size of the dictionary. d_out: width of what is reconstructed, if it is not what is read (transcoder).
        seed: of the initial directions.
    """

    n_features: int
    d_out: int | None = None
    seed: int = 0

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        if self.n_features < 1:
            raise ValueError(f"n_features must be at least 1, got {self.n_features}")
        k = getattr(self, "k", 1)
        if not 1 <= k <= self.n_features:
            raise ValueError(f"k must be between 1 and n_features ({self.n_features}), got {k}")
        for name in ("sparsity", "bandwidth"):
            if getattr(self, name, 1.0) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class Standard(DictionaryConfig):
    """Args: sparsity: λ, the weight of the summed codes."""

    sparsity: float = 0.1
    kind: ClassVar[str] = "standard"


@dataclass(frozen=True)
class TopK(DictionaryConfig):
    """Args: k: active features per row. aux_k: dead features that learn the residual (None: d_in / 2). aux_weight: of their loss."""

    k: int = 32
    aux_k: int | None = None
    aux_weight: float = 1 / 32
    kind: ClassVar[str] = "topk"


@dataclass(frozen=True)
class BatchTopK(TopK):
    """As `TopK`, k being the mean over a batch. prefixes: nested dictionaries that must do on their own (Matryoshka, arXiv 2503.17547)."""

    prefixes: tuple[int, ...] = ()
    kind: ClassVar[str] = "batch_topk"

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.prefixes) != sorted(set(self.prefixes)) or any(not 0 < p < self.n_features for p in self.prefixes):
            raise ValueError(f"prefixes must rise and lie between 0 and n_features, got {self.prefixes}")


@dataclass(frozen=True)
class JumpReLU(DictionaryConfig):
    """Args: sparsity: λ, the weight of the number of active features. threshold: initial θ. bandwidth: ε of the rectangle kernel."""

    sparsity: float = 0.01
    threshold: float = 0.01
    bandwidth: float = 0.05
    kind: ClassVar[str] = "jumprelu"


@dataclass(frozen=True)
class Gated(DictionaryConfig):
    """Args: sparsity: λ, the weight of the summed positive gates."""

    sparsity: float = 0.1
    kind: ClassVar[str] = "gated"


CONFIGS: dict[str, type[DictionaryConfig]] = {c.kind: c for c in (Standard, TopK, BatchTopK, JumpReLU, Gated)}


class Dictionary(nn.Module, ABC):
    """Encoder and decoder; see the module docstring.

    `W_enc`, `W_dec` [feature, d], `b_enc` [feature], `b_dec` [d_out], and `scale` s (a buffer, set from data by `fit_scale`).
    """

    scale: Tensor
    out_scale: Tensor

    def __init__(self, config: DictionaryConfig, d_in: int) -> None:
        super().__init__()
        if d_in < 1:
            raise ValueError(f"d_in must be at least 1, got {d_in}")
        self.config, self.d_in = config, d_in
        self.d_out = config.d_out or d_in
        generator = torch.Generator().manual_seed(config.seed)
        directions = torch.randn(config.n_features, self.d_out, generator=generator)
        directions = directions / directions.norm(dim=-1, keepdim=True)
        self.W_dec = nn.Parameter(directions)
        if config.d_out is None:
            self.W_enc = nn.Parameter(directions.clone())  # a feature first looks for the direction that it writes
        else:
            self.W_enc = nn.Parameter(torch.randn(config.n_features, d_in, generator=generator) * d_in**-0.5)
        self.b_enc = nn.Parameter(torch.zeros(config.n_features))
        self.b_dec = nn.Parameter(torch.zeros(self.d_out))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("out_scale", torch.ones(()))

    @property
    def n_features(self) -> int:
        """Size of the dictionary."""
        return self.config.n_features

    @property
    def directions(self) -> Tensor:
        """What one unit of each feature adds to the reconstructed site: [feature, d_out]."""
        return self.W_dec * self.out_scale

    @torch.no_grad()
    def fit_scale(self, x: Tensor, target: Tensor | None = None) -> None:
        """Set s from rows x [row, d_in] (and `target` [row, d_out] of a transcoder), and start b_dec at the target's mean."""
        target = x if target is None else target
        for name, rows in (("scale", x), ("out_scale", target)):
            root_mean_square = rows.double().pow(2).mean().sqrt()
            if not root_mean_square > 0:
                raise ValueError(f"{name}: the rows are all zero, so there is nothing to learn")
            getattr(self, name).copy_(root_mean_square)
        self.b_dec.copy_((target.double() / self.out_scale.double()).mean(0))

    def encode(self, x: Tensor) -> Tensor:
        """Codes of x [.., d_in]: dense, [.., feature], ≥ 0, mostly 0."""
        return self.activate(self.pre_activations(self.centred(x)))

    def decode(self, codes: Tensor) -> Tensor:
        """[.., feature] -> [.., d_out]."""
        return (codes @ self.W_dec + self.b_dec) * self.out_scale

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of x [.., d_in]: [.., d_out]."""
        return self.decode(self.encode(x))

    def centred(self, x: Tensor) -> Tensor:
        """What the encoder's matrix reads: scaled, and without the decoder's bias where input and output are one site."""
        if x.shape[-1] != self.d_in:
            raise ValueError(f"x has {x.shape[-1]} numbers per row; this dictionary reads {self.d_in}")
        x = x.to(self.W_enc.dtype) / self.scale
        return x - self.b_dec if self.config.d_out is None else x

    def pre_activations(self, centred: Tensor) -> Tensor:
        """z [.., feature]."""
        return centred @ self.W_enc.T + self.b_enc

    @abstractmethod
    def activate(self, z: Tensor) -> Tensor:
        """Codes from pre-activations, as used after training."""

    def losses(self, x: Tensor, target: Tensor, dead: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The terms of the training loss and which features fired.

        Args:
            x: [row, d_in]. target: [row, d_out], equal to x unless this is a transcoder. dead: bool [feature], silent for long.

        Returns:
            `{term: scalar}` ("reconstruction" first; the loss is their sum) and fired, bool [feature].
        """
        codes = self.encode(x)
        error = self._error(codes @ self.W_dec + self.b_dec, target)
        return {"reconstruction": error, "sparsity": self.config.sparsity * codes.sum(-1).mean()}, (codes > 0).any(0)  # type: ignore[attr-defined]

    def _error(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Mean squared error per row, over the scaled target."""
        return (reconstruction - target / self.out_scale).pow(2).sum(-1).mean()

    @torch.no_grad()
    def after_backward(self) -> None:
        """Take off the gradient along each direction: it would only change lengths, which `after_step` undoes."""
        if self.W_dec.grad is not None:
            along = (self.W_dec.grad * self.W_dec).sum(-1, keepdim=True)
            self.W_dec.grad.sub_(along * self.W_dec)

    @torch.no_grad()
    def after_step(self) -> None:
        """Directions of length 1."""
        self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-12))

    def extra_repr(self) -> str:
        return f"{self.config.kind}, d_in={self.d_in}, n_features={self.n_features}"


class StandardDictionary(Dictionary):
    """f = ReLU(z)."""

    def activate(self, z: Tensor) -> Tensor:
        return z.relu()


class TopKDictionary(Dictionary):
    """The k largest of each row, through the sparse kernels in training."""

    config: TopK

    def activate(self, z: Tensor) -> Tensor:
        values, features = z.topk(self.config.k, dim=-1)
        return torch.zeros_like(z).scatter(-1, features, values.relu())

    def sparse_codes(self, centred: Tensor) -> SparseCodes:
        """Codes of rows [row, d_in], sparse, as in training."""
        values, features = top_features(centred, self.W_enc, self.b_enc, self.config.k)
        starts = torch.arange(0, values.numel() + 1, self.config.k, device=values.device)
        return SparseCodes(values.flatten(), features.flatten(), starts)

    def losses(self, x: Tensor, target: Tensor, dead: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        centred = self.centred(x)
        codes = self.sparse_codes(centred)
        reconstruction = decode(codes.values, codes.features, self.W_dec, codes.starts) + self.b_dec
        terms = {"reconstruction": self._error(reconstruction, target)}
        terms |= self._nested(codes, target)
        if self.config.aux_weight and bool(dead.any()):
            terms["dead features"] = self.config.aux_weight * self._residual_error(
                centred, reconstruction, target, dead
            )
        fired = torch.zeros(self.n_features, dtype=torch.bool, device=x.device)
        fired[codes.features[codes.values > 0]] = True
        return terms, fired

    def _nested(self, codes: SparseCodes, target: Tensor) -> dict[str, Tensor]:
        return {}

    def _residual_error(self, centred: Tensor, reconstruction: Tensor, target: Tensor, dead: Tensor) -> Tensor:
        """AuxK (Gao et al. 2024, appendix A.2): the strongest dead features reconstruct what is left, without bias, over its variance."""
        residual = (target / self.out_scale - reconstruction).detach()
        indices = dead.nonzero()[:, 0]
        k = min(self.config.aux_k or max(1, self.d_in // 2), len(indices))
        values, chosen = top_features(centred, self.W_enc[indices], self.b_enc[indices], k)
        error = (decode(values, chosen, self.W_dec[indices]) - residual).pow(2).sum(-1).mean()
        variance = (residual - residual.mean(0)).pow(2).sum(-1).mean()
        return error / variance.clamp_min(1e-12)


class BatchTopKDictionary(TopKDictionary):
    """The k · rows largest of a batch while training; afterwards a code counts if it exceeds the mean smallest one of training (θ)."""

    config: BatchTopK
    threshold: Tensor

    def __init__(self, config: BatchTopK, d_in: int) -> None:
        super().__init__(config, d_in)
        self.register_buffer("threshold", torch.full((), math.nan))  # until the first training step

    def activate(self, z: Tensor) -> Tensor:
        if bool(self.threshold.isnan()):
            raise ValueError(
                "This BatchTopK dictionary has no threshold yet: it is fitted in training. Train it, or load a trained one."
            )
        return torch.where(z > self.threshold, z, 0.0).relu()

    def sparse_codes(self, centred: Tensor) -> SparseCodes:
        codes = batch_top_features(centred, self.W_enc, self.b_enc, self.config.k)
        if self.training and len(codes.values):
            smallest = codes.values.detach().min()
            first = bool(self.threshold.isnan())
            self.threshold.copy_(smallest if first else 0.99 * self.threshold + 0.01 * smallest)
        return codes

    def _nested(self, codes: SparseCodes, target: Tensor) -> dict[str, Tensor]:
        terms = {}
        for size in self.config.prefixes:
            inside = torch.where(codes.features < size, codes.values, 0.0)
            part = decode(inside, codes.features, self.W_dec, codes.starts) + self.b_dec
            terms[f"first {size}"] = self._error(part, target)
        return terms


class _Step(torch.autograd.Function):
    """1[z > θ] and, for `codes`, z · 1[z > θ]; θ gets the pseudo-derivatives of arXiv 2407.14435, equations 11 and 12."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float, codes: bool) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth, ctx.codes = bandwidth, codes
        active = (z > threshold).to(z.dtype)
        return z * active if codes else active

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        z, threshold = ctx.saved_tensors
        window = ((z - threshold).abs() < ctx.bandwidth / 2).to(z.dtype) / ctx.bandwidth
        height = threshold if ctx.codes else torch.ones_like(threshold)
        to_threshold = -(grad * window * height).sum(tuple(range(z.dim() - 1)))
        return (grad * (z > threshold) if ctx.codes else None), to_threshold, None, None


class JumpReLUDictionary(Dictionary):
    """z · 1[z > θ] with θ = exp(log_threshold), learned."""

    config: JumpReLU

    def __init__(self, config: JumpReLU, d_in: int) -> None:
        super().__init__(config, d_in)
        self.log_threshold = nn.Parameter(torch.full((config.n_features,), math.log(config.threshold)))

    def activate(self, z: Tensor) -> Tensor:
        return _Step.apply(z.relu(), self.log_threshold.exp(), self.config.bandwidth, True)

    def losses(self, x: Tensor, target: Tensor, dead: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        z = self.pre_activations(self.centred(x)).relu()
        threshold = self.log_threshold.exp()
        codes = _Step.apply(z, threshold, self.config.bandwidth, True)
        active = _Step.apply(z, threshold, self.config.bandwidth, False)
        error = self._error(codes @ self.W_dec + self.b_dec, target)
        return {"reconstruction": error, "sparsity": self.config.sparsity * active.sum(-1).mean()}, (codes > 0).any(0)


class GatedDictionary(Dictionary):
    """A gate says whether, a magnitude how much; both read the same directions (e^r rescales them for the magnitude)."""

    config: Gated

    def __init__(self, config: Gated, d_in: int) -> None:
        super().__init__(config, d_in)
        self.r_mag = nn.Parameter(torch.zeros(config.n_features))
        self.b_mag = nn.Parameter(torch.zeros(config.n_features))

    def activate(self, z: Tensor) -> Tensor:
        return (z > 0).to(z.dtype) * ((z - self.b_enc) * self.r_mag.exp() + self.b_mag).relu()

    def losses(self, x: Tensor, target: Tensor, dead: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        z = self.pre_activations(self.centred(x))
        codes, gate = self.activate(z), z.relu()
        terms = {
            "reconstruction": self._error(codes @ self.W_dec + self.b_dec, target),
            "sparsity": self.config.sparsity * gate.sum(-1).mean(),
            # the gate learns to reconstruct through a frozen copy of the decoder, since 1[z > 0] gives it no gradient
            "gate": self._error(gate @ self.W_dec.detach() + self.b_dec.detach(), target),
        }
        return terms, (codes > 0).any(0)


_MODULES: dict[type[DictionaryConfig], Any] = {
    Standard: StandardDictionary,
    TopK: TopKDictionary,
    BatchTopK: BatchTopKDictionary,
    JumpReLU: JumpReLUDictionary,
    Gated: GatedDictionary,
}


def build_dictionary(config: DictionaryConfig, d_in: int) -> Dictionary:
    """An untrained dictionary of a configuration's kind; raises `TypeError` naming the kinds."""
    if type(config) not in _MODULES:
        known = [c.__name__ for c in _MODULES]
        raise TypeError(
            f"{type(config).__name__} is no dictionary.{suggestion(type(config).__name__, known)} Known: {', '.join(known)}."
        )
    return _MODULES[type(config)](config, d_in)
