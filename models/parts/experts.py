"""A sparse channel mixer (Shazeer et al. 2017, arXiv 1701.06538): a router sends every token to a few of many small gated MLPs.

    s = W_r x                                                 hook_router_scores
    w = softmax(s), all but the `n_active` largest set to 0, divided by their sum if `normalise`
                                                              hook_router: how much each expert counts for each token
    h_e = activation(gate_e x) · in_e x                       hook_expert_post, on demand
    y = Σ_e w_e out_e h_e                                     hook_expert_out: the summands, on demand
      + σ(w_g · x) shared(x)                                  hook_shared_gate; an MLP that every token goes through (Qwen2-MoE)

Only experts with a weight are computed. So a weight that an edit sets where there was none computes that expert, and the gradient with
respect to the weight of an expert that was not chosen is 0.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.parts.channel_mixers import MLP, MLPConfig, activation_function, register_channel_mixer
from workbench.instrument.hook_points import HookPoint


@dataclass(frozen=True)
class SparseMLPConfig:
    """Args: d_mlp: hidden width of an expert. n_experts, n_active: how many there are, and how many a token goes through. normalise: the
    weights of the chosen ones sum to 1. d_shared: hidden width of the MLP that every token goes through (None: there is none)."""

    d_mlp: int
    n_experts: int
    n_active: int
    activation: str = "silu"
    normalise: bool = True
    d_shared: int | None = None
    kind: str = "sparse_mlp"

    gated, label = True, "Experts"  # what others ask of any channel mixer's configuration

    @property
    def words(self) -> str:
        """What a diagram says of it."""
        return f"{self.n_active} of {self.n_experts}, {self.d_mlp}"


@register_channel_mixer(SparseMLPConfig)
class SparseMLP(nn.Module):
    """See the module docstring. [batch, pos, d_model] -> same."""

    reads_with = ("gate", "inward")  # parameters [..., d_model] that its input meets, beside its linear maps

    def __init__(self, config: SparseMLPConfig, d_model: int) -> None:
        super().__init__()
        if not 1 <= config.n_active <= config.n_experts:
            raise ValueError(
                f"n_active is {config.n_active}; expected between 1 and n_experts ({config.n_experts}): a token goes through some of them."
            )
        self.config, self.activation = config, activation_function(config.activation)
        experts, width = config.n_experts, config.d_mlp
        self.router = nn.Linear(d_model, experts, bias=False)
        self.gate = nn.Parameter(torch.empty(experts, width, d_model))
        self.inward = nn.Parameter(torch.empty(experts, width, d_model))
        self.outward = nn.Parameter(torch.empty(experts, d_model, width))
        self.hook_router_scores = HookPoint("router_scores", "batch pos expert")
        self.hook_router = HookPoint("router", "batch pos expert")
        self.hook_expert_post = HookPoint("expert_post", "batch pos expert d_mlp", on_demand=True)
        self.hook_expert_out = HookPoint("expert_out", "batch pos expert d_model", on_demand=True)
        self.shared: MLP | None = None
        if config.d_shared is not None:
            self.shared = MLP(MLPConfig(config.d_shared, config.activation, gated=True, bias=False), d_model)
            self.shared_gate = nn.Linear(d_model, 1, bias=False)
            self.hook_shared_gate = HookPoint("shared_gate", "batch pos one")

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, pos, d_model] -> same."""
        weights = self._route(x)
        watched = self.hook_expert_post.active or self.hook_expert_out.active
        y = self._all_experts(x, weights) if watched else self._chosen_experts(x, weights)
        if self.shared is None:
            return y
        return y + self.hook_shared_gate(torch.sigmoid(self.shared_gate(x))) * self.shared(x)

    def _route(self, x: Tensor) -> Tensor:
        """The weights of all experts, most of them 0. [batch, pos, expert]."""
        scores = self.hook_router_scores(self.router(x))
        # as in the published code, 16-bit models choose in float32
        chances = scores.softmax(-1, dtype=torch.float64 if scores.dtype == torch.float64 else torch.float32)
        best, which = chances.topk(self.config.n_active, dim=-1)
        if self.config.normalise:
            best = best / best.sum(-1, keepdim=True)
        return self.hook_router(torch.zeros_like(chances).scatter(-1, which, best).to(x.dtype))

    def _hidden(self, x: Tensor, expert: int) -> Tensor:
        """[token, d_model] -> [token, d_mlp]."""
        return self.activation(x @ self.gate[expert].T) * (x @ self.inward[expert].T)

    def _chosen_experts(self, x: Tensor, weights: Tensor) -> Tensor:
        """Every expert on the tokens that were sent to it."""
        tokens, shares = x.flatten(0, -2), weights.flatten(0, -2)
        y = torch.zeros_like(tokens)
        for expert in (shares != 0).any(0).nonzero()[:, 0].tolist():
            sent = shares[:, expert].nonzero()[:, 0]
            out = self._hidden(tokens[sent], expert) @ self.outward[expert].T
            y = y.index_add(0, sent, out * shares[sent, expert, None])
        return y.view_as(x)

    def _all_experts(self, x: Tensor, weights: Tensor) -> Tensor:
        """The same with hidden units and summands as arrays of their own, those of experts that were not chosen 0."""
        tokens, chosen = x.flatten(0, -2), (weights.flatten(0, -2) != 0)[..., None]
        hidden = torch.stack([self._hidden(tokens, expert) for expert in range(self.config.n_experts)], 1) * chosen
        hidden = self.hook_expert_post(hidden.unflatten(0, x.shape[:-1]))
        out = torch.einsum("bpeh,emh->bpem", hidden, self.outward)
        return self.hook_expert_out(out * weights[..., None]).sum(2)

    @property
    def b_out(self) -> Tensor:
        """[d_model]; there is none."""
        return self.outward.new_zeros(self.outward.shape[1])
