"""One layer of linear self-attention, with hook points, and the prompts that it reads (Zhang, Frei and Bartlett 2023, section 3).

A prompt of N examples and a query is the matrix E [d+1, N+1]: column i is (x_i, y_i), the last is (x_query, 0). The layer is

    f(E) = E + W_PV E · Eᵀ W_KQ E / N

and the prediction is the last entry of the last column. Here the columns of E are the positions of a sequence, so tensors
are [batch, pos, d+1] and the columns' products are an attention pattern without softmax and without a causal mask.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from workbench.instrument.hook_points import HookPoint
from workbench.instrument.hooked_model import HookedModel
from workbench.instrument.patterns import PatternMeta


class LinearAttention(nn.Module):
    """f(E) − E: one head whose merged matrices are W_KQ [d_model, d_model] (key, query) and W_PV [d_model, d_model]."""

    def __init__(self, d_model: int):
        super().__init__()
        self.W_KQ = nn.Parameter(torch.zeros(d_model, d_model))
        self.W_PV = nn.Parameter(torch.zeros(d_model, d_model))
        self.hook_q = HookPoint("query", "batch pos head d_head")
        self.hook_v = HookPoint("value", "batch pos head d_head")
        meta = PatternMeta(signed=True, rows_sum_to="free", causal="none")
        self.hook_pattern = HookPoint("pattern", "batch head query key", meta=meta)
        self.hook_out = HookPoint("mixer_out", "batch pos d_model")

    def forward(self, x: Tensor) -> Tensor:
        """[batch, pos, d_model] to the same; pos is N + 1."""
        query = self.hook_q((x @ self.W_KQ.T).unsqueeze(2)).squeeze(2)  # W_KQ e, to be met by the other columns
        value = self.hook_v((x @ self.W_PV.T).unsqueeze(2)).squeeze(2)
        pattern = query @ x.transpose(1, 2) / (x.shape[1] - 1)
        pattern = self.hook_pattern(pattern.unsqueeze(1)).squeeze(1)
        return self.hook_out(pattern @ value)


class Block(nn.Module):
    """The layer and its residual connection."""

    def __init__(self, d_model: int):
        super().__init__()
        self.attn = LinearAttention(d_model)
        self.hook_resid_pre = HookPoint("resid", "batch pos d_model")
        self.hook_resid_post = HookPoint("resid_post", "batch pos d_model")

    def forward(self, x: Tensor) -> Tensor:
        x = self.hook_resid_pre(x)
        return self.hook_resid_post(x + self.attn(x))


class LinearSelfAttention(HookedModel):
    """The paper's model for inputs of dimension d. `forward(prompts)` gives the predictions [batch]."""

    def __init__(self, d: int):
        super().__init__()
        self.d = d
        self.blocks = nn.ModuleList([Block(d + 1)])
        self.name_hook_points()

    @property
    def n_layers(self) -> int:
        return 1

    @property
    def attention(self) -> LinearAttention:
        block = self.blocks[0]
        assert isinstance(block, Block)
        return block.attn

    @property
    def W_KQ(self) -> Tensor:
        return self.attention.W_KQ

    @property
    def W_PV(self) -> Tensor:
        return self.attention.W_PV

    @torch.no_grad()
    def initialise(self, scale: float, generator: torch.Generator) -> None:
        """The paper's start: W_PV = σ in its last entry, W_KQ = σ ΘΘᵀ in its block of inputs, ‖ΘΘᵀ‖_F = 1, else 0."""
        self.W_PV.zero_()
        self.W_KQ.zero_()
        self.W_PV[-1, -1] = scale
        theta = torch.randn(self.d, self.d, generator=generator, dtype=self.W_KQ.dtype)
        product = theta @ theta.T
        self.W_KQ[:-1, :-1] = scale * product / product.norm()

    def update_matrix(self) -> Tensor:
        """The A [d, d] in ŷ = x_queryᵀ A (1/N Σ y_i x_i), to which the model reduces when the rest of its weights is 0."""
        return self.W_PV[-1, -1] * self.W_KQ[:-1, :-1].T

    def other_weights(self) -> Tensor:
        """The weights that act on the prediction and are 0 at the paper's minimum, one vector."""
        return torch.cat([self.W_PV[-1, :-1], self.W_KQ[-1, :-1]])

    def forward(self, prompts: Tensor) -> Tensor:
        """prompts [batch, N+1, d+1] to predictions [batch]."""
        for block in self.blocks:
            prompts = block(prompts)
        return prompts[:, -1, -1]


def sample_prompts(
    variances: Tensor, batch: int, examples: int, generator: torch.Generator, *, scrambled: bool = False
) -> tuple[Tensor, Tensor]:
    """(prompts [batch, examples+1, d+1], targets [batch]): x ~ N(0, diag(variances)), w ~ N(0, I), y = w·x.

    `variances` is [d], or [batch, d] for prompts with covariances of their own. `scrambled` gives each prompt the labels
    of another task, so that its examples tell nothing about its query: the control.
    """
    d, dtype = variances.shape[-1], variances.dtype
    x = torch.randn(batch, examples + 1, d, generator=generator, dtype=dtype) * variances.sqrt().view(-1, 1, d)
    w = torch.randn(batch, d, generator=generator, dtype=dtype)
    y = torch.einsum("bnd,bd->bn", x, w)
    targets = y[:, -1].clone()
    if scrambled:
        other = torch.randn(batch, d, generator=generator, dtype=dtype)
        y = torch.einsum("bnd,bd->bn", x, other)
    y[:, -1] = 0
    return torch.cat([x, y.unsqueeze(-1)], -1), targets


def risk(model: LinearSelfAttention, prompts: Tensor, targets: Tensor) -> float:
    """Mean squared error over prompts, some of them at once: patterns take batch · pos² numbers."""
    chunk = max(1, 2**22 // prompts.shape[1] ** 2)
    with torch.no_grad():
        errors = [
            (model(part) - target).square().sum(dtype=torch.float64)
            for part, target in zip(prompts.split(chunk), targets.split(chunk), strict=True)
        ]
    return float(sum(errors)) / math.prod(targets.shape)
